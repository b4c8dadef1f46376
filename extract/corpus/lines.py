"""Decode files to lines of text, with byte order marks and encodings.

A line ends with \\n, \\r\\n or \\r. If the encoding represents line ends as ASCII does, lines are split before they are
decoded, so that an invalid line does not affect the others; UTF-16 and UTF-32 are decoded as a stream.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, NamedTuple

from attlas.extract.corpus.compression import open_bytes
from attlas.extract.corpus.files import CorpusFile
from attlas.extract.corpus.options import AUTO, ReadOptions
from attlas.extract.errors import Refusal

_MARKS = (  # UTF-32 first, because its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# encodings to use once the byte order mark is removed; without a mark, files are little-endian in practice
_WITHOUT_MARK = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
_HEAD_BYTES = 256  # checked for UTF-16 without a byte order mark


class Encoding(NamedTuple):
    """An encoding, and the length in bytes of the byte order mark before the text."""

    name: str
    mark: int

    @property
    def display_name(self) -> str:
        """The name for messages, such as UTF-8 or cp1252."""
        return self.name.upper() if self.name.startswith("utf") else self.name


@dataclass(frozen=True)
class Line:
    """A line including its end, numbered from 1. If it can't be decoded, `error` is set and `text` has replacement characters."""

    number: int
    text: str
    error: str | None = None

    @property
    def content(self) -> str:
        """The line without its end."""
        return self.text.removesuffix("\n").removesuffix("\r")


def encoding_of(head: bytes, requested: str) -> Encoding:
    """The encoding given by the byte order mark; without a mark the requested one, or UTF-8."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return Encoding(name, len(mark))
    name = "utf-8" if requested == AUTO else codecs.lookup(requested).name
    return Encoding(_WITHOUT_MARK.get(name, name), 0)


def unmarked_utf16(data: bytes, requested: str) -> str | None:
    """The UTF-16 encoding of data without a byte order mark, recognized by NULs in every second byte; None for any other."""
    head = data[: min(len(data), _HEAD_BYTES) // 2 * 2]
    if requested != AUTO or len(head) < 4:
        return None
    for name, nul, other in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
        if not any(nul) and all(other):
            return name
    return None


def read_lines(file: CorpusFile, options: ReadOptions) -> Iterator[Line]:
    """Read the lines of a file. Raises Refusal for UTF-16 without a byte order mark and for a line that is too long."""
    requested, longest = options.encoding, options.max_document_bytes
    with open_bytes(file.path) as stream:
        head = stream.read(_HEAD_BYTES)
    if name := unmarked_utf16(head, requested):
        raise Refusal(
            f"a file without a byte order mark is read as UTF-8; {file.name} looks like UTF-16, with a NUL in every second byte; "
            f"use --encoding {name}"
        )
    encoding = encoding_of(head, requested)
    with open_bytes(file.path) as stream:
        stream.read(encoding.mark)
        has_ascii_line_ends = "\n".encode(encoding.name) == b"\n"
        split = _split_then_decode if has_ascii_line_ends else _decode_then_split
        try:
            yield from split(stream, encoding, longest)
        except _TooLong as error:
            raise Refusal(
                f"a line has at most {longest:,} bytes; {file.name}, line {error}, has more; give a larger "
                "--max-document-bytes, or leave the file out"
            ) from error


class _TooLong(Exception):
    """A line that is too long; the message is its number."""


def _numbered_lines(stream: io.TextIOWrapper, longest: int) -> Iterator[tuple[int, str]]:
    """The lines of a stream, with their ends. Raises _TooLong before more than one line of that length is read."""
    beginnings = iter(partial(stream.readline, longest + len("\r\n")), "")
    for number, line in enumerate(beginnings, 1):
        if len(line) > longest and len(line.rstrip("\r\n")) > longest:
            raise _TooLong(number)
        yield number, line


def _split_then_decode(stream: BinaryIO, encoding: Encoding, longest: int) -> Iterator[Line]:
    offset = encoding.mark
    # Latin-1 maps each byte to one character, which is the fastest way to split bytes at all three line ends
    with io.TextIOWrapper(stream, "latin-1", newline="") as lines:
        for number, line in _numbered_lines(lines, longest):
            data = line.encode("latin-1")
            try:
                yield Line(number, data.decode(encoding.name))
            except UnicodeDecodeError as error:
                error_text = f"not {encoding.display_name} at byte {offset + error.start}"
                yield Line(number, data.decode(encoding.name, errors="replace"), error_text)
            offset += len(data)


def _decode_then_split(stream: BinaryIO, encoding: Encoding, longest: int) -> Iterator[Line]:
    # half a surrogate pair invalidates one text; a missing byte invalidates everything after it
    errors = "surrogatepass" if encoding.name.startswith("utf") else "strict"
    with io.TextIOWrapper(stream, encoding.name, errors=errors, newline="") as lines:
        for number, line in _numbered_lines(lines, longest):
            yield Line(number, line)
