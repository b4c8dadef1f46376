"""One pass over the corpus: documents into windows, windows into a spool file per shard.

A shard's spool holds all that measuring it needs, so any worker can do any shard and no one reads the corpus again.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from attlas.extract.batching import windows
from attlas.extract.corpus import Document, reason_kind, refuse_unreadable
from attlas.extract.errors import Refusal
from attlas.extract.model.images import ImagePreprocessing, Unreadable
from attlas.extract.plan import Plan as Plan
from attlas.extract.plan import Progress, clear_plan, write_plan, write_spool
from attlas.extract.plan import read_plan as read_plan
from attlas.extract.plan import read_shard as read_shard
from attlas.extract.store import Storage

if TYPE_CHECKING:
    from jaxtyping import Int
    from transformers import PreTrainedTokenizerBase

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20
_PROBES = ("a", "The quick brown fox", "one 2, three!")

_OF_EVERY_SEQUENCE = {
    "sequence_id": pa.int64(),
    "document_id": pa.int64(),
    "shard": pa.int32(),
    "window": pa.int32(),
    "first_token": pa.int32(),
    "tokens": pa.int64(),
    "special_tokens": pa.int64(),
}
_SEQUENCES = pa.schema(_OF_EVERY_SEQUENCE | {"token_ids": pa.list_(pa.int32()), "special": pa.list_(pa.bool_())})
_IMAGES = pa.schema(_OF_EVERY_SEQUENCE | {"image": pa.string(), "sha256": pa.string()})
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
class SpecialTokens:
    """The special tokens that the tokenizer puts before and after a sequence, and the token types that it gives them.

    `types` holds those before, that of the text between and those after; None where the tokenizer gives none.
    """

    before: Int[np.ndarray, " before"]
    after: Int[np.ndarray, " after"]
    types: tuple[Sequence[int], int, Sequence[int]] | None = None

    @property
    def count(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([self.before, ids, self.after])

    def types_of(self, tokens: int) -> Int[np.ndarray, " token"]:
        """The token types of a sequence of so many tokens, special ones included."""
        assert self.types is not None, "asked only where there are types"
        before, text, after = self.types
        return np.array([*before, *[text] * (tokens - self.count), *after], np.int64)


def make_plan(
    corpus: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    storage: Storage,
    max_length: int,
    stride: int = 0,
    shard_sequences: int,
    digest_key: bytes | None,
    keep_text: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Read the corpus once, write each shard's spool into the storage and last the plan. Raises Refusal.

    Memory holds a shard and a batch of documents at most. `progress` is told the documents and tokens done so far.
    """
    special = special_tokens(tokenizer)
    _check_sizes(special.count, max_length, stride, shard_sequences)
    clear_plan(storage)
    spool = _Spool(storage, shard_sequences, digest_key, special, keep_text)
    for batch in _document_batches(corpus):
        for document, encoded in zip(batch, _encoded(tokenizer, batch, keep_text), strict=True):
            if strict:
                refuse_unreadable(document)
            spool.add(document, encoded, size=max_length - special.count, stride=stride)
        if progress is not None:
            progress(spool.documents, spool.tokens)
    plan = spool.finish()
    write_plan(storage, plan)
    return plan


