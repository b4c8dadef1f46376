"""All states of one width as a graph: each state points to the state it is derived from, and a stream is a path."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from torch import nn

from attlas.extract.capture.discovery.derivations import Derivation, derivations_of, gains_of
from attlas.extract.capture.discovery.states import State, states_of
from attlas.extract.capture.discovery.sublayers import Sublayer
from attlas.extract.capture.discovery.trace import Trace
from attlas.extract.capture.layout import HookPoint, Norm, Update


class Path(NamedTuple):
    """The states of a stream by their numbers, first to last, and the attention sublayers whose updates are added to it."""

    states: list[int]
    sublayers: list[Sublayer]


class StateGraph:
    """The states of one width and their derivations."""

    def __init__(self, trace: Trace, modules: Mapping[str, nn.Module], width: int) -> None:
        self.states: list[State] = states_of(trace, modules, width)
        self.derivations: list[Derivation | None] = derivations_of(
            self.states, self.number_of, gains_of(modules, width), trace.eps
        )

    @cached_property
    def number_of(self) -> dict[HookPoint, int]:
        """The number of the state at each point."""
        return {point: number for number, state in enumerate(self.states) for _, point in state.points}

    @cached_property
    def moment_of(self) -> dict[HookPoint, int]:
        return {point: when for state in self.states for when, point in state.points}

    def first_moment(self, update: Update) -> int:
        """When the state that is added first occurs."""
        return self.states[self.number_of[update.point]].first

    def paths(self, sublayers: Sequence[Sublayer]) -> Iterator[Path]:
        """Yield the path through most sublayers, then that through most of the remaining ones, until there is none.

        Updates around several layers at once are not part of a path.
        """
        merging = {number for number in range(len(self.states)) if self._merges_sublayers(number, sublayers)}
        remaining = list(sublayers)
        while remaining and self.states:
            states = self._path_to(self._best_end(remaining, merging), merging)
            on_path = [sublayer for number in states[1:] for sublayer in self.sublayers_at(number, remaining)]
            if not on_path:
                return
            yield Path(states, on_path)
            remaining = [sublayer for sublayer in remaining if sublayer not in on_path]

    def sublayers_at(self, number: int, sublayers: Sequence[Sublayer]) -> list[Sublayer]:
        """Return the sublayers that attend between x and the last update of a sum.

        If some of them have as many queries as the stream has states, the others belong to other streams.
        """
        derivation = self.derivations[number]
        if derivation is None or not derivation.updates:
            return []
        first = self.states[derivation.base].first
        last = max(self.first_moment(update) for update in derivation.updates)
        between = [sublayer for sublayer in sublayers if first < sublayer.moment < last]
        rows = len(self.states[number].tensor)
        return [s for s in between if s.call.batch * s.call.queries == rows] or between

    def readers(self, number: int, *, before: int | None = None) -> list[Norm]:
        """Return the norms that read a state, in order of time."""
        return [norm for when, norm in self.states[number].readers if before is None or when < before]

    def norm_to(self, number: int) -> Norm | None:
        """Return the norm that a state is the output of."""
        derivation = self.derivations[number]
        return None if derivation is None else derivation.norm

    def merged_sublayers(self, sublayers: Sequence[Sublayer]) -> list[list[Sublayer]]:
        """Return groups of attention sublayers that together have fewer updates than calls."""
        numbers = range(len(self.states))
        return [self.sublayers_at(n, sublayers) for n in numbers if self._merges_sublayers(n, sublayers)]

    def _merges_sublayers(self, number: int, sublayers: Sequence[Sublayer]) -> bool:
        derivation = self.derivations[number]
        return derivation is not None and len(self.sublayers_at(number, sublayers)) > max(1, len(derivation.updates))

    def _best_end(self, sublayers: Sequence[Sublayer], merging: Collection[int]) -> int:
        """The end of the path with most sublayers, and of those with most sums."""
        scores: list[tuple[int, int]] = []
        for number, derivation in enumerate(self.derivations):
            if derivation is None or number in merging:
                scores.append((0, 0))
                continue
            count, sums = scores[derivation.base]
            scores.append((count + len(self.sublayers_at(number, sublayers)), sums + bool(derivation.updates)))
        return max(range(len(scores)), key=lambda number: (scores[number], -number))

    def _path_to(self, end: int, merging: Collection[int]) -> list[int]:
        path = [end]
        while (derivation := self.derivations[path[-1]]) is not None and path[-1] not in merging:
            path.append(derivation.base)
        return path[::-1]
