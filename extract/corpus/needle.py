"""`needle`: a sentence with a secret number hidden in filler, then a question and its answer (needle in a haystack).

The answer is in the input, too (teacher forcing): whatever the model would say, the tokens that read it are known. Number and
subject are random, so that no model knows the answer otherwise. Filler, needles and questions share no content words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

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


def needle_documents(generation: Generation, encode: Encode, *, unknown: int | None) -> Iterator[IdDocument]:
    """The documents, one of each depth in turn. `unknown` is the id of what the vocabulary lacks. Raises Refusal."""
    depths = generation.depths
    for number in range(generation.documents):
        depth = depths[number % len(depths)]
        stream = RandomStream(generation.seed, number)
        yield _document(f"{NEEDLE}:{number + 1}:{depth}%", stream, encode, generation.length, depth, unknown)


def _document(
    source: str, stream: RandomStream, encode: Encode, length: int, depth: int, unknown: int | None
) -> IdDocument:
    subject = f"the secret number of the {_pick(stream, _COLOURS)} {_pick(stream, _THINGS)}"
    answer = encode(str(10_000 + stream.below(90_000)))
    needle = [*encode(f"T{subject[1:]} is"), *answer, *encode(".")]
    if not answer or unknown in needle:
        raise Refusal(
            f"the sentences of the corpus {NEEDLE} must consist of known tokens; this tokenizer has none for a part of "
            f"“T{subject[1:]} is …”; use a model with another tokenizer"
        )
    if len(needle) > length:
        raise Refusal(
            f"a haystack must hold its needle of {len(needle)} tokens; length is {length}; use a larger --length"
        )
    before, after = _filler(stream, encode, length - len(needle), depth)
    question = encode(f"What is {subject}? T{subject[1:]} is")
    parts = [(before, 0), (needle, IN_NEEDLE), (after, 0), (question, 0), (answer, IN_ANSWER)]
    ids = np.array([i for part, _ in parts for i in part], np.int32)
    marks = np.repeat(np.array([mark for _, mark in parts], np.int8), [len(part) for part, _ in parts])
    return IdDocument(source, ids, marks)


def _filler(stream: RandomStream, encode: Encode, tokens: int, depth: int) -> tuple[list[int], list[int]]:
    """So many tokens of sentences, in two parts that meet at the end of the sentence that is nearest to the depth."""
    sentences: list[list[int]] = []
    while sum(map(len, sentences)) < tokens:
        sentences.append(encode(_sentence(stream)))
    ids = [i for sentence in sentences for i in sentence][:tokens]
    ends = [min(end, tokens) for end in accumulate(map(len, sentences), initial=0)]
    place = min(ends, key=lambda end: abs(100 * end - depth * tokens))
    return ids[:place], ids[place:]


def _sentence(stream: RandomStream) -> str:
    subject, thing = (f"{_pick(stream, _ADJECTIVES)} {_pick(stream, _NOUNS)}" for _ in range(2))
    return f"The {subject} {_pick(stream, _VERBS)} the {thing} {_pick(stream, _PLACES)}."


def _pick(stream: RandomStream, words: tuple[str, ...] | list[str]) -> str:
    return words[stream.below(len(words))]