def make_image_plan(
    corpus: Iterable[Document],
    preprocessing: ImagePreprocessing,
    *,
    storage: Storage,
    shard_sequences: int,
    digest_key: bytes | None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """The same for a corpus of images: each is a sequence. The spool names the files, which are read again when measured.

    Every image is made into pixels once here, so that what can't be used is known before the model sees any.
    """
    clear_plan(storage)
    spool = _Spool(storage, shard_sequences, digest_key)
    for document in corpus:
        data, reason = _usable(document, preprocessing)
        if strict:
            refuse_unreadable(replace(document, dropped_reason=reason))
        spool.add_image(document, data, reason, tokens=preprocessing.tokens, special=preprocessing.special)
        if progress is not None:
            progress(spool.documents, spool.tokens)
    plan = spool.finish()
    write_plan(storage, plan)
    return plan


def _usable(document: Document, preprocessing: ImagePreprocessing) -> tuple[bytes | None, str | None]:
    """(bytes, None) of an image that the model can be given, or (None, why it can't)."""
    assert document.file is not None, "a document of an image corpus is a file"
    try:
        data = document.file.read_bytes()
        preprocessing.pixels(data)
    except OSError as error:
        return None, f"unreadable: {type(error).__name__}"
    except Unreadable as error:
        return None, str(error)
    return data, None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """What this tokenizer adds around a text, learnt from texts: it has no method that says so for ids."""
    places: set[int] | None = None
    encoded: Any = {}
    whole: list[int] = []
    content: list[int] = []
    for probe in _PROBES:
        encoded = tokenizer(probe, verbose=False)
        whole = encoded["input_ids"]
        content = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        fits = {n for n in range(len(whole) - len(content) + 1) if whole[n : n + len(content)] == content}
        # a special token equal to a probe's own id can fit at two places, in one probe but not in all
        places = fits if places is None else places & fits
    if places is None or len(places) != 1:
        raise Refusal(
            f"special tokens must stand before and after a text; where {type(tokenizer).__name__} puts them is not clear; "
            "use a model with another tokenizer"
        )
    place = places.pop()
    end = place + len(content)
    types = encoded.get("token_type_ids")
    return SpecialTokens(
        np.array(whole[:place], np.int32),
        np.array(whole[end:], np.int32),
        None if types is None else (types[:place], _type_of_text(tokenizer, types[place:end]), types[end:]),
    )


def _type_of_text(tokenizer: PreTrainedTokenizerBase, types: Sequence[Any]) -> int:
    if len(set(map(str, types))) != 1 or not isinstance(types[0], int):
        raise Refusal(
            f"all tokens of a text have one token type; {type(tokenizer).__name__} gives several ({types}); "
            "use a model with another tokenizer"
        )
    return types[0]


def _check_sizes(special: int, max_length: int, stride: int, shard_sequences: int) -> None:
    if max_length < special + 1:
        raise Refusal(
            f"max_length must leave room for a token beside {special} special ones; got {max_length}; "
            f"use --max-length {special + 1} or more"
        )
    if not 0 <= stride < max_length - special:
        raise Refusal(
            f"stride must be at least 0 and below max_length less special tokens, {max_length - special}; got {stride}; "
            "use a smaller one"
        )
    if shard_sequences < 1 or shard_sequences * max_length > np.iinfo(np.int32).max:
        raise Refusal(
            f"shard_sequences must be at least 1 and a shard hold fewer than 2³¹ tokens; got {shard_sequences} sequences "
            f"of up to {max_length} tokens; use another shard_sequences"
        )


@dataclass(frozen=True)
class _Encoded:
    """A document's ids without special tokens, and how to get the text of some of them again."""

    ids: np.ndarray
    text_of: Callable[[int, int], str] | None = None


def _document_batches(corpus: Iterable[Document]) -> Iterator[list[Document]]:
    """Enough documents at a time for a tokenizer that works in parallel, and no more."""
    batch: list[Document] = []
    characters = 0
    for document in corpus:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(tokenizer: PreTrainedTokenizerBase, batch: list[Document], keep_text: bool) -> Iterator[_Encoded | None]:
    """The ids of each document of the batch; None for one that was dropped."""
    texts = [document.text for document in batch if document.dropped_reason is None]
    encoding: Any = {}
    # a tokenizer written in Python refuses to be asked for offsets
    asked: dict[str, Any] = {"return_offsets_mapping": True} if keep_text and tokenizer.is_fast else {}
    if texts:
        encoding = tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # says that a text is longer than the model takes, which windows are there for
            **asked,
        )
    rows = iter(range(len(texts)))
    for document in batch:
        if document.dropped_reason is not None:
            yield None
            continue
        row = next(rows)
        ids = np.array(encoding["input_ids"][row], np.int32)
        yield _Encoded(ids, _text_reader(tokenizer, document.text, encoding, row) if keep_text else None)


