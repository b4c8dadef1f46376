"""What every reader gives: a text, or the reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from extract.errors import Refusal


@dataclass(frozen=True)
class Document:
    """A text and where it came from; `text` is "" where it was dropped before it could be read, or is an image's `file`."""

    source: str
    text: str
    dropped_reason: str | None = None
    file: Path | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, read as they are asked for; can be iterated again."""

    name: str
    files: tuple[tuple[str, int], ...]
    read: Callable[[], Iterator[Document]] = field(repr=False)
    folder: Path | None = None  # in which the files of a corpus of images lie
    limit: int | None = None
    strict: bool = False

    @property
    def of_images(self) -> bool:
        return self.folder is not None

    def __iter__(self) -> Iterator[Document]:
        for document in islice(self.read(), self.limit):
            if self.strict:
                refuse_unreadable(document)
            yield document


def document_of(source: str, value: Any) -> Document:
    """The document that a value of a text column is, dropped where it is no text that can be encoded."""
    if not isinstance(value, str):
        return Document(source, "", f"not text ({'null' if value is None else type(value).__name__})")
    if not value:
        return Document(source, "", "empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON and UTF-16 can hold and UTF-8 can't
        return Document(source, "", f"not text (lone surrogate at character {error.start})")
    return Document(source, value)


def reason_kind(reason: str) -> str:
    """What a dropped document counts as: its reason without place and details."""
    return re.split(r" at |: | \(", reason, maxsplit=1)[0]


def refuse_unreadable(document: Document) -> None:
    """Raise Refusal for a document that could not be read; an empty one was read."""
    if document.dropped_reason not in (None, "empty"):
        raise Refusal(
            f"a strict run refuses what can't be read; {document.source} is {document.dropped_reason}; "
            "repair it, or run without strict to have it counted as dropped"
        )
