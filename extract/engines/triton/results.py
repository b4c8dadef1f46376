"""What the kernels write of one attention call, and the row quantities that are read from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from attlas.extract.engines.profiles import OFFSET_BINS
from attlas.extract.engines.rows import AttentionCall, ChosenRows, Rows, ScoredCall
from attlas.extract.engines.triton import rows as of_rows
from attlas.extract.engines.triton.columns import BINS

KEY_QUANTITIES = ("received", "value_norm")
LOOKED_UP = ("same_token", "induction")


class Places(NamedTuple):
    """Where arrays begin in the slab of a call, after the row quantities.

    `tiles` are those of a column, `lines` the programs along columns of a head: columns, and diagonals.
    """

    of_keys: int
    bins: int
    looked_up: int
    spans: int
    end: int
    lines: int
    tiles: int


@cache
def places_of(batch: int, heads: int, tokens: int, tile: int, diagonals: int) -> Places:
    every, tiles = batch * heads, -(-tokens // tile)
    lines = tiles + diagonals
    of_keys = len(of_rows.QUANTITIES) * every * tokens
    bins = of_keys + len(KEY_QUANTITIES) * every * tokens
    looked_up = bins + every * lines * BINS.value
    spans = looked_up + every * tiles * len(LOOKED_UP)
    return Places(of_keys, bins, looked_up, spans, spans + every * tiles * of_rows.SPAN.value, lines, tiles)


@dataclass(frozen=True)
class Results:
    """What the kernels write of one call, in one slab of float32; arrays are views of it."""

    slab: Float[Tensor, " number"]
    shape: tuple[int, int, int]  # batch, heads, tokens
    places: Places
    has_sink: bool
    has_write: bool
    has_ids: bool

    def of_row(self, name: str) -> Float[Tensor, "batch head query"]:
        return self._array(of_rows.QUANTITIES.index(name) * self._plane, self.shape[2])

    def quantity(self, name: str) -> Float[Tensor, "batch head *place"]:
        """The row quantity of this name."""
        if name in of_rows.QUANTITIES:
            return self.of_row(name)
        if name in KEY_QUANTITIES:
            return self._array(self.places.of_keys + KEY_QUANTITIES.index(name) * self._plane, self.shape[2])
        if name == "offset_bins":
            return self._array(self.places.bins, self.places.lines, BINS.value).sum(2)[..., :OFFSET_BINS]
        return self._array(self.places.looked_up, self.places.tiles, len(LOOKED_UP))[..., LOOKED_UP.index(name)].sum(-1)

    @property
    def _plane(self) -> int:
        return math.prod(self.shape)

    def _array(self, begin: int, *shape: int) -> Tensor:
        shape = (*self.shape[:2], *shape)
        return self.slab[begin : begin + math.prod(shape)].view(shape)


class KernelRows(Rows):
    """Row quantities as the kernels wrote them, each made when it is read, and others beside them."""

    def __init__(self, results: Results, names: frozenset[str], others: Mapping[str, Tensor] | None = None) -> None:
        vars(self).update(results=results, names=names, quantities=_Quantities(results, names, others or {}))

    @cached_property
    def measured(self) -> Bool[Tensor, "batch head query"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.results.of_row("part") > 0

    def lacks(self, names: frozenset[str]) -> frozenset[str]:
        return names - self.names - self.quantities.others.keys()

    def only(self, names: frozenset[str]) -> KernelRows:
        if not self.quantities.others and self.names <= names:
            return self
        others = {name: values for name, values in self.quantities.others.items() if name in names}
        return KernelRows(self.results, self.names & names, others)

    def chosen_rows(self, call: AttentionCall | ScoredCall, sequences: Tensor | None, most: int) -> ChosenRows:
        from attlas.extract.engines.triton.chosen import chosen_rows

        assert isinstance(call, AttentionCall), "the kernels take no other"
        return chosen_rows(call, self.results.slab, sequences, most)

    def with_quantities(self, others: Mapping[str, Tensor]) -> KernelRows:
        return KernelRows(self.results, self.names, {**self.quantities.others, **others})

    if TYPE_CHECKING:
        results: Results
        names: frozenset[str]
        quantities: _Quantities


class _Quantities(Mapping[str, Tensor]):
    """Row quantities by name: views of the kernels' results, and others."""

    def __init__(self, results: Results, names: frozenset[str], others: Mapping[str, Tensor]) -> None:
        self._results, self._names, self.others = results, names, others

    def __getitem__(self, name: str) -> Tensor:
        if name in self.others:
            return self.others[name]
        if name not in self._names:
            raise KeyError(name)
        return self._results.quantity(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names | self.others.keys())

    def __len__(self) -> int:
        return len(self._names | self.others.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._names or name in self.others
