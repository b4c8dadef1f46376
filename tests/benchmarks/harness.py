"""Two sides in turn on one machine, and what comes of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Result:
    """What both sides reached. `paired` are the ratios of neighbouring runs: their spread is the noise."""

    ours: float
    theirs: float
    unit: str
    paired: tuple[float, ...] = ()
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


@dataclass(frozen=True)
class Benchmark:
    """A name and what measures it, given how often; one that takes minutes waits until it is asked for by name."""

    name: str
    measure: Callable[[int], Result]
    repeats: int
    waits: bool = False


@dataclass(frozen=True)
class Seconds:
    """Run times of both sides, those of the same turn at the same place."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    def rates(self, amount: float, unit: str) -> Result:
        """Amount per second: the quickest run of each side, which is the least disturbed one, and the paired ratios."""
        paired = tuple(b / a for a, b in zip(self.ours, self.theirs, strict=True))
        return Result(amount / min(self.ours), amount / min(self.theirs), unit, paired)


def interleaved(ours: Callable[[], object], theirs: Callable[[], object], *, repeats: int) -> Seconds:
    """Time both in this process, turn by turn."""
    return in_turns(partial(seconds_of, ours), partial(seconds_of, theirs), repeats=repeats)


def in_turns(ours: Callable[[], float], theirs: Callable[[], float], *, repeats: int) -> Seconds:
    """Two sides that say themselves how many seconds they took; who goes first alternates, so that neither always runs
    on what the other left behind."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds[side].append((ours, theirs)[side]())
    return Seconds(tuple(seconds[0]), tuple(seconds[1]))


def seconds_of(side: Callable[[], object]) -> float:
    gc.collect()  # nobody pays for the other's garbage; meanwhile the other's threads go to sleep
    start = time.perf_counter()
    side()
    return time.perf_counter() - start
