"""`needle`: a sentence with a secret number hidden in filler, then a question and its answer (needle in a haystack).

The answer is in the input, too (teacher forcing): whatever the model would say, the tokens that read it are known. Number and
subject are random, so that no model knows the answer otherwise. Filler, needles and questions share no content words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from attlas.extract.corpus.generated import IN_ANSWER, IN_NEEDLE, NEEDLE, Generation, IdDocument, RandomStream
from attlas.extract.errors import Refusal

# a text's ids as they are in the middle of a text
Encode = Callable[[str], list[int]]

_ADJECTIVES = ["old", "small", "quiet", "tall", "young", "warm", "early", "narrow", "busy", "gentle", "round", "plain"]
_NOUNS = [
    "farmer",
    "teacher",
    "river",
    "garden",
    "bridge",
    "market",
    "horse",
    "window",
    "letter",
    "road",
    "kitchen",
    "tree",
    "boat",
    "doctor",
    "village",
]
_VERBS = ["watched", "followed", "found", "passed", "painted", "liked", "remembered", "left"]
_PLACES = ("in the morning", "near the station", "after the rain", "behind the house", "on the hill", "before dinner")
_COLOURS = ["green", "silver", "purple", "golden", "orange", "crimson", "white", "black"]
_THINGS = ["lantern", "violin", "compass", "anchor", "umbrella", "hammer", "mirror", "barrel", "helmet", "candle"]


class _Secret(NamedTuple):
    """The ids of the sentence that is hidden, of the question, and of the answer to it."""

    needle: list[int]
    question: list[int]
    answer: list[int]


def needle_documents(generation: Generation, encode: Encode, *, unknown: int | None) -> Iterator[IdDocument]:
    """The documents, one of each depth in turn. `unknown` is the id of what the vocabulary lacks. Raises Refusal."""
    depths = generation.depths
    for number in range(generation.documents):
        depth = depths[number % len(depths)]
        stream = RandomStream(generation.seed, number)
        secret = _secret(stream, encode, unknown)
        tokens = _filler_tokens(secret, generation.length)
        ids, marks = _hidden(secret, *_filler(stream, encode, tokens, depth))
        yield IdDocument(f"{NEEDLE}:{number + 1}:{depth}%", ids, marks)


def longest_needle_document(generation: Generation, encode: Encode, *, unknown: int | None) -> int:
    """The tokens of the longest document, which depend on its question and answer alone. Raises Refusal."""
    longest = 0
    for number in range(generation.documents):
        secret = _secret(RandomStream(generation.seed, number), encode, unknown)
        _filler_tokens(secret, generation.length)
        longest = max(longest, generation.length + len(secret.question) + len(secret.answer))
    return longest


def _secret(stream: RandomStream, encode: Encode, unknown: int | None) -> _Secret:
    subject = f"the secret number of the {_pick(stream, _COLOURS)} {_pick(stream, _THINGS)}"
    answer = encode(str(10_000 + stream.below(90_000)))
    needle = [*encode(f"T{subject[1:]} is"), *answer, *encode(".")]
    if not answer or unknown in needle:
        raise _unknown_words(f"T{subject[1:]} is …")
    return _Secret(needle, encode(f"What is {subject}? T{subject[1:]} is"), answer)


def _unknown_words(sentence: str) -> Refusal:
    return Refusal(
        f"the sentences of the corpus {NEEDLE} must consist of known tokens; this tokenizer has none for a part of "
        f"“{sentence}”; use a model with another tokenizer"
    )


def _filler_tokens(secret: _Secret, length: int) -> int:
    """The tokens of a haystack beside its needle. Raises Refusal if it can't hold the needle."""
    if len(secret.needle) > length:
        raise Refusal(
            f"a haystack must hold its needle of {len(secret.needle)} tokens; length is {length}; use a larger --length"
        )
    return length - len(secret.needle)


def _hidden(secret: _Secret, before: list[int], after: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the haystack, the question and the answer, and their marks."""
    parts = [(before, 0), (secret.needle, IN_NEEDLE), (after, 0), (secret.question, 0), (secret.answer, IN_ANSWER)]
    ids = np.array([i for part, _ in parts for i in part], np.int32)
    return ids, np.repeat(np.array([mark for _, mark in parts], np.int8), [len(part) for part, _ in parts])


def _filler(stream: RandomStream, encode: Encode, tokens: int, depth: int) -> tuple[list[int], list[int]]:
    """So many tokens of sentences, in two parts that meet at the end of the sentence that is nearest to the depth."""
    ids: list[int] = []
    ends = [0]
    while len(ids) < tokens:
        text = _sentence(stream)
        sentence = encode(text)
        if not sentence:
            raise _unknown_words(text)
        ids += sentence
        ends.append(min(len(ids), tokens))
    place = min(ends, key=lambda end: abs(100 * end - depth * tokens))
    return ids[:place], ids[place:tokens]


def _sentence(stream: RandomStream) -> str:
    subject, thing = (f"{_pick(stream, _ADJECTIVES)} {_pick(stream, _NOUNS)}" for _ in range(2))
    return f"The {subject} {_pick(stream, _VERBS)} the {thing} {_pick(stream, _PLACES)}."


def _pick(stream: RandomStream, words: tuple[str, ...] | list[str]) -> str:
    return words[stream.below(len(words))]