def _text_reader(tokenizer: PreTrainedTokenizerBase, text: str, encoding: Any, row: int) -> Callable[[int, int], str]:
    """first, last → the text of these tokens: a slice of the document where the tokenizer knows where its tokens lie."""
    if "offset_mapping" in encoding:
        offsets = encoding["offset_mapping"][row]

        def sliced(first: int, last: int) -> str:
            spans = [span for span in offsets[first:last] if span[0] < span[1]]
            return text[min(s[0] for s in spans) : max(s[1] for s in spans)] if spans else ""

        return sliced
    ids = encoding["input_ids"][row]
    return lambda first, last: str(tokenizer.decode(ids[first:last]))


@dataclass
class _Shard:
    """The rows of the shard being filled; `ids` of texts alone."""

    number: int
    sequences: list[dict[str, Any]] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)

    def image_table(self) -> pa.Table:
        return pa.Table.from_pylist(self.sequences, schema=_IMAGES)

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
        schema = _SEQUENCES.append(_TEXT) if keep_text else _SEQUENCES
        columns = [
            lists[f.name] if f.name in lists else pa.array([r[f.name] for r in self.sequences], f.type) for f in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def document_table(self) -> pa.Table:
        return pa.Table.from_pylist(self.documents, schema=_DOCUMENTS)


class _Spool:
    """The state of the pass: the shard being filled, the totals, the digest. `special` is None for images."""

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

    def add(self, document: Document, encoded: _Encoded | None, *, size: int, stride: int) -> None:
        """Take the next document; `encoded` is None for one that was dropped."""
        cut = [] if encoded is None else list(windows(cast(Sequence[int], encoded.ids), size=size, stride=stride))
        reason = document.dropped_reason or (None if cut else "no tokens")
        content = None if encoded is None else document.text.encode()
        tokens = 0 if encoded is None else len(encoded.ids)
        self._add_document(document, content, tokens, len(cut), reason, characters=len(document.text))
        for window, (first, ids) in enumerate(cut):
            assert encoded is not None
            self._add_window(window, first, np.asarray(ids), encoded)
        self.documents += 1

    def add_image(
        self, document: Document, data: bytes | None, reason: str | None, *, tokens: int, special: int
    ) -> None:
        """Take the next image; `data` is None for one that was dropped."""
        sequences = 0 if data is None else 1
        self._add_document(document, data, sequences * (tokens - special), sequences, reason, characters=None)
        if data is not None:
            facts = {"image": document.source, "sha256": hashlib.sha256(data).hexdigest()}
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
        # only when a sequence comes: documents dropped at the end stay in the last shard that has sequences
        if len(self.shard.sequences) == self.shard_sequences:
            self._write_shard()

    def _digest(self, content: bytes | None) -> str | None:
        """A document's digest where there is a key; in any case it goes into that of the corpus."""
        # without a key it serves the corpus digest only, and is not kept: anyone could test a text against it
        digest = None if content is None else _hash(content, self.key)
        own = b"" if digest is None else digest.digest()
        self.digest.update(len(own).to_bytes(8, "big") + own)
        return digest.hexdigest() if digest is not None and self.key is not None else None

    def _add_window(self, window: int, first: int, ids: np.ndarray, encoded: _Encoded) -> None:
        assert self.special is not None, "texts have special tokens, if only none"
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
        """Write the last shard; a corpus that gave no sequence is refused."""
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
    """A running SHA-256 of the content, keyed (HMAC) where there is a key."""
    return hashlib.sha256(content) if key is None else hmac.new(key, content, hashlib.sha256)
