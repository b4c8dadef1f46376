"""The documents of a generated corpus in the ids of a model's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from attlas.extract.corpus.generated import RANDOM_REPEATS, Generation, IdDocument
from attlas.extract.corpus.needle import longest_needle_document, needle_documents
from attlas.extract.corpus.random_repeats import random_repeats
from attlas.extract.errors import Refusal
from attlas.extract.model.special_tokens import special_tokens
from attlas.extract.model.vocabulary import special_ids, vocabulary_entries

# names of places that vocabularies keep free: [unused12], <|reserved_special_token_3|>, madeupword0001
_UNUSED = re.compile(r"[\[<|]+(unused|reserved)\w*[\]>|]+|madeupword\d+", re.IGNORECASE)


def id_documents(generation: Generation, tokenizer: Any) -> Iterator[IdDocument]:
    """The documents of a generated corpus. Raises Refusal if the vocabulary does not suffice."""
    if generation.corpus == RANDOM_REPEATS:
        return random_repeats(generation, ordinary_ids(tokenizer))
    return needle_documents(generation, encoder_within_text(tokenizer), unknown=tokenizer.unk_token_id)


def longest_sequence(generation: Generation, tokenizer: Any, *, limit: int | None) -> int:
    """The tokens of the longest sequence, special ones included. Raises Refusal if the model takes fewer."""
    special = special_tokens(tokenizer).count
    if generation.corpus == RANDOM_REPEATS:
        longest, per_length = 2 * generation.length + special, 2
    else:
        encode = encoder_within_text(tokenizer)
        longest = special + longest_needle_document(generation, encode, unknown=tokenizer.unk_token_id)
        per_length = 1
    if limit is not None and longest > limit:
        fitting = generation.length - -(-(longest - limit) // per_length)
        advice = f"use --length {fitting} or less" if fitting > 0 else "use a model with more"
        raise Refusal(
            f"a sequence of {generation.corpus} must fit the model; with --length {generation.length} the longest has "
            f"{longest} tokens, this model {limit} positions; {advice}"
        )
    return longest


def ordinary_ids(tokenizer: Any) -> Int[np.ndarray, " token"]:
    """The ids that may stand in a text, ascending: neither special nor added nor unused. Raises Refusal if there are none."""
    entries, vocabulary = vocabulary_entries(tokenizer), tokenizer.get_vocab()
    left_out = special_ids(tokenizer) | set(tokenizer.added_tokens_decoder)
    left_out |= {number for token, number in vocabulary.items() if _UNUSED.fullmatch(str(token))}
    ids = sorted(number for number in set(vocabulary.values()) - left_out if entries[number].text)
    if not ids:
        raise Refusal(
            "random-repeats needs a vocabulary with tokens of text; this tokenizer has special or added ones alone; use a "
            "model with another tokenizer"
        )
    return np.array(ids, np.int32)


def encoder_within_text(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function from a text to its ids as they are after other text.

    Where a token begins a word because of the space in it (GPT-2), the text gets a space before it, unless it begins with
    punctuation; other tokenizers encode it as it is.
    """
    entries = vocabulary_entries(tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def begins_word(ids: list[int]) -> bool:
        return bool(ids) and entries[ids[0]].begins_word

    if begins_word(encode("a")) or not begins_word(encode(" a")):
        return encode
    return lambda text: encode(f" {text}" if text[:1].isalnum() else text)
