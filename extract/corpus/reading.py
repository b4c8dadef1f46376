"""How the files of a corpus are read: which column, what is a document, delimiter and encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from extract.corpus.files import IMAGES
from extract.errors import Refusal

Unit = Literal["document", "paragraph", "line"]
AUTO = "auto"
_DELIMITED = ("CSV", "TSV")
_ENCODED = ("text", "JSON lines", *_DELIMITED)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The user's options about reading; `delimiter` None is that of the file's kind, `encoding` auto a mark's or UTF-8."""

    text_column: str = "text"
    unit: Unit = "document"
    delimiter: str | None = None
    encoding: str = AUTO

    def check(self) -> None:
        """Refuse values that no file can be read with."""
        if self.unit not in ("document", "paragraph", "line"):
            raise Refusal(f"unit must be document, paragraph or line; got {self.unit!r}; give one of these")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '\r\n"\0'):
            raise Refusal(
                f"delimiter must be one character, no quote and no line end; got {self.delimiter!r}; "
                r"give one such as ';', '|' or '\t'"
            )
        if self.encoding != AUTO and not _is_text_encoding(self.encoding):
            raise Refusal(
                f"encoding must be auto or one that Python knows; got {self.encoding!r}; "
                "give one such as utf-8, utf-16, cp1252 or latin-1"
            )

    def check_for(self, kind: str) -> None:
        """Refuse options that mean nothing for a corpus of this kind."""
        if self.unit != "document" and kind != "text":
            raise Refusal(f"only text files are cut into a {self.unit} each; this corpus is {kind}; leave the unit out")
        if self.delimiter is not None and kind not in _DELIMITED:
            raise Refusal(f"only CSV and TSV have a delimiter; this corpus is {kind}; leave the delimiter out")
        if self.encoding != AUTO and kind not in _ENCODED:
            what = "images" if kind == IMAGES else f"{kind}, which says itself how its texts are encoded"
            raise Refusal(f"only text, JSON lines, CSV and TSV have an encoding; this corpus is {what}; leave it out")


def _is_text_encoding(name: str) -> bool:
    try:
        return bool("a".encode(name))  # `hex` and its like turn bytes into bytes, and are refused here
    except (LookupError, ValueError):
        return False
