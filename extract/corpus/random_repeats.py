"""`random-repeats`: blocks of random tokens, each twice in a row.

The standard ground for induction and duplicate-token heads (Olsson 2022): the second copy can be predicted from the first,
and from nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from attlas.extract.corpus.generated import RANDOM_REPEATS, Generation, IdDocument, RandomStream


def random_repeats(generation: Generation, vocabulary: Int[np.ndarray, " token"]) -> Iterator[IdDocument]:
    """The documents: a block of ids of the vocabulary, and the same block again."""
    for number in range(generation.documents):
        block = random_block(RandomStream(generation.seed, number), vocabulary, generation.length)
        yield IdDocument(f"{RANDOM_REPEATS}:{number + 1}", np.tile(block, 2))


def random_block(stream: RandomStream, vocabulary: Int[np.ndarray, " token"], length: int) -> Int[np.ndarray, " block"]:
    """Ids drawn without repeats; beyond the size of the vocabulary each is drawn again only when all have been."""
    places: list[int] = []
    while len(places) < length:
        places += stream.sample(len(vocabulary), min(len(vocabulary), length - len(places)))
    return vocabulary[places].astype(np.int32)
