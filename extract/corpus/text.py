"""Read text files: one document per file, paragraph or line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from attlas.extract.corpus.compression import READ_ERRORS, open_bytes
from attlas.extract.corpus.documents import Document, make_document
from attlas.extract.corpus.files import CorpusFile
from attlas.extract.corpus.lines import Line, encoding_of, read_lines, unmarked_utf16
from attlas.extract.corpus.options import ReadOptions


def text_documents(file: CorpusFile, options: ReadOptions) -> Iterator[Document]:
    """The documents of a text file."""
    match options.unit:
        case "document":
            yield _whole_text(file, options.encoding)
        case "line":
            for line in read_lines(file, options.encoding):
                yield _document(f"{file.name}:{line.number}", [line])
        case "paragraph":
            yield from _paragraphs(file, options.encoding)


def _whole_text(file: CorpusFile, requested: str) -> Document:
    try:
        with open_bytes(file.path) as stream:
            data = stream.read()
    except READ_ERRORS as error:
        return Document(file.name, "", f"unreadable: {type(error).__name__}")
    if name := unmarked_utf16(data, requested):
        return Document(file.name, "", f"not UTF-8: {name} without a byte order mark")
    encoding = encoding_of(data, requested)
    try:
        return make_document(file.name, data[encoding.mark :].decode(encoding.name))
    except UnicodeDecodeError as error:
        return Document(file.name, "", f"not {encoding.display_name} at byte {encoding.mark + error.start}")


def _paragraphs(file: CorpusFile, requested: str) -> Iterator[Document]:
    """Yield each run of lines between blank ones, with the number of its first line."""
    paragraph: list[Line] = []
    for line in chain(read_lines(file, requested), [Line(0, "")]):
        # ASCII white space only: any other counts as text
        if line.error or line.text.strip(" \t\n\r\v\f"):
            paragraph.append(line)
        elif paragraph:
            yield _document(f"{file.name}:{paragraph[0].number}", paragraph)
            paragraph.clear()


def _document(source: str, lines: list[Line]) -> Document:
    error = next((line.error for line in lines if line.error), None)
    if error:
        return Document(source, "", error)
    return make_document(source, "".join(line.text for line in lines[:-1]) + lines[-1].content)
