"""The options for reading a corpus: text column, unit of a document, delimiter and encoding."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from attlas.extract.corpus.files import IMAGES
from attlas.extract.errors import Refusal

Unit = Literal["document", "paragraph", "line"]
AUTO = "auto"
MAX_DOCUMENT_BYTES = 1 << 26  # ten times a long book
_DELIMITED = ("CSV", "TSV")
_ENCODED = ("text", "JSON lines", *_DELIMITED)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """The user's options for reading a corpus.

    By default the delimiter depends on the kind of file, and the encoding on its byte order mark, else UTF-8. No more than
    `max_document_bytes` are read of a document or a line, which may be a decompression bomb.
    """

    text_column: str = "text"
    unit: Unit = "document"
    delimiter: str | None = None
    encoding: str = AUTO
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    def check(self) -> None:
        """Raise Refusal for values that are invalid for any file."""
        if self.unit not in ("document", "paragraph", "line"):
            raise Refusal(f"unit must be document, paragraph or line; got {self.unit!r}; choose one of them")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '\r\n"\0'):
            raise Refusal(
                f"delimiter must be one character other than a quote or line end; got {self.delimiter!r}; "
                r"use one such as ';', '|' or '\t'"
            )
        if self.encoding != AUTO and not _is_text_encoding(self.encoding):
            raise Refusal(
                f"encoding must be auto or a text encoding of Python; got {self.encoding!r}; "
                "use one such as utf-8, utf-16, cp1252 or latin-1"
            )

    def check_for_ids(self, corpus: str) -> None:
        """Raise Refusal for any option: a generated corpus has no text to read."""
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default and f.name != "max_document_bytes"]
        if given:
            raise Refusal(
                f"{', '.join(given)} can't be asked of {corpus}, which is made of token ids; remove the option"
            )

    def check_for(self, kind: str) -> None:
        """Raise Refusal for options that do not apply to this kind of corpus."""
        if self.unit != "document" and kind != "text":
            raise Refusal(f"unit {self.unit} applies to text files only; this corpus is {kind}; remove the option")
        if self.delimiter is not None and kind not in _DELIMITED:
            raise Refusal(f"delimiter applies to CSV and TSV only; this corpus is {kind}; remove the option")
        if self.encoding != AUTO and kind not in _ENCODED:
            what = "images" if kind == IMAGES else f"{kind}, which defines the encoding itself"
            raise Refusal(
                f"encoding applies to text, JSON lines, CSV and TSV only; this corpus is {what}; remove the option"
            )


def too_large(max_bytes: int) -> str:
    """The reason for which a document is dropped that has more bytes."""
    return f"too large: more than {max_bytes:,} bytes"


def _is_text_encoding(name: str) -> bool:
    try:
        return bool("a".encode(name))  # `hex` and other bytes-to-bytes codecs raise here
    except (LookupError, ValueError):
        return False
