"""Timing of two sides, ours and theirs, alternately on one machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Result:
    """The results of both sides. `paired` are ratios of neighbouring runs, whose spread is the noise."""

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
    """A benchmark: its name and a function of the number of repeats; `by_name_only` for those that take minutes."""

    name: str
    measure: Callable[[int], Result]
    repeats: int
    by_name_only: bool = False


@dataclass(frozen=True)
class Seconds:
    """Run times of both sides, in pairs."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    def rates(self, amount: float, unit: str) -> Result:
        """Amount per second in the fastest, least disturbed run of each side, and the paired ratios."""
        paired = tuple(b / a for a, b in zip(self.ours, self.theirs, strict=True))
        return Result(amount / min(self.ours), amount / min(self.theirs), unit, paired)


def time_alternately(ours: Callable[[], object], theirs: Callable[[], object], *, repeats: int) -> Seconds:
    """Time two functions alternately in this process."""
    return alternate(partial(time_call, ours), partial(time_call, theirs), repeats=repeats)


def alternate(ours: Callable[[], float], theirs: Callable[[], float], *, repeats: int) -> Seconds:
    """Run two functions that return their own seconds; which goes first alternates, so that neither always runs on warm
    caches of the other."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds[side].append((ours, theirs)[side]())
    return Seconds(tuple(seconds[0]), tuple(seconds[1]))


def time_call(side: Callable[[], object]) -> float:
    gc.collect()  # of the other side; meanwhile its threads go to sleep
    start = time.perf_counter()
    side()
    return time.perf_counter() - start
