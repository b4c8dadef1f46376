"""Some rows of a call's pattern, from what the kernels have written of these rows; and entropies of mixtures of heads."""

# kernels are Triton's language, which only looks like Python to a type checker
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from attlas.extract.engines.block import TINY
from attlas.extract.engines.rows import ChosenRows
from attlas.extract.engines.triton.arguments import (
    MIN_COLUMNS,
    contiguous,
    pairs_of,
    rows_side_by_side,
    scoring_of,
    steps_of,
)
from attlas.extract.engines.triton.launch import launch, power_of_2_from
from attlas.extract.engines.triton.rows import PART, QUANTITIES, TOP
from attlas.extract.engines.triton.tiles import masked_weights

if TYPE_CHECKING:
    from torch import Tensor

    from attlas.extract.engines.rows import AttentionCall

_SINK = tl.constexpr(QUANTITIES.index("sink"))
_LEAST_SHARE = tl.constexpr(TINY)
_KEYS = 64  # of a tile
_LARGEST_CHUNK = 64  # of the width of heads in one product
_MIXED_AT_ONCE = 4  # heads of a program
_MIXED_TILE = 2048  # numbers of the other heads that a program reads at a time


def chosen_rows(call: AttentionCall, slab: Tensor, sequences: Tensor | None, most: int) -> ChosenRows:
    """At most so many evenly spaced rows of each of these sequences of a call; None: of all. A sequence without more has all.

    slab: what the kernels have written of the call.
    """
    batch, heads, tokens, width = call.query.shape
    has_sink = call.sinks is not None
    query, key = map(rows_side_by_side, (call.query, call.key))
    seen = call.visibility
    number = batch if sequences is None else len(sequences)
    rows, keys = min(most, tokens), tokens + has_sink
    patterns = slab.new_empty(number, heads, rows, keys)
    measured = patterns.new_empty(number, heads, rows, dtype=torch.int8)
    start, length, sequences = map(contiguous, (seen.keys.start, seen.keys.length, sequences))
    allowed, bias, pair_strides = pairs_of(seen)
    launch(
        patterns_of_rows,
        (number * heads, -(-tokens // _KEYS), 1),
        (query, key, seen.ends, start, length, slab, sequences, patterns, measured, allowed, bias),
        (
            *(*query.stride()[:3], *key.stride()[:3], *steps_of(seen.ends)),
            *(*pair_strides, batch, heads, tokens, rows, keys, most, *scoring_of(call)),
        ),
        (
            heads // key.shape[1],
            width,
            min(_LARGEST_CHUNK, max(MIN_COLUMNS, power_of_2_from(width))),
            max(MIN_COLUMNS, power_of_2_from(rows)),
            _KEYS,
            has_sink,
        ),
        num_warps=4,
    )
    return ChosenRows(patterns, measured.view(torch.bool), mixed_entropies(patterns))


def mixed_entropies(patterns: Tensor) -> Tensor:
    """`mixed` of ChosenRows, of patterns [sequence, head, row, key]."""
    sequences, heads, rows, keys = patterns.shape
    mixed = patterns.new_empty(sequences, rows, heads, heads)
    others = power_of_2_from(heads)
    launch(
        mix_heads,
        (sequences * rows, -(-heads // _MIXED_AT_ONCE), 1),
        (patterns, mixed),
        (heads, rows, keys),
        (others, max(16, _MIXED_TILE // others), _MIXED_AT_ONCE),
        num_warps=4,
    )
    return mixed


@triton.jit(do_not_specialize=["batch", "heads", "tokens", "row_count", "key_count", "most"])
def patterns_of_rows(
    query, key, bounds, start, length, slab, sequences, patterns, measured, allowed, bias,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    bounds_batch, bounds_head, bounds_plane,
    allowed_batch, allowed_head, allowed_row, allowed_key,
    bias_batch, bias_head, bias_row, bias_key,
    batch, heads, tokens, row_count, key_count, most, unit, scale, softcap,
    PER_KEY_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """The chosen rows of one head of one sequence, over one tile of keys."""
    of_head = tl.program_id(0)
    b, h = (of_head // heads).to(tl.int64), (of_head % heads).to(tl.int64)
    if sequences is not None:
        b = tl.load(sequences + b)
    query += b * query_batch + h * query_head
    key += b * key_batch + (h // PER_KEY_HEAD) * key_head
    bounds += b * bounds_batch + h * bounds_head
    if allowed is not None:
        allowed += b * allowed_batch + h * allowed_head
    if bias is not None:
        bias += b * bias_batch + h * bias_head
    plane = batch.to(tl.int64) * heads * tokens
    slab += (b * heads + h) * tokens

    number, keys = tl.arange(0, ROWS), tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    of_sequence = tl.load(length + b).to(tl.int64)
    spaced = tl.where(of_sequence <= most, number, (2 * number + 1) * of_sequence // (2 * most)).to(tl.int32)
    exists = (spaced < of_sequence) & (number < row_count)
    rows = tl.where(exists, spaced + tl.load(start + b).to(tl.int32), tokens)  # the others are not loaded
    e, part = masked_weights(
        query, query_row, key, key_row, bounds, bounds_plane, allowed, (allowed_row, allowed_key),
        bias, (bias_row, bias_key), slab + TOP * plane, slab + PART * plane, rows, keys, tokens, None, unit, scale, softcap,
        WIDTH, CHUNK,
    )  # fmt: skip
    p, ok = e * part[:, None], part > 0

    place, held = of_head.to(tl.int64) * row_count + number, number < row_count
    tl.store(patterns + place[:, None] * key_count + keys[None, :], p, mask=held[:, None] & (keys < tokens)[None, :])
    if tl.program_id(1) == 0:
        tl.store(measured + place, ok, mask=held)
        if HAS_SINK:
            sink = tl.load(slab + _SINK * plane + rows, mask=exists, other=0)
            tl.store(patterns + place * key_count + tokens, tl.where(ok, sink, 0), mask=held)


@triton.jit(do_not_specialize=["heads", "rows", "keys"])
def mix_heads(patterns, mixed, heads, rows, keys, HEADS: tl.constexpr, KEYS: tl.constexpr, AT_ONCE: tl.constexpr):
    """−Σ m ln m of m = (p + q) / 2 in one row of one sequence, of AT_ONCE heads p with all heads q; 0 where q comes first."""
    sequence, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    begin = tl.program_id(1) * AT_ONCE
    patterns += (sequence.to(tl.int64) * heads * rows + row) * keys
    step = rows.to(tl.int64) * keys
    other = tl.arange(0, HEADS)
    sums = ()
    for _ in tl.static_range(AT_ONCE):
        sums = sums + (tl.zeros([HEADS], tl.float32),)  # noqa: RUF005 (Triton unpacks no tuples)
    for at in range(0, keys, KEYS):
        key = at + tl.arange(0, KEYS)
        real, held = key < keys, (other >= begin) & (other < heads)
        q = tl.load(patterns + other[:, None] * step + key[None, :], mask=held[:, None] & real[None, :], other=0)
        added = ()
        for n in tl.static_range(AT_ONCE):
            p = tl.load(patterns + tl.minimum(begin + n, heads - 1) * step + key, mask=real, other=0)
            m = (q + p[None, :]) * 0.5
            added = added + (sums[n] - tl.sum(m * tl.log(tl.maximum(m, _LEAST_SHARE)), 1),)  # noqa: RUF005
        sums = added
    for n in tl.static_range(AT_ONCE):
        p = begin + n
        place = (tl.program_id(0).to(tl.int64) * heads + p) * heads + other
        tl.store(mixed + place, tl.where(other >= p, sums[n], 0), mask=tl.maximum(other, p) < heads)
