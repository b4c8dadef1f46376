"""Read text files: one document per file, paragraph or line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from attlas.extract.corpus.compression import READ_ERRORS, open_bytes
from attlas.extract.corpus.documents import Document, make_document
from attlas.extract.corpus.files import CorpusFile
from attlas.extract.corpus.lines import Line, encoding_of, read_lines, unmarked_utf16
from attlas.extract.corpus.options import ReadOptions, too_large


def text_documents(file: CorpusFile, options: ReadOptions) -> Iterator[Document]:
    """The documents of a text file."""
    match options.unit:
        case "document":
            yield _whole_text(file, options)
        case "line":
            for line in read_lines(file, options):
                yield _document(f"{file.name}:{line.number}", [line])
        case "paragraph":
            yield from _paragraphs(file, options)


def _whole_text(file: CorpusFile, options: ReadOptions) -> Document:
    requested, longest = options.encoding, options.max_document_bytes
    try:
        with open_bytes(file.path) as stream:
            data = stream.read(longest + 1)
    except READ_ERRORS as error:
        return Document(file.name, "", f"unreadable: {type(error).__name__}")
    if len(data) > longest:
        return Document(file.name, "", too_large(longest))
    if name := unmarked_utf16(data, requested):
        return Document(file.name, "", f"not UTF-8: {name} without a byte order mark")
    encoding = encoding_of(data, requested)
    try:
        return make_document(file.name, data[encoding.mark :].decode(encoding.name))
    except UnicodeDecodeError as error:
        return Document(file.name, "", f"not {encoding.display_name} at byte {encoding.mark + error.start}")


def _paragraphs(file: CorpusFile, options: ReadOptions) -> Iterator[Document]:
    """Yield each run of lines between blank ones, with the number of its first line. Of one that is too long nothing is kept."""
    longest = options.max_document_bytes
    paragraph: list[Line] = []
    first = size = 0
    for line in chain(read_lines(file, options), [Line(0, "")]):
        # ASCII white space only: any other counts as text
        if line.error or line.text.strip(" \t\n\r\v\f"):
            first = first or line.number
            size += len(line.text)
            paragraph.append(line)
            if size > longest:
                paragraph.clear()
        elif first:
            place = f"{file.name}:{first}"
            yield Document(place, "", too_large(longest)) if size > longest else _document(place, paragraph)
            paragraph.clear()
            first = size = 0


def _document(source: str, lines: list[Line]) -> Document:
    error = next((line.error for line in lines if line.error), None)
    if error:
        return Document(source, "", error)
    return make_document(source, "".join(line.text for line in lines[:-1]) + lines[-1].content)
