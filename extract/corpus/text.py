"""Text files: a document each, or each paragraph or line of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from extract.corpus.compression import READ_ERRORS, open_bytes
from extract.corpus.documents import Document, document_of
from extract.corpus.files import CorpusFile
from extract.corpus.lines import Line, decoded_lines, encoding_of, looks_like_utf16
from extract.corpus.reading import Reading


def text_documents(file: CorpusFile, reading: Reading) -> Iterator[Document]:
    match reading.unit:
        case "document":
            yield _whole_text(file, reading.encoding)
        case "line":
            for line in decoded_lines(file, reading.encoding):
                yield _document(f"{file.name}:{line.number}", [line])
        case "paragraph":
            yield from _paragraphs(file, reading.encoding)


def _whole_text(file: CorpusFile, asked: str) -> Document:
    try:
        with open_bytes(file.path) as stream:
            data = stream.read()
    except READ_ERRORS as error:
        return Document(file.name, "", f"unreadable: {type(error).__name__}")
    if name := looks_like_utf16(data, asked):
        return Document(file.name, "", f"not UTF-8: {name} without a byte order mark")
    encoding = encoding_of(data, asked)
    try:
        return document_of(file.name, data[encoding.mark :].decode(encoding.name))
    except UnicodeDecodeError as error:
        return Document(file.name, "", f"not {encoding.shown} at byte {encoding.mark + error.start}")


def _paragraphs(file: CorpusFile, asked: str) -> Iterator[Document]:
    """Runs of lines between blank ones, named by their first line."""
    paragraph: list[Line] = []
    for line in chain(decoded_lines(file, asked), [Line(0, "")]):
        # of ASCII alone: other white space is text
        if line.wrong or line.text.strip(" \t\n\r\v\f"):
            paragraph.append(line)
        elif paragraph:
            yield _document(f"{file.name}:{paragraph[0].number}", paragraph)
            paragraph.clear()


def _document(source: str, lines: list[Line]) -> Document:
    wrong = next((line.wrong for line in lines if line.wrong), None)
    if wrong:
        return Document(source, "", wrong)
    return document_of(source, "".join(line.text for line in lines[:-1]) + lines[-1].content)
