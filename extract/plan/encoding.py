"""Texts to token ids, by a tokenizer that may be damaged or made to fail: its errors and hours become refusals."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from attlas.extract.corpus import Document
from attlas.extract.errors import Refusal, first_line
from attlas.extract.plan.spool import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# tokenizers read 10⁵ characters a second at least, also those that are written in Python
_SECONDS = 120
_CHARACTERS_PER_SECOND = 2_000


def encode(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Document], keep_text: bool) -> Iterator[Encoded | None]:
    """The token ids of each document; None for a dropped one. Raises Refusal if the tokenizer fails or takes hours."""
    read = [document for document in batch if document.dropped_reason is None]
    encoding = _encoding(tokenizer, read, keep_text) if read else {}
    rows = iter(range(len(read)))
    for document in batch:
        if document.dropped_reason is not None:
            yield None
            continue
        row = next(rows)
        ids = np.array(encoding["input_ids"][row], np.int32)
        yield Encoded(ids, _text_reader(tokenizer, document.text, encoding, row) if keep_text else None)


def _encoding(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], keep_text: bool) -> Any:
    # tokenizers written in Python have no offsets
    options: dict[str, Any] = {"return_offsets_mapping": True} if keep_text and tokenizer.is_fast else {}

    def call(texts: Sequence[Document]) -> Any:
        return tokenizer(
            [document.text for document in texts],
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning that a text is too long for the model: it is cut into windows
            **options,
        )

    limit_s = _SECONDS + sum(len(document.text) for document in documents) / _CHARACTERS_PER_SECOND
    try:
        return _within(limit_s, partial(call, documents))
    except TimeoutError:
        more = f" and {len(documents) - 1:,} more" if len(documents) > 1 else ""
        raise Refusal(
            f"a tokenizer reads {_CHARACTERS_PER_SECOND:,} characters a second at least; this one has been reading "
            f"{documents[0].source}{more} for {limit_s:,.0f} s; repair it, or take another model"
        ) from None
    except _Failure:
        for document in documents:  # to name the one at fault
            try:
                _within(limit_s, partial(call, [document]))
            except _Failure as failure:
                raise Refusal(
                    f"a tokenizer reads any text; this one fails at {document.source} ({failure}); repair it, or take the document "
                    "out of the corpus"
                ) from failure
        raise


class _Failure(Exception):
    """What a tokenizer raised; of those written in Rust it may be no Exception."""


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call, in a thread of its own so that Ctrl-C is heard. Raises TimeoutError, and then leaves the thread behind."""
    outcome: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="attlas-tokenizer", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if not errors:
        return outcome[0]
    if isinstance(errors[0], MemoryError):
        raise errors[0]
    raise _Failure(f"{type(errors[0]).__name__}: {first_line(errors[0])}") from errors[0]


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
