"""Text out of bytes: byte order marks, encodings, lines.

A line ends with \\n, \\r\\n or \\r. Where the encoding writes line ends as ASCII does, lines are split before they are
decoded, so that one which can't be decoded takes no other along; UTF-16 and its like are decoded as a whole.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from extract.corpus.compression import open_bytes
from extract.corpus.files import CorpusFile
from extract.corpus.reading import AUTO
from extract.errors import Refusal

_MARKS = (  # the longer first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# the mark, where there is one, has been taken off; without one, little-endian is what is written today
_WITHOUT_MARK = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
_HEAD = 256  # bytes looked at to tell UTF-16 that has no mark


class Encoding(NamedTuple):
    """An encoding, and the length in bytes of the byte order mark before the text."""

    name: str
    mark: int

    @property
    def shown(self) -> str:
        return self.name.upper() if self.name.startswith("utf") else self.name


@dataclass(frozen=True)
class Line:
    """A line with its end, counted from 1; where it could not be decoded, `wrong` says so and `text` has replacements."""

    number: int
    text: str
    wrong: str | None = None

    @property
    def content(self) -> str:
        """The line without its end."""
        return self.text.removesuffix("\n").removesuffix("\r")


def encoding_of(head: bytes, asked: str) -> Encoding:
    """The encoding that a byte order mark tells; without one that which was asked for, UTF-8 if none was."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return Encoding(name, len(mark))
    name = "utf-8" if asked == AUTO else codecs.lookup(asked).name
    return Encoding(_WITHOUT_MARK.get(name, name), 0)


def looks_like_utf16(data: bytes, asked: str) -> str | None:
    """The name of the UTF-16 that text without a mark seems to be: ASCII in it has a NUL in every second byte."""
    head = data[: min(len(data), _HEAD) // 2 * 2]
    if asked != AUTO or len(head) < 4:
        return None
    for name, nul, other in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
        if not any(nul) and all(other):
            return name
    return None


def decoded_lines(file: CorpusFile, asked: str) -> Iterator[Line]:
    """The lines of a file. Raises Refusal for UTF-16 that is not marked as such."""
    with open_bytes(file.path) as stream:
        head = stream.read(_HEAD)
    if name := looks_like_utf16(head, asked):
        raise Refusal(
            f"a file without a byte order mark is read as UTF-8; {file.name} has a NUL in every second byte, as UTF-16 has; "
            f"use --encoding {name}"
        )
    encoding = encoding_of(head, asked)
    with open_bytes(file.path) as stream:
        stream.read(encoding.mark)
        ends_as_ascii_does = "\n".encode(encoding.name) == b"\n"
        yield from _lines_of_bytes(stream, encoding) if ends_as_ascii_does else _lines_of_text(stream, encoding)


def _lines_of_bytes(stream: BinaryIO, encoding: Encoding) -> Iterator[Line]:
    offset = encoding.mark
    # Latin-1 stands for the bytes: it is the quickest way to lines that end in three ways
    with io.TextIOWrapper(stream, "latin-1", newline="") as lines:
        for number, line in enumerate(lines, 1):
            data = line.encode("latin-1")
            try:
                yield Line(number, data.decode(encoding.name))
            except UnicodeDecodeError as error:
                wrong = f"not {encoding.shown} at byte {offset + error.start}"
                yield Line(number, data.decode(encoding.name, errors="replace"), wrong)
            offset += len(data)


def _lines_of_text(stream: BinaryIO, encoding: Encoding) -> Iterator[Line]:
    # half a surrogate pair is the fault of one text, a byte too few that of all that follow
    errors = "surrogatepass" if encoding.name.startswith("utf") else "strict"
    with io.TextIOWrapper(stream, encoding.name, errors=errors, newline="") as lines:
        for number, line in enumerate(lines, 1):
            yield Line(number, line)
