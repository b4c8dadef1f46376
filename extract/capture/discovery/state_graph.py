"""The paths that a residual stream takes through the states of one width."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from torch import nn

from attlas.extract.capture.discovery.derivations import Step, gains_of, steps_of
from attlas.extract.capture.discovery.states import State, states_of
from attlas.extract.capture.discovery.sublayers import Member
from attlas.extract.capture.discovery.trace import Trace
from attlas.extract.capture.layout import Norm, Tap


class Path(NamedTuple):
    """States of a stream, first to last, and the attention calls whose updates are added on the way."""

    states: list[int]
    members: list[Member]


class Streams:
    """All states of one width, and how they came about."""

    def __init__(self, trace: Trace, modules: Mapping[str, nn.Module], width: int) -> None:
        self.states: list[State] = states_of(trace, modules, width)
        self.steps: list[Step | None] = steps_of(self.states, gains_of(modules, width), trace.rounding)

    @cached_property
    def number_of(self) -> dict[Tap, int]:
        return {tap: number for number, state in enumerate(self.states) for _, tap in state.taps}

    @cached_property
    def moment_of(self) -> dict[Tap, int]:
        return {tap: when for state in self.states for when, tap in state.taps}

    def paths(self, members: Sequence[Member]) -> Iterator[Path]:
        """The path through most calls, then that through most of those it leaves out, until none is found.

        What is added around several layers at once is no step of their stream.
        """
        bundles = {number for number in range(len(self.steps)) if self._is_bundle(number, members)}
        left = list(members)
        while left and self.states:
            states = self._path_to(self._end(left, bundles), bundles)
            inside = [member for number in states[1:] for member in self.inside(number, left)]
            if not inside:
                return
            yield Path(states, inside)
            left = [member for member in left if member not in inside]

    def inside(self, number: int, members: Sequence[Member]) -> list[Member]:
        """The attention calls made between x and what is added to it, where a state is a sum.

        Those of other streams are left out, where this one has a call of just as many tokens as it has states.
        """
        step = self.steps[number]
        if step is None or not step.updates:
            return []
        first, last = self.states[step.base].first, max(self.states[u.state].first for u in step.updates)
        between = [member for member in members if first < member.moment < last]
        rows = len(self.states[number].tensor)
        return [m for m in between if m.call.batch * m.call.queries == rows] or between

    def readers(self, number: int, *, before: int | None = None) -> list[Norm]:
        """The norms that read a state, in the order of time."""
        return [norm for when, norm in self.states[number].readers if before is None or when < before]

    def norm_to(self, number: int) -> Norm | None:
        """The norm that made a state, on its way from another."""
        step = self.steps[number]
        return None if step is None else step.norm

    def bundles(self, members: Sequence[Member]) -> list[list[Member]]:
        """Attention calls that have fewer updates than they are."""
        return [self.inside(n, members) for n in range(len(self.steps)) if self._is_bundle(n, members)]

    def _is_bundle(self, number: int, members: Sequence[Member]) -> bool:
        step = self.steps[number]
        return step is not None and len(self.inside(number, members)) > max(1, len(step.updates))

    def _end(self, members: Sequence[Member], bundles: Collection[int]) -> int:
        """The end of the path on which most calls are added, and of those with most sums."""
        scores: list[tuple[int, int]] = []
        for number, step in enumerate(self.steps):
            if step is None or number in bundles:
                scores.append((0, 0))
                continue
            calls, sums = scores[step.base]
            scores.append((calls + len(self.inside(number, members)), sums + bool(step.updates)))
        return max(range(len(scores)), key=lambda number: (scores[number], -number))

    def _path_to(self, end: int, bundles: Collection[int]) -> list[int]:
        found = [end]
        while (step := self.steps[found[-1]]) is not None and found[-1] not in bundles:
            found.append(step.base)
        return found[::-1]
