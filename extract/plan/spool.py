"""Write the sequences and documents of a corpus into one spool per shard, and sum up the plan."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from attlas.extract.batching import windows
from attlas.extract.corpus import Document, reason_kind
from attlas.extract.corpus.generated import IdDocument
from attlas.extract.errors import Damaged, Refusal
from attlas.extract.model.special_tokens import SpecialTokens
from attlas.extract.plan.digests import new_digest
from attlas.extract.plan.known import KnownCorpus
from attlas.extract.plan.shards import Read, ReplacedShard, ShardRows
from attlas.extract.plan.stored import Growth, Plan, write_spool
from attlas.extract.store import Storage
from attlas.extract.tables.documents import CHANGED, REMOVED


@dataclass(frozen=True)
class Encoded:
    """The token ids of a document, without special tokens, and a function from a range of them to its text."""

    ids: np.ndarray
    text_of: Callable[[int, int], str] | None = None


class Spool:
    """Collects sequences and documents into shards, and writes each full one. `special` is None for images.

    `known`: the dataset that these are added to; their ids and shards go on where its own end.
    """

    def __init__(
        self,
        storage: Storage,
        shard_sequences: int,
        key: bytes | None,
        special: SpecialTokens | None = None,
        keep_text: bool = False,
        known: KnownCorpus | None = None,
    ) -> None:
        self.storage = storage
        self.shard_sequences = shard_sequences
        self.special = special
        self.key = key
        self.keep_text = keep_text
        self.known = known
        before: Mapping[str, Any] = {} if known is None else known.corpus
        self.documents, self.sequences, self.tokens, self.content_tokens = (
            before.get(name, 0) for name in ("documents", "sequences", "tokens", "content_tokens")
        )
        self.dropped: Counter[str] = Counter(before.get("dropped"))
        self.next_sequence = 0 if known is None else known.next_sequence
        self.shard = ShardRows(0 if known is None else known.shards)
        self.spools: dict[int, str] = {}
        self.gone: Counter[str] = Counter()
        self.digest = new_digest(b"", key)

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
            self._add_sequence(0, 0, tokens, special, image_facts(document, content))
        self.documents += 1

    def pass_over(self, content: bytes | None) -> None:
        """Go over the next document of the corpus, which the dataset has already; it only enters the corpus digest."""
        self._digest(content)

    def replace_shards(self, read: Callable[[KnownCorpus, set[int]], Iterator[tuple[int, Read]]]) -> None:
        """Plan the shards again that have lost a document, with what is left of them, and those that the known corpus wants.

        read: reads these documents of the corpus again, and gives each with the function from its windows to their tokens or image.
        """
        if self.known is None:
            return
        gone = self.known.gone()
        replaced = {n: ReplacedShard.of(n, *rows, gone) for n, rows in self.known.shards_with(gone).items()}
        for shard in replaced.values():
            self._forget(shard)
        missing: dict[int, list[ReplacedShard]] = defaultdict(list)
        for shard in replaced.values():
            for document in {row["document_id"] for row in shard.sequences}:
                missing[document].append(shard)
        for shard in [s for s in replaced.values() if not s.sequences]:
            self._write(shard.whole())
        for document, window in read(self.known, set(missing)) if missing else ():
            for shard in missing.pop(document):
                shard.fill(document, window)
                if shard.is_filled:
                    self._write(shard.whole())
        if missing:
            raise Damaged("documents have gone while the corpus was read; the same command plans again")

    def _forget(self, shard: ReplacedShard) -> None:
        """Take the documents that are gone from a shard out of the totals."""
        self.sequences -= len(shard.lost)
        self.tokens -= sum(row["tokens"] for row in shard.lost)
        for row in shard.gone:
            self.content_tokens -= row["content_tokens"]
            if row["dropped_reason"] is not None:
                self.dropped[reason_kind(row["dropped_reason"])] -= 1
            reason = shard.reasons[row["document_id"]]
            self.dropped[reason] += 1
            self.gone[reason] += 1

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
        digest = None if content is None else new_digest(content, self.key)
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
            "sequence_id": self.next_sequence,
            "document_id": self.documents,
            "shard": self.shard.number,
            "window": window,
            "first_token": first,
            "tokens": tokens,
            "special_tokens": special,
        }
        self.shard.sequences.append({**row, **facts})
        self.next_sequence += 1
        self.sequences += 1
        self.tokens += tokens

    def _write(self, shard: ShardRows) -> None:
        if self.special is None:
            sequences = shard.image_table()
        else:
            sequences = shard.sequence_table(self.special, keep_text=self.keep_text)
        self.spools[shard.number] = write_spool(self.storage, shard.number, sequences, shard.document_table())

    def _write_shard(self) -> None:
        self._write(self.shard)
        self.shard = ShardRows(self.shard.number + 1)

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
        if self.shard.documents or self.shard.sequences:
            self._write_shard()
        shards, before = self.shard.number, 0 if self.known is None else self.known.corpus["documents"]
        return Plan(
            shards=shards,
            shard_sequences=self.shard_sequences,
            sequences=self.sequences,
            documents=self.documents,
            tokens=self.tokens,
            content_tokens=self.content_tokens,
            dropped={reason: count for reason, count in sorted(self.dropped.items()) if count},
            corpus_digest=self.digest.hexdigest(),
            spools=tuple(self.spools.get(shard) for shard in range(shards)),
            generation=Growth(
                number=1 if self.known is None else self.known.generation + 1,
                next_sequence=self.next_sequence,
                added=self.documents - before - self.gone[CHANGED],
                changed=self.gone[CHANGED],
                removed=self.gone[REMOVED],
            ),
        )


def image_facts(document: Document, content: bytes) -> dict[str, str]:
    """What a spool has of an image, so that it is measured as it was planned."""
    return {"image": document.source, "sha256": hashlib.sha256(content).hexdigest()}
