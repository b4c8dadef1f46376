"""The Triton engine: fused kernels that compute the output and the row quantities on a GPU.

Two passes over the tiles of a pattern, each with its own products of queries and keys, so that nothing of a pattern's size
is stored. The first goes along rows, as flash attention does: an online softmax, with every row quantity beside it
(`rows`). Sums over rows need each row's final maximum and normaliser, so the second goes down columns of tiles
(`columns`).

Most tiles are whole: every row sees every key, and all keys are on one side of the rows. They are computed without masks.
Tiles in which no row sees anything are skipped. Scores are products in the model's own type, summed in float32. The
reference engine does what this one does not support (float64, heads wider than 256, cross-attention).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.extract.engines import sums
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.profiles import OFFSET_BINS, PROFILE_COLUMNS
from attlas.extract.engines.quantities import TOKEN_CLASSES, Fact, known_quantities
from attlas.extract.engines.rows import AttentionCall, Rows, ScoredCall
from attlas.extract.engines.sums import HeadSums, head_quantity
from attlas.extract.engines.triton import heads as of_heads
from attlas.extract.engines.triton import rows as of_rows
from attlas.extract.engines.triton.columns import BINS, DIAGONALS, along_columns
from attlas.extract.engines.triton.launch import launch
from attlas.extract.engines.triton.rows import along_rows
from attlas.extract.engines.triton.short import whole_patterns

_KEY_QUANTITIES = ("received", "value_norm")
_LOOKED_UP = ("same_token", "induction")
MAKES = frozenset({*of_rows.QUANTITIES, *_KEY_QUANTITIES, "offset_bins", *_LOOKED_UP} - {"top", "part"})
_OF_WRITES = frozenset({"output_norm", "value_norm"})
_HEAD_QUANTITIES_OF_WRITES = ("output_norm", "written", "written_first")
_MIN_COLUMNS = 16  # of a product of tiles
_MAX_WIDTH = 256  # of heads that the blocks below support
_MAX_WRITE_WIDTH = 64  # in float32; of wider ones norms of writes are left to the reference engine
_ROWS_OF_SUMS = 32  # rows that a program for head sums, which is one warp, takes together
_SUMMING_PROGRAMS = 1024  # enough to keep a GPU busy, if each has 128 rows or more
_LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    """Sizes: rows and keys of a tile, widths of scores and of contexts in one product, warps and stages.

    `tile`: rows and keys of a tile in the pass along columns, with its own warps and stages; rows are a multiple of it.
    `short`: the most tokens of a sequence that one tile holds.
    """

    rows: int
    keys: int
    chunk: int
    part: int
    warps: int
    stages: int
    tile: int
    tile_warps: int
    tile_stages: int
    short: int = 128
    registers: int | None = None
    tile_registers: int | None = None


# by bytes per number and padded width, for the registers (255 per thread) and shared memory (227 KiB) of an H100 or
# H200. Products of 16-bit tiles have one shape, as wide as the keys, so that the compiler keeps rows in one layout;
# float32 has no tensor cores, and its products keep a chunk of both tiles in registers.
_BLOCKS = {
    (2, 32): Blocks(128, 64, 32, 32, 8, 3, 64, 4, 3),
    (2, 64): Blocks(128, 64, 64, 64, 8, 3, 64, 4, 3),
    (2, 128): Blocks(128, 64, 128, 128, 8, 2, 64, 4, 2),
    (2, 256): Blocks(64, 32, 256, 32, 8, 2, 64, 8, 2, 0),
    (4, 32): Blocks(64, 32, 16, 32, 8, 2, 64, 8, 2, 0),
    (4, 64): Blocks(64, 32, 16, 64, 8, 2, 64, 8, 2, 0),
    (4, 128): Blocks(64, 16, 16, 64, 8, 2, 64, 8, 2, 0),
    (4, 256): Blocks(32, 32, 16, 64, 8, 2, 32, 8, 2, 0),
}


def takes(call: AttentionCall | ScoredCall) -> bool:
    """Whether the engine supports a call: self-attention that the model has not computed, in float32 or less, and not too wide."""
    if isinstance(call, ScoredCall) or call.visibility.is_cross_attention:
        return False
    widest, size = max(call.query.shape[-1], call.value.shape[-1]), call.query.element_size()
    return size <= 4 and widest <= _MAX_WIDTH and call.scale > 0


def attend(call: AttentionCall, call_original: Callable[[], Tensor]) -> tuple[Tensor, Rows]:
    """Output and row quantities of one attention call; if a row is not measured, the output is the model's own."""
    widest, size = max(call.query.shape[-1], call.value.shape[-1]), call.query.element_size()
    return attend_in_blocks(call, call_original, _BLOCKS[size, max(32, triton.next_power_of_2(widest))])


