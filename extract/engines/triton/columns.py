"""The pass along columns: what keys receive, how far apart queries and keys are, and weights of equal tokens.

It computes scores a second time, from queries and keys, and turns them into the pattern by what the pass along rows found of
each row. The tiles have TILE rows and keys. A program sums one column of tiles, or one of the three diagonals of tiles
nearest to the query, in a fixed order and without atomics: the same call gives the same bytes.

Distances are counted in doubling bins. Two diagonals of tiles or more from the query a tile lies within one bin, unless that
diagonal's number is a power of two: then the bins change from one to the next at the tile's own diagonal. So the columns
give the bins of all such tiles at hardly any cost, and only the three nearest diagonals are summed by distance.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from attlas.extract.engines.profiles import LARGEST_DOUBLING_BIN
from attlas.extract.engines.triton.rows import PART, SPAN, TOP, norms_of_writes
from attlas.extract.engines.triton.tiles import (
    load_bounds,
    load_pairs,
    load_rows,
    products,
    seen_pairs,
    soft_capped,
)

MIDDLE = tl.constexpr(LARGEST_DOUBLING_BIN)  # the bin of distance 0
BINS = tl.constexpr(64)  # a power of two that holds them all
_BLOCKS = tl.constexpr(64)  # tiles whose spans are looked at together


@triton.jit
def _log2(n):
    """⌊log2 n⌋ of an integer from 1 to 2²⁴: the exponent of the number as a float, which is exact."""
    return (n.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def bin_of(d):
    """The doubling bin of distances."""
    size = tl.abs(d)
    bin_ = tl.where(size > 1, _log2(tl.maximum(size - 1, 1)) + 2, size)
    return tl.where(d < 0, -bin_, bin_)


@triton.jit
def _of_column(spans, tiles, key, TILE: tl.constexpr):
    """The first tile of rows that sees something of a tile of keys, and the one after the last."""
    low, high = tiles, 0
    for at in range(0, tiles, _BLOCKS):
        tile = at + tl.arange(0, _BLOCKS)
        first = tl.load(spans + tile * SPAN, mask=tile < tiles, other=0)
        last = tl.load(spans + tile * SPAN + 1, mask=tile < tiles, other=0)
        sees = (first < key + TILE) & (last > key) & (last > first)
        low = tl.minimum(low, tl.min(tl.where(sees, tile, tiles), 0))
        high = tl.maximum(high, tl.max(tl.where(sees, tile + 1, 0), 0))
    return low, high


@triton.jit
def _alike(spans, row, end, key, TILE: tl.constexpr):
    """Whether the rows of tile `row` see the whole tile of keys, and the first tile after it, up to `end`, that differs."""
    whole = (tl.load(spans + row * SPAN + 2) <= key) & (tl.load(spans + row * SPAN + 3) >= key + TILE)
    stop = end
    for at in range(row, end, _BLOCKS):
        tile = at + tl.arange(0, _BLOCKS)
        all_from = tl.load(spans + tile * SPAN + 2, mask=tile < end, other=0)
        all_to = tl.load(spans + tile * SPAN + 3, mask=tile < end, other=0)
        differs = ((all_from <= key) & (all_to >= key + TILE)) != whole
        stop = tl.minimum(stop, tl.min(tl.where(differs & (tile < end), tile, end), 0))
    return whole, stop


@triton.jit
def _equal_tokens(e, part, own, token, before, rows, keys, WHOLE: tl.constexpr):
    """Σ p per row over other keys with the row's token, and over keys up to the row that follow one of these."""
    same, after = token[None, :] == own[:, None], before[None, :] == own[:, None]
    if not WHOLE:
        same &= keys[None, :] != rows[:, None]
        after &= keys[None, :] <= rows[:, None]
    return tl.sum(tl.where(same, e, 0), 1) * part, tl.sum(tl.where(after, e, 0), 1) * part


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
def along_columns(
    query,
    key,
    value,
    bounds,
    quantities,
    spans,
    of_keys,
    bins,
    looked_up,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    bounds_batch, bounds_head, bounds_plane,
    batch,
    heads,
    tokens,
    unit,
    scale,
    softcap,
    write,
    write_rest,
    ids,
    start,
    length,
    allowed, allowed_batch, allowed_head, allowed_row, allowed_key,
    bias, bias_batch, bias_head, bias_row, bias_key,
    PER_KEY_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PART_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One column of tiles: `received` and ‖v R‖ of its keys, bins of its distances, weights of equal tokens.

    Or one of the nearest diagonals of tiles: bins of its distances.
    """
    tiles = tl.cdiv(tokens, TILE)
    lines = tiles + 3
    bh = tl.program_id(0) // lines
    line = tl.program_id(0) % lines
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    query += b * query_batch + h * query_head
    key += b * key_batch + (h // PER_KEY_HEAD) * key_head
    bounds += b * bounds_batch + h * bounds_head
    if allowed is not None:
        allowed += b * allowed_batch + h * allowed_head
    if bias is not None:
        bias += b * bias_batch + h * bias_head
    plane = batch.to(tl.int64) * heads * tokens
    top_of = quantities + TOP * plane + bh.to(tl.int64) * tokens
    part_of = quantities + PART * plane + bh.to(tl.int64) * tokens
    spans += bh * tiles * SPAN
    place = tl.arange(0, TILE)
    bin_numbers = tl.arange(0, BINS) - MIDDLE
    in_bins = tl.zeros([BINS], tl.float32)

    if line < tiles:
        keys = line * TILE + place
        k = None
        if CHUNK >= WIDTH:
            k = load_rows(key, keys, key_row, 0, tokens, WIDTH, CHUNK)
        same_of_rows, after_of_rows = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        if ids is not None:
            ids += b * tokens
            begins = tl.load(start + b)
            token = tl.load(ids + keys, mask=keys < tokens, other=-1).to(tl.int32)
            follows = (keys > begins) & (keys < tokens)
            before = tl.where(follows, tl.load(ids + keys - 1, mask=follows, other=-1).to(tl.int32), -1)
        received = tl.zeros([TILE], tl.float32)
        row, end = _of_column(spans, tiles, line * TILE, TILE)
        while row < end:
            ahead = line - row
            size = tl.abs(ahead)
            log = _log2(tl.maximum(size, 1))
            near, at_edge = size <= 1, (size > 1) & (size == (1 << log))
            # the tiles up to the next edge between bins
            stop = tl.where(ahead > 0, row + size - (1 << log), row + (2 << log) - size)
            stop = tl.minimum(tl.where(near, line + 2, tl.where(at_edge, row + 1, stop)), end)
            whole, stop = _alike(spans, row, stop, line * TILE, TILE)
            whole = whole & (near == 0) if ids is not None else whole
            total = tl.zeros([TILE, TILE], tl.float32)
            if whole:
                if ids is not None:
                    before_here = tl.where(ahead < 0, before, -1)  # keys beyond the rows follow nothing
                for n in range(row, stop):
                    rows = n * TILE + place
                    top, part = tl.load(top_of + rows), tl.load(part_of + rows)
                    scores = products(query, query_row, key, key_row, rows, keys, tokens, None, k, WIDTH, CHUNK)
                    if softcap is not None:
                        scores = soft_capped(scores, scale, softcap)
                    e = tl.exp2(tl.fma(scores, unit, -top[:, None]))
                    total = tl.fma(e, part[:, None], total)
                    if ids is not None:
                        own = tl.load(ids + rows).to(tl.int32)
                        same, after = _equal_tokens(e, part, own, token, before_here, rows, keys, True)
                        same_of_rows += same
                        after_of_rows += after
            else:
                for n in range(row, stop):
                    rows = n * TILE + place
                    top = tl.load(top_of + rows, mask=rows < tokens, other=0)
                    part = tl.load(part_of + rows, mask=rows < tokens, other=0)
                    first, last = load_bounds(bounds, bounds_plane, rows, tokens)
                    # rows that are not measured add nothing
                    seen = seen_pairs(
                        allowed, (allowed_row, allowed_key), rows, keys, first, tl.where(part > 0, last, first)
                    )
                    scores = products(query, query_row, key, key_row, rows, keys, tokens, None, k, WIDTH, CHUNK)
                    if (softcap is not None) or (bias is not None):
                        scores = soft_capped(scores, scale, softcap)
                    if bias is not None:
                        scores += load_pairs(bias, (bias_row, bias_key), rows, keys, seen).to(tl.float32)
                    e = tl.where(seen, tl.exp2(tl.fma(scores, unit, -top[:, None])), 0)
                    total = tl.fma(e, part[:, None], total)
                    if ids is not None:
                        own = tl.load(ids + rows, mask=rows < tokens, other=-2).to(tl.int32)
                        same, after = _equal_tokens(e, part, own, token, before, rows, keys, False)
                        same_of_rows += same
                        after_of_rows += after
            of_keys_here = tl.sum(total, 0)
            received += of_keys_here
            if not near:
                mass = tl.sum(of_keys_here, 0)
                bin_ = tl.where(ahead > 0, 1, -1) * (_log2(size * TILE) + 2)
                if at_edge:
                    beyond = (place[None, :] > place[:, None]) == (ahead > 0)
                    beyond &= place[None, :] != place[:, None]
                    far = tl.sum(tl.sum(tl.where(beyond, total, 0), 0), 0)
                    in_bins += tl.where(bin_numbers == bin_, far, 0)
                    bin_ -= tl.where(ahead > 0, 1, -1)
                    mass -= far
                in_bins += tl.where(bin_numbers == bin_, mass, 0)
            row = stop
        at = of_keys + bh.to(tl.int64) * tokens + keys
        tl.store(at, received, mask=keys < tokens)
        if write is not None:
            value += b * value_batch + (h // PER_KEY_HEAD) * value_head
            vectors = ()
            for n in tl.static_range(PARTS):
                v = load_rows(value, keys, value_row, n * PART_WIDTH, tokens, VALUE_WIDTH, PART_WIDTH)
                vectors = vectors + (v,)  # noqa: RUF005
            norm = norms_of_writes(
                vectors,
                write + h * (VALUE_WIDTH * VALUE_WIDTH),
                write_rest,
                h * (VALUE_WIDTH * VALUE_WIDTH),
                VALUE_WIDTH,
                PART_WIDTH,
                PARTS,
            )
            begins = tl.load(start + b)
            real = (keys >= begins) & (keys < begins + tl.load(length + b))
            tl.store(at + plane, tl.where(real, norm, 0), mask=keys < tokens)
        if ids is not None:
            at = looked_up + (bh * tiles + line) * 2
            tl.store(at, tl.sum(same_of_rows, 0))
            tl.store(at + 1, tl.sum(after_of_rows, 0))
    else:
        ahead = line - tiles - 1
        total = tl.zeros([TILE, TILE], tl.float32)
        for row in range(tl.maximum(-ahead, 0), tl.minimum(tiles, tiles - ahead)):
            rows, keys = row * TILE + place, (row + ahead) * TILE + place
            low, high = tl.load(spans + row * SPAN), tl.load(spans + row * SPAN + 1)
            if (low < (row + ahead) * TILE + TILE) & (high > (row + ahead) * TILE):
                top = tl.load(top_of + rows, mask=rows < tokens, other=0)
                part = tl.load(part_of + rows, mask=rows < tokens, other=0)
                first, last = load_bounds(bounds, bounds_plane, rows, tokens)
                seen = seen_pairs(
                    allowed, (allowed_row, allowed_key), rows, keys, first, tl.where(part > 0, last, first)
                )
                scores = products(query, query_row, key, key_row, rows, keys, tokens, None, None, WIDTH, CHUNK)
                if (softcap is not None) or (bias is not None):
                    scores = soft_capped(scores, scale, softcap)
                if bias is not None:
                    scores += load_pairs(bias, (bias_row, bias_key), rows, keys, seen).to(tl.float32)
                e = tl.where(seen, tl.exp2(tl.fma(scores, unit, -top[:, None])), 0)
                total = tl.fma(e, part[:, None], total)
        # rotate row r by r places: a column then has one distance, and after the wrap the distance TILE before it
        turn = place[None, :] + place[:, None]
        total = tl.gather(total, turn % TILE, 1)
        for wrapped in tl.static_range(2):
            mass = tl.sum(tl.where((turn < TILE) == (wrapped == 0), total, 0), 0)
            bin_ = bin_of(ahead * TILE + place - wrapped * TILE)
            in_bins += tl.sum(tl.where(bin_[:, None] == bin_numbers[None, :], mass[:, None], 0), 0)
    tl.store(bins + (bh.to(tl.int64) * lines + line) * BINS + tl.arange(0, BINS), in_bins)
