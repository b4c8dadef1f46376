"""Corpora that are made by a seed, as token ids: `random-repeats` and `needle`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int8

from attlas.extract.errors import Refusal

RANDOM_REPEATS, NEEDLE = "random-repeats", "needle"
# documents, and tokens of a block or of a haystack, unless the user asks for others; of `needle` documents at each depth
_DEFAULTS: Mapping[str, tuple[int, int]] = {RANDOM_REPEATS: (64, 64), NEEDLE: (8, 256)}
_DEFAULT_DEPTHS = (0, 25, 50, 75, 100)
GENERATED = tuple(_DEFAULTS)

# what a token of a document may be marked as
IN_NEEDLE, IN_ANSWER = 1, 2


class IdDocument(NamedTuple):
    """A document of a generated corpus: its ids without special tokens, and a mark of each (0: none), if it has marks."""

    source: str
    ids: Int[np.ndarray, " token"]
    marks: Int8[np.ndarray, " token"] | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What is generated. The same values and the same tokenizer give the same documents, on any machine."""

    corpus: str
    seed: int
    blocks: int
    length: int
    depths: tuple[int, ...] = ()

    @property
    def documents(self) -> int:
        return self.blocks * max(1, len(self.depths))

    @property
    def recipe(self) -> dict[str, Any]:
        """The values that are part of a run's recipe."""
        depths = {"depths": list(self.depths)} if self.depths else {}
        return {"seed": self.seed, "blocks": self.blocks, "length": self.length, **depths}


def generation_of(
    corpus: str,
    *,
    seed: int | None = None,
    blocks: int | None = None,
    length: int | None = None,
    depths: str | Collection[int] | None = None,
) -> Generation | None:
    """The generation that these options ask for; None for a corpus that is read. Raises Refusal."""
    given = {"seed": seed, "blocks": blocks, "length": length, "depths": depths}
    names = [f"--{name}" for name, value in given.items() if value is not None]
    if corpus not in GENERATED:
        if names:
            raise Refusal(
                f"{', '.join(names)} can be asked of the corpora {' and '.join(GENERATED)}; this one is {corpus}; leave it out"
            )
        return None
    if depths is not None and corpus != NEEDLE:
        raise Refusal(f"--depths can be asked of the corpus {NEEDLE}; this one is {corpus}; leave it out")
    for name, value, lowest in (("seed", seed, 0), ("blocks", blocks, 1), ("length", length, 1)):
        if value is not None and value < lowest:
            raise Refusal(f"{name} must be at least {lowest}; got {value}; give a larger number")
    default_blocks, default_length = _DEFAULTS[corpus]
    return Generation(
        corpus=corpus,
        seed=0 if seed is None else seed,
        blocks=default_blocks if blocks is None else blocks,
        length=default_length if length is None else length,
        depths=_depths(depths) if corpus == NEEDLE else (),
    )


def _depths(depths: str | Collection[int] | None) -> tuple[int, ...]:
    """Depths in percent, from a text such as "0,50,100" or from numbers. Raises Refusal."""
    if depths is None:
        return _DEFAULT_DEPTHS
    values = depths.split(",") if isinstance(depths, str) else depths
    try:
        numbers = tuple(int(str(value).strip()) for value in values)
    except ValueError:
        numbers = ()
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= number <= 100 for number in numbers):
        raise Refusal(
            f"depths are different whole percentages from 0 to 100; got {depths!r}; write them as 0,25,50,75,100"
        )
    return numbers


class RandomStream:
    """Random whole numbers that depend on the seed and the document's number alone.

    Made from the raw 64-bit output of NumPy's PCG64, which NumPy keeps the same in all versions; the methods of its
    `Generator` are not promised to stay as they are.
    """

    def __init__(self, seed: int, document: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, document]))

    def below(self, limit: int) -> int:
        """A number from 0 to limit − 1, all equally likely: a raw number modulo the limit, the uneven rest drawn again."""
        even = (1 << 64) - (1 << 64) % limit
        while (raw := int(self._bits.random_raw())) >= even:
            pass
        return raw % limit

    def sample(self, limit: int, count: int) -> Iterator[int]:
        """Different numbers below the limit, in random order: the first steps of a Fisher–Yates shuffle."""
        moved: dict[int, int] = {}
        for place in range(count):
            other = place + self.below(limit - place)
            yield moved.get(other, other)
            moved[other] = moved.get(place, place)
