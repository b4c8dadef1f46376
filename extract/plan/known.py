"""The documents that a finished dataset has, by which another state of its corpus is compared with it.

A document is known by its keyed digest, or without a key by its source and its size: characters of a text, bytes of an image. A
document that is not known is new, and gets new ids. One that is gone keeps its row, without anything that was measured of it.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from attlas.extract.corpus import Document
from attlas.extract.errors import Damaged
from attlas.extract.plan.digests import content_digest
from attlas.extract.store import Storage, generation_of, next_sequence, parts_of, read_part, shard_of
from attlas.extract.tables.documents import CHANGED, GONE, REMOVED

_NEW = -1
_OF_DOCUMENTS = ("sequences", "documents")
_SEQUENCE_COLUMNS = ("sequence_id", "document_id", "shard", "window", "first_token", "tokens", "special_tokens")


class KnownCorpus:
    """A finished dataset, as a plan of its next generation needs it.

    sizes: of the files of the corpus now. again: shards that are planned again although they have lost no document.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Mapping[str, Any],
        *,
        key: bytes | None,
        sizes: Mapping[str, int],
        again: Collection[int] = (),
    ) -> None:
        self._storage, self._manifest, self._key, self._again = storage, manifest, key, again
        self._old_sizes, self._sizes = manifest["corpus"].get("files") or {}, sizes
        self.corpus: Mapping[str, Any] = manifest["corpus"]
        self.shards: int = manifest["shards"]
        self.generation = generation_of(manifest)
        self.next_sequence = next_sequence(manifest)
        self._waiting: dict[tuple[Any, ...], deque[int]] = defaultdict(deque)
        self._names: dict[int, tuple[Any, ...]] = {}
        self._assigned: list[int] = []
        self._new: Counter[str] = Counter()  # by source
        for row in self._rows_of("documents"):
            if row["dropped_reason"] not in GONE:
                name = self._name_of_row(row)
                self._names[row["document_id"]] = name
                self._waiting[name].append(row["document_id"])

    def is_known(self, document: Document, content: bytes | None) -> bool:
        """Whether the dataset has the next document of the corpus. `content` is None for one that is dropped.

        To be called once for each document, in the order of the corpus.
        """
        waiting = self._waiting.get(self._name_of(document, content))
        known = waiting.popleft() if waiting else _NEW
        self._assigned.append(known)
        if known == _NEW:
            self._new[document.source] += 1
        return known != _NEW

    def gone(self) -> dict[int, str]:
        """The documents that the corpus has no longer, and why; when every document of it has been seen."""
        left = {number for waiting in self._waiting.values() for number in waiting}
        new, reasons = Counter(self._new), {}
        for row in self._rows_of("documents") if left else ():
            if row["document_id"] in left:
                reasons[row["document_id"]] = CHANGED if new[row["source"]] > 0 else REMOVED
                new[row["source"]] -= 1
        return reasons

    def shards_with(self, documents: Collection[int]) -> dict[int, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        """The shards that have rows of some documents, or are planned again, with all their rows of `sequences` and of `documents`."""
        wanted, found = np.fromiter(documents, np.int64), {}
        searched = range(self.shards) if documents else sorted(self._again)
        parts = {name: {shard_of(p.path): p for p in parts_of(self._manifest, name)} for name in _OF_DOCUMENTS}
        for shard in searched:
            parts_of_shard = [parts[name].get(shard) for name in _OF_DOCUMENTS]
            tables = [None if part is None else read_part(self._storage, part) for part in parts_of_shard]
            if shard in self._again or any(
                t is not None and np.isin(t["document_id"].to_numpy(), wanted).any() for t in tables
            ):
                sequences, rows = ([] if t is None else t.to_pylist() for t in tables)
                found[shard] = ([{name: row[name] for name in _SEQUENCE_COLUMNS} for row in sequences], rows)
        return found

    def again(self, corpus: Iterable[Document], documents: set[int]) -> Iterator[tuple[int, Document]]:
        """These documents with their numbers, from a second reading of the corpus. The caller passes each to `check`."""
        for number, document in zip(self._assigned, corpus, strict=False):
            if number in documents:
                yield number, document

    def check(self, number: int, document: Document, content: bytes | None) -> None:
        """Raise Damaged if a document is not the one that it was when the corpus was first read."""
        if self._names[number] != self._name_of(document, content):
            raise Damaged(f"{document.source} has changed while the corpus was read; the same command plans again")

    def _rows_of(self, table: str) -> Iterator[dict[str, Any]]:
        for part in parts_of(self._manifest, table):
            yield from read_part(self._storage, part).to_pylist()

    def _name_of(self, document: Document, content: bytes | None) -> tuple[Any, ...]:
        if self._key is not None and content is not None:
            return (content_digest(content, self._key),)
        if document.file is not None:
            return (document.source, self._sizes.get(document.source))
        return (document.source, len(document.text))

    def _name_of_row(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        if row["digest"] is not None:
            return (row["digest"],)
        characters = row["characters"]
        return (row["source"], self._old_sizes.get(row["source"]) if characters is None else characters)
