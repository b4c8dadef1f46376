"""Plan a corpus of texts: tokenize the documents and cut them into windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from attlas.extract.batching import windows
from attlas.extract.corpus import Document, refuse_unreadable
from attlas.extract.errors import Damaged, Refusal
from attlas.extract.model.special_tokens import SpecialTokens, special_tokens
from attlas.extract.plan.encoding import encode
from attlas.extract.plan.known import KnownCorpus
from attlas.extract.plan.shards import Read
from attlas.extract.plan.spool import Encoded, Spool
from attlas.extract.plan.stored import Plan, Progress, clear_plan, write_plan
from attlas.extract.store import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20


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
    known: KnownCorpus | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Read the corpus once, write the spool of each shard, then the plan. Raises Refusal.

    At most one shard and one batch of documents are in memory. `progress` receives the documents and tokens so far.
    known: the dataset of an earlier state of the corpus. Only new documents are planned, and, in a second reading, what is left of the
    shards that have lost one.
    """
    special = special_tokens(tokenizer)
    _check_sizes(special.count, max_length, stride, shard_sequences)
    clear_plan(storage)
    spool = Spool(storage, shard_sequences, digest_key, special, keep_text, known)
    size = max_length - special.count
    for batch in _document_batches(corpus):
        contents = [_content_of(document) for document in batch]
        is_new = [known is None or not known.is_known(d, content) for d, content in zip(batch, contents, strict=True)]
        encodings = encode(tokenizer, [d for d, new in zip(batch, is_new, strict=True) if new], keep_text)
        for document, content, new in zip(batch, contents, is_new, strict=True):
            if strict:
                refuse_unreadable(document)
            if new:
                spool.add(document, next(encodings), size=size, stride=stride)
            else:
                spool.pass_over(content)
        if progress is not None:
            progress(spool.documents, spool.tokens)
    spool.replace_shards(
        partial(_read_again, corpus, tokenizer, special, keep_text=keep_text, size=size, stride=stride)
    )
    plan = spool.finish()
    write_plan(storage, plan)
    return plan


def _content_of(document: Document) -> bytes | None:
    return None if document.dropped_reason is not None else document.text.encode()


def _read_again(
    corpus: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    known: KnownCorpus,
    numbers: set[int],
    *,
    keep_text: bool,
    size: int,
    stride: int,
) -> Iterator[tuple[int, Read]]:
    """Some documents of the corpus by their numbers, each with a function from its planned windows to their tokens."""
    for number, document in known.again(corpus, numbers):
        known.check(number, document, _content_of(document))
        (encoded,) = encode(tokenizer, [document], keep_text)
        assert encoded is not None, "it has sequences"
        cuts = list(windows(cast(Sequence[int], encoded.ids), size=size, stride=stride))
        yield number, partial(_window_of, document, encoded, cuts, special)


def _window_of(
    document: Document,
    encoded: Encoded,
    cuts: Sequence[tuple[int, Sequence[int]]],
    special: SpecialTokens,
    row: Mapping[str, Any],
) -> tuple[Mapping[str, Any], np.ndarray]:
    first, ids = cuts[row["window"]] if row["window"] < len(cuts) else (-1, ())
    if first != row["first_token"] or len(ids) + special.count != row["tokens"]:
        raise Damaged(f"{document.source} has other windows than it had; measure again into another folder")
    text = None if encoded.text_of is None else encoded.text_of(first, first + len(ids))
    return {"text": text}, special.around(np.asarray(ids))


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


def _document_batches(corpus: Iterable[Document]) -> Iterator[list[Document]]:
    """Batches of documents, large enough for a tokenizer that works in parallel."""
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
