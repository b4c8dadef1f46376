"""Plan a corpus of texts: tokenize the documents and cut them into windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from attlas.extract.corpus import Document, refuse_unreadable
from attlas.extract.errors import Refusal
from attlas.extract.model.special_tokens import special_tokens
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
    progress: Progress | None = None,
) -> Plan:
    """Read the corpus once, write the spool of each shard, then the plan. Raises Refusal.

    At most one shard and one batch of documents are in memory. `progress` receives the documents and tokens so far.
    """
    special = special_tokens(tokenizer)
    _check_sizes(special.count, max_length, stride, shard_sequences)
    clear_plan(storage)
    spool = Spool(storage, shard_sequences, digest_key, special, keep_text)
    for batch in _document_batches(corpus):
        for document, encoded in zip(batch, encode(tokenizer, batch, keep_text), strict=True):
            if strict:
                refuse_unreadable(document)
            spool.add(document, encoded, size=max_length - special.count, stride=stride)
        if progress is not None:
            progress(spool.documents, spool.tokens)
    plan = spool.finish()
    write_plan(storage, plan)
    return plan


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


def encode(tokenizer: PreTrainedTokenizerBase, batch: list[Document], keep_text: bool) -> Iterator[Encoded | None]:
    """The token ids of each document; None for a dropped one."""
    texts = [document.text for document in batch if document.dropped_reason is None]
    encoding: Any = {}
    # tokenizers written in Python have no offsets
    options: dict[str, Any] = {"return_offsets_mapping": True} if keep_text and tokenizer.is_fast else {}
    if texts:
        encoding = tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning that a text is too long for the model: it is cut into windows
            **options,
        )
    rows = iter(range(len(texts)))
    for document in batch:
        if document.dropped_reason is not None:
            yield None
            continue
        row = next(rows)
        ids = np.array(encoding["input_ids"][row], np.int32)
        yield Encoded(ids, _text_reader(tokenizer, document.text, encoding, row) if keep_text else None)


def _text_reader(tokenizer: PreTrainedTokenizerBase, text: str, encoding: Any, row: int) -> Callable[[int, int], str]:
    """A function from a range of tokens to their text: a slice of the document if the tokenizer gives offsets."""
    if "offset_mapping" in encoding:
        offsets = encoding["offset_mapping"][row]

        def text_slice(first: int, last: int) -> str:
            spans = [span for span in offsets[first:last] if span[0] < span[1]]
            return text[min(s[0] for s in spans) : max(s[1] for s in spans)] if spans else ""

        return text_slice
    ids = encoding["input_ids"][row]
    return lambda first, last: str(tokenizer.decode(ids[first:last]))
