"""Write the sequences and documents of a corpus into one spool per shard, and sum up the plan."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa

from attlas.extract.batching import windows
from attlas.extract.corpus import Document, reason_kind
from attlas.extract.corpus.generated import IdDocument
from attlas.extract.errors import Refusal
from attlas.extract.model.special_tokens import SpecialTokens
from attlas.extract.plan.stored import Plan, write_spool
from attlas.extract.store import Storage

_COMMON_COLUMNS = {
    "sequence_id": pa.int64(),
    "document_id": pa.int64(),
    "shard": pa.int32(),
    "window": pa.int32(),
    "first_token": pa.int32(),
    "tokens": pa.int64(),
    "special_tokens": pa.int64(),
}
_TEXT_SEQUENCES = pa.schema(_COMMON_COLUMNS | {"token_ids": pa.list_(pa.int32()), "special": pa.list_(pa.bool_())})
_IMAGE_SEQUENCES = pa.schema(_COMMON_COLUMNS | {"image": pa.string(), "sha256": pa.string()})
_MARKS = pa.field("marks", pa.list_(pa.int8()))  # of each token: part of a needle, or of its answer
_TEXT = pa.field("text", pa.large_string())
_DOCUMENTS = pa.schema(
    {
        "document_id": pa.int64(),
        "source": pa.string(),
        "digest": pa.string(),
        "characters": pa.int64(),
        "content_tokens": pa.int64(),
        "sequences": pa.int64(),
        "dropped_reason": pa.string(),
    }
)


@dataclass(frozen=True)
class Encoded:
    """The token ids of a document, without special tokens, and a function from a range of them to its text."""

    ids: np.ndarray
    text_of: Callable[[int, int], str] | None = None


@dataclass
class _Shard:
    """The rows of one shard; `ids` is empty for images."""

    number: int
    sequences: list[dict[str, Any]] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    marks: list[np.ndarray] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)

    def image_table(self) -> pa.Table:
        return pa.Table.from_pylist(self.sequences, schema=_IMAGE_SEQUENCES)

    def sequence_table(self, special: SpecialTokens, *, keep_text: bool) -> pa.Table:
        ends = np.cumsum([0, *map(len, self.ids)], dtype=np.int32)
        inside = np.ones(ends[-1], bool)
        for first, last in pairwise(ends):
            inside[first + len(special.before) : last - len(special.after)] = False
        values = np.concatenate(self.ids) if self.ids else np.zeros(0, np.int32)
        lists = {
            "token_ids": pa.ListArray.from_arrays(pa.array(ends), pa.array(values)),
            "special": pa.ListArray.from_arrays(pa.array(ends), pa.array(inside)),
        }
        schema = _TEXT_SEQUENCES.append(_TEXT) if keep_text else _TEXT_SEQUENCES
        if self.marks:
            schema = schema.append(_MARKS)
            lists["marks"] = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(self.marks)))
        columns = [
            lists[f.name] if f.name in lists else pa.array([r[f.name] for r in self.sequences], f.type) for f in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def document_table(self) -> pa.Table:
        return pa.Table.from_pylist(self.documents, schema=_DOCUMENTS)


class Spool:
    """Collects sequences and documents into shards, and writes each full one. `special` is None for images."""

    def __init__(
        self,
        storage: Storage,
        shard_sequences: int,
        key: bytes | None,
        special: SpecialTokens | None = None,
        keep_text: bool = False,
    ) -> None:
        self.storage = storage
        self.shard_sequences = shard_sequences
        self.special = special
        self.key = key
        self.keep_text = keep_text
        self.shard = _Shard(0)
        self.sequences = self.documents = self.tokens = self.content_tokens = 0
        self.dropped: Counter[str] = Counter()
        self.spools: list[str] = []
        self.digest = _hash(b"", key)

    def add(self, document: Document, encoded: Encoded | None, *, size: int, stride: int) -> None:
        """Add the next document; `encoded` is None for a dropped one."""
        cuts = [] if encoded is None else list(windows(cast(Sequence[int], encoded.ids), size=size, stride=stride))
        reason = document.dropped_reason or (None if cuts else "no tokens")
        content = None if encoded is None else document.text.encode()
        tokens = 0 if encoded is None else len(encoded.ids)
        self._add_document(document, content, tokens, len(cuts), reason, characters=len(document.text))
        for window, (first, ids) in enumerate(cuts):
            assert encoded is not None
            self._add_window(window, first, np.asarray(ids), encoded)
        self.documents += 1

    def add_ids(self, document: IdDocument, encoded: Encoded) -> None:
        """Add the next document of a generated corpus, as one sequence."""
        assert self.special is not None, "the spool is of texts"
        content = document.ids.astype("<i4").tobytes()
        self._add_document(Document(document.source, ""), content, len(document.ids), 1, None, characters=None)
        self._add_window(0, 0, document.ids, encoded)
        if document.marks is not None:
            around = (len(self.special.before), len(self.special.after))
            self.shard.marks.append(np.pad(document.marks, around))
        self.documents += 1

    def add_image(
        self, document: Document, content: bytes | None, reason: str | None, *, tokens: int, special: int
    ) -> None:
        """Add the next image; `content` is None for a dropped one."""
        sequences = 0 if content is None else 1
        self._add_document(document, content, sequences * (tokens - special), sequences, reason, characters=None)
        if content is not None:
            facts = {"image": document.source, "sha256": hashlib.sha256(content).hexdigest()}
            self._add_sequence(0, 0, tokens, special, facts)
        self.documents += 1

    def _add_document(
        self,
        document: Document,
        content: bytes | None,
        tokens: int,
        sequences: int,
        reason: str | None,
        *,
        characters: int | None,
    ) -> None:
        if sequences:
            self._make_room()
        row = {
            "document_id": self.documents,
            "source": document.source,
            "digest": self._digest(content),
            "characters": characters,
            "content_tokens": tokens,
            "sequences": sequences,
            "dropped_reason": reason,
        }
        self.shard.documents.append(row)
        if reason is not None:
            self.dropped[reason_kind(reason)] += 1
        self.content_tokens += tokens

    def _make_room(self) -> None:
        # only for a new sequence, so that documents dropped at the end belong to the last shard that has sequences
        if len(self.shard.sequences) == self.shard_sequences:
            self._write_shard()

    def _digest(self, content: bytes | None) -> str | None:
        """Add a document to the corpus digest; returns its own digest if there is a key."""
        # an unkeyed digest would let anyone test whether a text is in the corpus, so it only enters the corpus digest
        digest = None if content is None else _hash(content, self.key)
        raw = b"" if digest is None else digest.digest()
        self.digest.update(len(raw).to_bytes(8, "big") + raw)
        return digest.hexdigest() if digest is not None and self.key is not None else None

    def _add_window(self, window: int, first: int, ids: np.ndarray, encoded: Encoded) -> None:
        assert self.special is not None, "the spool is of texts"
        whole = self.special.around(ids)
        text = None if encoded.text_of is None else encoded.text_of(first, first + len(ids))
        self._add_sequence(window, first, len(whole), self.special.count, {"text": text})
        self.shard.ids.append(whole)

    def _add_sequence(self, window: int, first: int, tokens: int, special: int, facts: Mapping[str, Any]) -> None:
        self._make_room()
        row = {
            "sequence_id": self.sequences,
            "document_id": self.documents,
            "shard": self.shard.number,
            "window": window,
            "first_token": first,
            "tokens": tokens,
            "special_tokens": special,
        }
        self.shard.sequences.append({**row, **facts})
        self.sequences += 1
        self.tokens += tokens

    def _sequence_table(self) -> pa.Table:
        if self.special is None:
            return self.shard.image_table()
        return self.shard.sequence_table(self.special, keep_text=self.keep_text)

    def _write_shard(self) -> None:
        digest = write_spool(self.storage, self.shard.number, self._sequence_table(), self.shard.document_table())
        self.spools.append(digest)
        self.shard = _Shard(self.shard.number + 1)

    def finish(self) -> Plan:
        """Write the last shard; returns the plan. Raises Refusal for a corpus without a sequence."""
        if self.documents == 0:
            raise Refusal("a corpus has at least one document; this one has none; check the file, column or limit")
        if self.sequences == 0:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
            raise Refusal(
                f"a corpus has at least one document with tokens; all {self.documents} were dropped: {counts}; "
                "check the file, its encoding or the text column"
            )
        self._write_shard()
        return Plan(
            shards=self.shard.number,
            shard_sequences=self.shard_sequences,
            sequences=self.sequences,
            documents=self.documents,
            tokens=self.tokens,
            content_tokens=self.content_tokens,
            dropped=dict(sorted(self.dropped.items())),
            corpus_digest=self.digest.hexdigest(),
            spools=tuple(self.spools),
        )


def _hash(content: bytes, key: bytes | None) -> Any:
    """The SHA-256 of the content, or its HMAC if there is a key."""
    return hashlib.sha256(content) if key is None else hmac.new(key, content, hashlib.sha256)
