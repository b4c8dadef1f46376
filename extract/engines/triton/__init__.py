"""The Triton engine: fused kernels that compute the output and the row quantities on a GPU.

Two passes over the tiles of a pattern, each with its own products of queries and keys, so that nothing of a pattern's size
is stored. The first goes along rows, as flash attention does: an online softmax, with every row quantity beside it
(`rows`). Sums over rows need each row's final maximum and normaliser, so the second goes down columns of tiles
(`columns`). A short sequence's pattern fits into one tile, and one pass does (`short`). What the kernels write of a call is
in one slab (`results`), from which head sums are made (`heads`, launched by `summing`). The residual stream has kernels of its
own (`residual`).

Most tiles are whole: every row sees every key, and all keys are on one side of the rows. They are computed without masks.
Tiles in which no row sees anything are skipped. Scores are products in the model's own type, summed in float32. The
reference engine does what this one does not support (float64, heads wider than 256, cross-attention).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from attlas.extract.engines.quantities import Fact, known_quantities
from attlas.extract.engines.rows import AttentionCall, Rows, ScoredCall
from attlas.extract.engines.triton import rows as of_rows
from attlas.extract.engines.triton.arguments import (
    MIN_COLUMNS,
    contiguous,
    pairs_of,
    rows_side_by_side,
    scoring_of,
    steps_of,
)
from attlas.extract.engines.triton.columns import DIAGONALS, along_columns
from attlas.extract.engines.triton.launch import launch, power_of_2_from
from attlas.extract.engines.triton.results import (
    KEY_QUANTITIES,
    LOOKED_UP,
    KernelRows,
    Results,
    places_of,
)
from attlas.extract.engines.triton.rows import along_rows
from attlas.extract.engines.triton.short import whole_patterns
from attlas.extract.engines.triton.summing import head_sums as head_sums

MAKES = frozenset({*of_rows.QUANTITIES, *KEY_QUANTITIES, "offset_bins", *LOOKED_UP} - {"top", "part"})
_OF_WRITES = frozenset({"output_norm", "value_norm"})
_MAX_WIDTH = 256  # of heads that the blocks below support
# by bytes per number; of wider heads, norms of writes are left to the reference engine: they would take too many registers
_MAX_WRITE_WIDTH = {2: 128, 4: 64}


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


# of the pass along rows, so that three blocks fit on a multiprocessor: 5 to 13 % faster on an H200 than without a limit. Triton
# 3.9 needs more, and would keep numbers of the inner loop in memory.
_REGISTERS = 168 if triton.__version__ < "3.7" else None
# by bytes per number and padded width, for the registers (255 per thread) and shared memory (227 KiB) of an H100 or
# H200. Products of 16-bit tiles have one shape, as wide as the keys, so that the compiler keeps rows in one layout;
# float32 has no tensor cores, and its products keep a chunk of both tiles in registers.
_BLOCKS = {
    (2, 32): Blocks(64, 64, 32, 32, 4, 2, 64, 4, 3, registers=_REGISTERS),
    (2, 64): Blocks(64, 64, 64, 64, 4, 2, 64, 4, 3, registers=_REGISTERS),
    (2, 128): Blocks(128, 64, 128, 128, 8, 2, 64, 4, 2),
    (2, 256): Blocks(128, 32, 256, 32, 8, 2, 64, 8, 2, 0),
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
    return attend_in_blocks(call, call_original, _BLOCKS[size, max(32, power_of_2_from(widest))])


def attend_in_blocks(call: AttentionCall, call_original: Callable[[], Tensor], blocks: Blocks) -> tuple[Tensor, Rows]:
    """`attend` with tiles of these sizes."""
    query, key, value = map(rows_side_by_side, (call.query, call.key, call.value))
    seen = call.visibility
    batch, heads, tokens, width = query.shape
    key_heads, value_width = value.shape[1], value.shape[-1]
    write, write_rest = _write_factors(call)
    is_short = tokens <= blocks.short
    tile = max(MIN_COLUMNS, power_of_2_from(tokens)) if is_short else blocks.tile
    places = places_of(batch, heads, tokens, tile, 0 if is_short else DIAGONALS.value)
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
    allowed, bias, pairs = pairs_of(seen)
    sinks, ids, start, length = map(contiguous, (call.sinks, call.token_ids, seen.keys.start, seen.keys.length))
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *steps_of(seen.ends))
    scoring = scoring_of(call)
    constants = _constants(heads // key_heads, width, value_width, tile, blocks)
    if is_short:
        launch(
            whole_patterns,
            (batch * heads, 1, 1),
            (
                *(query, key, value, output, seen.ends, start, length, results.slab, unmeasured),
                *(sinks, write, write_rest, ids, allowed, bias),
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
            *(query, key, value, output, seen.ends, start, length, results.slab, unmeasured),
            *(sinks, write, write_rest, allowed, bias),
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
            *(query, key, value, seen.ends, start, length, results.slab),
            *(write, write_rest, ids, allowed, bias),
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
    chunk = min(blocks.chunk, max(MIN_COLUMNS, power_of_2_from(width)))
    return per_key_head, width, chunk, value_width, blocks.part, -(-value_width // blocks.part), tile


@cache
def _made_of(facts: frozenset[Fact], has_write: bool) -> frozenset[str]:
    """The row quantities that the kernels make of a call with these facts, with norms of writes or without."""
    return known_quantities(MAKES, facts) - (frozenset() if has_write else _OF_WRITES)


def _write_factors(call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    """R in the type of the call, and what that type leaves of it."""
    write, dtype = call.write, call.query.dtype
    if write is None or write.shape[-1] > _MAX_WRITE_WIDTH[dtype.itemsize]:
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
