"""Documents and corpora, as all readers return them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from attlas.extract.corpus.generated import Generation
from attlas.extract.corpus.options import MAX_DOCUMENT_BYTES, too_large
from attlas.extract.errors import Refusal


@dataclass(frozen=True)
class Document:
    """A text and its source, or the reason it was dropped. An image has no text but a `file`."""

    source: str
    text: str
    dropped_reason: str | None = None
    file: Path | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, read lazily; can be iterated repeatedly. Those of a generated corpus depend on a tokenizer."""

    name: str
    files: tuple[tuple[str, int], ...]
    read: Callable[[], Iterator[Document]] = field(repr=False)
    folder: Path | None = None  # that contains the images; None for texts
    generation: Generation | None = None  # how a generated corpus is made; it has nothing to read
    limit: int | None = None
    strict: bool = False
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    @property
    def has_images(self) -> bool:
        """Whether the documents are images, not texts."""
        return self.folder is not None

    def __iter__(self) -> Iterator[Document]:
        for document in islice(self.read(), self.limit):
            # a text has at least as many bytes as characters
            if len(document.text) > self.max_document_bytes:
                document = replace(document, text="", dropped_reason=too_large(self.max_document_bytes))
            if self.strict:
                refuse_unreadable(document)
            yield document


def make_document(source: str, value: Any) -> Document:
    """The document for a value of the text column, dropped if the value is not valid, non-empty text."""
    if not isinstance(value, str):
        return Document(source, "", f"not text ({'null' if value is None else type(value).__name__})")
    if not value:
        return Document(source, "", "empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON and UTF-16 can represent and UTF-8 can't
        return Document(source, "", f"not text (lone surrogate at character {error.start})")
    return Document(source, value)


def reason_kind(reason: str) -> str:
    """The category of a dropped document's reason, without position and details."""
    return re.split(r" at |: | \(", reason, maxsplit=1)[0]


def refuse_unreadable(document: Document) -> None:
    """Raise Refusal for a document that could not be read; an empty one is no error."""
    if document.dropped_reason not in (None, "empty"):
        raise Refusal(
            f"a strict run refuses documents that can't be read; {document.source} is {document.dropped_reason}; "
            "repair it, or run without --strict to drop and count it"
        )