def attend_in_blocks(call: AttentionCall, call_original: Callable[[], Tensor], blocks: Blocks) -> tuple[Tensor, Rows]:
    """`attend` with tiles of these sizes."""
    query, key, value = call.query, call.key, call.value
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    seen = call.visibility
    batch, heads, tokens, width = query.shape
    key_heads, value_width = value.shape[1], value.shape[-1]
    write, write_rest = _write_factors(call)
    is_short = tokens <= blocks.short
    tile = max(_MIN_COLUMNS, triton.next_power_of_2(tokens)) if is_short else blocks.tile
    places = _places(batch, heads, tokens, tile, 0 if is_short else DIAGONALS.value)
    results = Results(
        query.new_empty(places.end, dtype=torch.float32),
        (batch, heads, tokens),
        places,
        has_sink=call.sinks is not None,
        has_write=write is not None,
        has_ids=call.token_ids is not None,
    )
    output = query.new_empty(batch, tokens, heads, value_width)
    unmeasured = query.new_zeros(1, dtype=torch.int32) if call.unmeasured is None else call.unmeasured
    natural = call.softcap is not None or seen.bias is not None
    allowed = None if seen.allowed is None else seen.allowed.view(torch.int8)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *_steps(seen.ends))
    pairs = (*_strides_of(allowed), *_strides_of(seen.bias))
    scoring = (_LOG2_E if natural else call.scale * _LOG2_E, call.scale, call.softcap)
    constants = _constants(heads // key_heads, width, value_width, tile, blocks)
    if is_short:
        launch(
            whole_patterns,
            (batch * heads, 1, 1),
            (
                *(query, key, value, output, seen.ends, seen.keys.start, seen.keys.length, results.slab, unmeasured),
                *(call.sinks, write, write_rest, call.token_ids, allowed, seen.bias),
            ),
            (*strides, *pairs, *places[:3], batch, heads, tokens, *scoring),
            constants,
            num_warps=8 if tile > 64 else 4,
        )
        return _finished(call, call_original, output, results, unmeasured)
    launch(
        along_rows,
        (batch * heads * -(-tokens // blocks.rows), 1, 1),
        (
            *(query, key, value, output, seen.ends, seen.keys.start, seen.keys.length, results.slab, unmeasured),
            *(call.sinks, write, write_rest, allowed, seen.bias),
        ),
        (*strides, *pairs, places.spans, batch, heads, tokens, *scoring),
        (*constants, blocks.rows, blocks.keys),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        maxnreg=blocks.registers,
    )
    launch(
        along_columns,
        (batch * heads * places.lines, 1, 1),
        (
            *(query, key, value, seen.ends, seen.keys.start, seen.keys.length, results.slab),
            *(write, write_rest, call.token_ids, allowed, seen.bias),
        ),
        (
            *(*strides, *pairs, places.of_keys, places.bins, places.looked_up, places.spans),
            *(batch, heads, tokens, *scoring),
        ),
        constants,
        num_warps=blocks.tile_warps,
        num_stages=blocks.tile_stages,
        maxnreg=blocks.tile_registers,
    )
    return _finished(call, call_original, output, results, unmeasured)


def _finished(
    call: AttentionCall, call_original: Callable[[], Tensor], output: Tensor, results: Results, unmeasured: Tensor
) -> tuple[Tensor, Rows]:
    rows = KernelRows(results, _made_of(call.facts, results.has_write))
    if call.unmeasured is None and bool(unmeasured):  # waits for the device
        return call_original(), rows
    return output.transpose(1, 2), rows


@cache
def _constants(per_key_head: int, width: int, value_width: int, tile: int, blocks: Blocks) -> tuple[int, ...]:
    chunk = min(blocks.chunk, max(_MIN_COLUMNS, triton.next_power_of_2(width)))
    return per_key_head, width, chunk, value_width, blocks.part, triton.cdiv(value_width, blocks.part), tile


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
def _places(batch: int, heads: int, tokens: int, tile: int, diagonals: int) -> Places:
    every, tiles = batch * heads, -(-tokens // tile)
    lines = tiles + diagonals
    of_keys = len(of_rows.QUANTITIES) * every * tokens
    bins = of_keys + len(_KEY_QUANTITIES) * every * tokens
    looked_up = bins + every * lines * BINS.value
    spans = looked_up + every * tiles * len(_LOOKED_UP)
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
        if name in _KEY_QUANTITIES:
            return self._array(self.places.of_keys + _KEY_QUANTITIES.index(name) * self._plane, self.shape[2])
        if name == "offset_bins":
            return self._array(self.places.bins, self.places.lines, BINS.value).sum(2)[..., :OFFSET_BINS]
        return self._array(self.places.looked_up, self.places.tiles, len(_LOOKED_UP))[..., _LOOKED_UP.index(name)].sum(
            -1
        )

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
    def measured(self) -> Bool[Tensor, "batch head query"]:
        return self.results.of_row("part") > 0

    def lacks(self, names: frozenset[str]) -> frozenset[str]:
        return names - self.names - self.quantities.others.keys()

    def only(self, names: frozenset[str]) -> KernelRows:
        if not self.quantities.others and self.names <= names:
            return self
        others = {name: values for name, values in self.quantities.others.items() if name in names}
        return KernelRows(self.results, self.names & names, others)

    def with_quantities(self, others: Mapping[str, Tensor]) -> KernelRows:
        return KernelRows(self.results, self.names, {**self.quantities.others, **others})

    if TYPE_CHECKING:
        results: Results
        names: frozenset[str]
        quantities: _Quantities


@cache
def _made_of(facts: frozenset[Fact], has_write: bool) -> frozenset[str]:
    """The row quantities that the kernels make of a call with these facts, with norms of writes or without."""
    return known_quantities(MAKES, facts) - (frozenset() if has_write else _OF_WRITES)


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


def head_sums(o: HeadObservation, names: Sequence[str], *, profiles: bool) -> HeadSums:
    """The named head quantities and the profiles of an observation; of a mask with holes, they are computed in torch."""
    rows, seen = o.rows, o.visibility
    if not isinstance(rows, KernelRows) or seen.allowed is not None:
        return sums.head_sums(o, names, profiles=profiles)
    made = rows.results
    batch, heads, tokens = made.shape
    of = _Asked(tuple(names), made.has_sink, made.has_write, made.has_ids, o.classes is not None)
    values = made.slab.new_empty(len(of.names), batch, heads, dtype=torch.float64)
    parts, part_rows = _parts(batch * heads, tokens)
    of_parts = made.slab.new_empty(batch, heads, parts, of_heads.VALUES, dtype=torch.float64) if parts > 1 else None
    in_bins = made.slab.new_empty(batch * parts, 2, heads, len(PROFILE_COLUMNS)) if profiles else None
    places, ends, axis = _sum_places(of, values.device), seen.ends, seen.keys
    sizes = (*made.places[:3], batch, heads, tokens, made.places.lines, made.places.tiles, parts)
    has = (made.has_sink, made.has_write, made.has_ids)
    launch(
        of_heads.sum_rows_and_keys,
        (batch * heads, parts, 1),
        (made.slab, ends, axis.start, axis.length, o.classes, places, of_parts, values, in_bins),
        (*_steps(ends), *sizes, part_rows),
        (*has, _ROWS_OF_SUMS),
        num_warps=1,
    )
    if of_parts is not None:
        launch(
            of_heads.finish_head,
            (batch * heads, 1, 1),
            (made.slab, axis.start, axis.length, places, of_parts, values),
            sizes,
            has,
            num_warps=1,
        )
    for place, name in _others(of):
        quantity = head_quantity(name)
        values[place] = quantity.compute(o) if quantity.is_known(o) else torch.nan
    return HeadSums(values, in_bins)


class _Asked(NamedTuple):
    """Names of head quantities that are asked for, and what the call has."""

    names: tuple[str, ...]
    has_sink: bool
    has_write: bool
    has_ids: bool
    has_classes: bool


@cache
def _parts(heads: int, tokens: int) -> tuple[int, int]:
    """Into how many parts the rows of each head are divided to be summed, and the rows of a part."""
    parts = max(1, min(_SUMMING_PROGRAMS // heads, tokens // 128))
    rows = -(-tokens // parts // _ROWS_OF_SUMS) * _ROWS_OF_SUMS
    return -(-tokens // rows), rows


@cache
def _sum_places(of: _Asked, device: torch.device) -> Tensor:
    """Where the kernel writes each quantity that it makes: twice its place among the names, plus 1 if it is not known."""
    unknown = {*(() if of.has_sink else ("sink",)), *(() if of.has_ids else _LOOKED_UP)}
    unknown |= set() if of.has_classes else {*TOKEN_CLASSES}
    others = {name for _, name in _others(of)}
    place_of = {name: 2 * place + (name in unknown) for place, name in enumerate(of.names) if name not in others}
    places = [place_of.get(name, -1) for name in of_heads.MADE]
    return torch.tensor(places + [-1] * (of_heads.VALUES - len(places)), dtype=torch.int32, device=device)


@cache
def _others(of: _Asked) -> tuple[tuple[int, str], ...]:
    """Head quantities that the kernel does not make, and their places among the names."""
    made = {*of_heads.MADE} - (set() if of.has_write else {*_HEAD_QUANTITIES_OF_WRITES})
    return tuple((place, name) for place, name in enumerate(of.names) if name not in made)


def _steps(ends: Tensor) -> tuple[int, int, int]:
    """Strides of the ends of visible keys over sequences and heads, 0 where all share them; and from first to last."""
    _, batch, heads, _ = ends.shape
    plane, of_batch, of_head, _ = ends.stride()
    return 0 if batch == 1 else of_batch, 0 if heads == 1 else of_head, plane


def _strides_of(pairs: Tensor | None) -> tuple[int, ...]:
    """Strides of a tensor over pairs; 0 for a dimension that is broadcast."""
    if pairs is None:
        return (0, 0, 0, 0)
    return tuple(0 if n == 1 else s for n, s in zip(pairs.shape, pairs.stride(), strict=True))


def _write_factors(call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    """R in the type of the call, and what that type leaves of it."""
    write, dtype = call.write, call.query.dtype
    if write is None or (dtype == torch.float32 and write.shape[-1] > _MAX_WRITE_WIDTH):
        return None, None
    if dtype == torch.float32:
        return write, None
    kept = _SPLIT_FACTORS.get(id(write))
    if kept is None or kept[0]() is not write or kept[1].dtype != dtype:
        near = write.to(dtype)
        # a factor is kept as long as its model; what it is split into goes with it
        forget = partial(_SPLIT_FACTORS.pop, id(write), None)
        kept = _SPLIT_FACTORS[id(write)] = (weakref.ref(write, lambda _: forget()), near, (write - near).to(dtype))
    return kept[1], kept[2]


_SPLIT_FACTORS: dict[int, tuple[weakref.ref[Tensor], Tensor, Tensor]] = {}
