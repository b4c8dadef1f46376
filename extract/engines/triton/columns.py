"""The pass along columns: what keys receive, how far apart queries and keys are, and weights of equal tokens.

It computes scores a second time, from queries and keys, and turns them into the pattern by what the pass along rows found of
each row. The tiles have TILE rows and keys. A program sums one column of tiles, or one of the three diagonals of tiles
nearest to the query, in a fixed order and without atomics: the same call gives the same bytes.

Distances are counted in doubling bins. Two diagonals of tiles or more from the query a tile lies within one bin, unless that
diagonal's number is a power of two: then the bins change from one to the next at the tile's own diagonal. So the columns
give the bins of all such tiles at hardly any cost, and only the three nearest diagonals are summed by distance.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import os

import triton
import triton.language as tl

from attlas.extract.engines.profiles import LARGEST_DOUBLING_BIN
from attlas.extract.engines.triton.rows import PART, SPAN, TOP, norms_of_writes
from attlas.extract.engines.triton.tiles import load_rows, masked_weights, products, soft_capped

MIDDLE = tl.constexpr(LARGEST_DOUBLING_BIN)  # the bin of distance 0
BINS = tl.constexpr(64)  # a power of two that holds them all
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter knows no PTX
DIAGONALS = tl.constexpr(3)  # that are summed by distance
_BLOCK = tl.constexpr(64)  # tiles whose spans are looked at together


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
    """Tiles of rows in a column: the first that sees something of it, the one after the last, and the run of whole ones.

    A whole tile sees all keys of the column. The run begins with the first of them and ends before the first after it that
    is not.
    """
    low, high, whole_low, whole_high = tiles, 0, tiles, tiles
    for at in range(0, tiles, _BLOCK):
        tile = at + tl.arange(0, _BLOCK)
        first = tl.load(spans + tile * SPAN, mask=tile < tiles, other=0)
        last = tl.load(spans + tile * SPAN + 1, mask=tile < tiles, other=0)
        all_from = tl.load(spans + tile * SPAN + 2, mask=tile < tiles, other=0)
        all_to = tl.load(spans + tile * SPAN + 3, mask=tile < tiles, other=0)
        sees = (first < key + TILE) & (last > key) & (last > first)
        whole = (all_from <= key) & (all_to >= key + TILE)
        low = tl.minimum(low, tl.min(tl.where(sees, tile, tiles), 0))
        high = tl.maximum(high, tl.max(tl.where(sees, tile + 1, 0), 0))
        whole_low = tl.minimum(whole_low, tl.min(tl.where(whole, tile, tiles), 0))
        whole_high = tl.minimum(whole_high, tl.min(tl.where((whole == 0) & (tile > whole_low), tile, tiles), 0))
    return low, high, tl.minimum(whole_low, high), tl.minimum(whole_high, high)


@triton.jit
def _is_equal(a, b):
    """1 where two whole numbers are equal, else 0, as max(0, 1 − |a − b|): GPUs add faster than they compare and select."""
    return tl.inline_asm_elementwise(
        "{ .reg .f32 d; sub.f32 d, $1, $2; abs.f32 d, d; sub.sat.f32 $0, 0f3F800000, d; }",
        "=f,f,f",
        [a.to(tl.float32), b.to(tl.float32)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def equal_tokens(e, own, token, before, rows, keys, WHOLE: tl.constexpr):
    """Σ e per row over other keys with the row's token, and over keys up to the row that follow one of these."""
    others, earlier = e, e
    if not WHOLE:
        others = tl.where(keys[None, :] != rows[:, None], e, 0)
        earlier = tl.where(keys[None, :] <= rows[:, None], e, 0)
    return _sum_of_equal(others, own, token), _sum_of_equal(earlier, own, before)


@triton.jit
def _sum_of_equal(e, own, token):
    """Σ e per row over keys whose token is the row's own."""
    if _INTERPRETED:
        return tl.sum(tl.where(token[None, :] == own[:, None], e, 0), 1)
    return tl.sum(e * _is_equal(own[:, None], token[None, :]), 1)


@triton.jit
def tokens_of(ids, begins, places, tokens):
    """The tokens at these places, and those before them; −1 where there are none."""
    follows = (places > begins) & (places < tokens)
    token = tl.load(ids + places, mask=places < tokens, other=-1).to(tl.int32)
    return token, tl.where(follows, tl.load(ids + places - 1, mask=follows, other=-1).to(tl.int32), -1)


@triton.jit
def _add_bins(in_bins, mass, current, e, part, ahead, TILE: tl.constexpr):
    """Add a tile to the mass per row of the current bin; where the bin changes, put its sum into its place.

    The tile's number counts tiles from the query, positive ahead; they come in descending order.
    """
    size = tl.abs(ahead)
    if size > 1:
        sign = tl.where(ahead > 0, 1, -1)
        outer = sign * (_log2(size * TILE) + 2)
        at_edge = size == (1 << _log2(size))
        inner = outer - tl.where(at_edge, sign, 0)
        begins, ends = tl.where(ahead > 0, outer, inner), tl.where(ahead > 0, inner, outer)
        of_rows = tl.sum(e, 1) * part
        if at_edge | (begins != current):
            place = tl.arange(0, TILE)
            beyond = (place[None, :] > place[:, None]) == (ahead > 0)
            beyond &= place[None, :] != place[:, None]
            far = tl.sum(tl.where(beyond & at_edge, e, 0), 1) * part
            first = tl.where(at_edge, tl.where(ahead > 0, far, of_rows - far), 0)
            number = tl.arange(0, BINS) - MIDDLE
            in_bins += tl.where(number == current, tl.sum(mass, 0), 0) + tl.where(number == begins, tl.sum(first, 0), 0)
            mass = of_rows - first
            current = ends
        else:
            mass += of_rows
    return in_bins, mass, current


@triton.jit
def bins_of_diagonals(total, ahead, TILE: tl.constexpr):
    """The bins of a tile's sums by distance; the tile is the sum of a diagonal of tiles."""
    place, number = tl.arange(0, TILE), tl.arange(0, BINS) - MIDDLE
    in_bins = tl.zeros([BINS], tl.float32)
    # rotate row r by r places: a column then has one distance, and after the wrap the distance TILE before it
    turn = place[None, :] + place[:, None]
    total = tl.gather(total, turn % TILE, 1)
    for wrapped in tl.static_range(2):
        mass = tl.sum(tl.where((turn < TILE) == (wrapped == 0), total, 0), 0)
        bin_ = bin_of(ahead * TILE + place - wrapped * TILE)
        in_bins += tl.sum(tl.where(bin_[:, None] == number[None, :], mass[:, None], 0), 0)
    return in_bins


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
def along_columns(
    query, key, value, bounds, start, length, slab, write, write_rest, ids, allowed, bias,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    bounds_batch, bounds_head, bounds_plane,
    allowed_batch, allowed_head, allowed_row, allowed_key,
    bias_batch, bias_head, bias_row, bias_key,
    of_keys, bins, looked_up, spans,
    batch, heads, tokens, unit, scale, softcap,
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
    lines = tiles + DIAGONALS
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
    top_of = slab + TOP * plane + bh.to(tl.int64) * tokens
    part_of = slab + PART * plane + bh.to(tl.int64) * tokens
    spans = (slab + spans).to(tl.pointer_type(tl.int32)) + bh * tiles * SPAN
    place = tl.arange(0, TILE)
    in_bins = tl.zeros([BINS], tl.float32)
    total = tl.zeros([TILE, TILE], tl.float32)

    if line < tiles:
        keys = line * TILE + place
        k = None
        if CHUNK >= WIDTH:
            k = load_rows(key, keys, key_row, 0, tokens, WIDTH, CHUNK)
        same, after = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        if ids is not None:
            ids += b * tokens
            token, before = tokens_of(ids, tl.load(start + b), keys, tokens)
        mass, current = tl.zeros([TILE], tl.float32), 100
        edge_0, edge_5, edge_1, edge_4 = _of_column(spans, tiles, line * TILE, TILE)
        # rows in five ranges: not all see the whole tile; they do, before, beside and after the keys; not all do
        edge_2 = tl.minimum(tl.maximum(line - 1, edge_1), edge_4)
        edge_3 = tl.minimum(tl.maximum(line + 2, edge_1), edge_4)
        for n in range(5):
            begin = tl.where(
                n == 0, edge_0, tl.where(n == 1, edge_1, tl.where(n == 2, edge_2, tl.where(n == 3, edge_3, edge_4)))
            )
            end = tl.where(
                n == 0, edge_1, tl.where(n == 1, edge_2, tl.where(n == 2, edge_3, tl.where(n == 3, edge_4, edge_5)))
            )
            if n % 2 == 1:
                if ids is not None:
                    before_here = tl.where(n == 3, before, -1)  # keys beyond the rows follow nothing
                for tile in tl.range(begin, end, num_stages=3):
                    rows = tile * TILE + place
                    top, part = tl.load(top_of + rows), tl.load(part_of + rows)
                    scores = products(query, query_row, key, key_row, rows, keys, tokens, None, k, WIDTH, CHUNK)
                    if softcap is not None:
                        scores = soft_capped(scores, scale, softcap)
                    e = tl.exp2(tl.fma(scores, unit, -top[:, None]))
                    total = tl.fma(e, part[:, None], total)
                    in_bins, mass, current = _add_bins(in_bins, mass, current, e, part, line - tile, TILE)
                    if ids is not None:
                        own = tl.load(ids + rows).to(tl.int32)
                        of_same, of_after = equal_tokens(e, own, token, before_here, rows, keys, True)
                        same += of_same * part
                        after += of_after * part
            else:
                for tile in tl.range(begin, end, num_stages=1):
                    rows = tile * TILE + place
                    e, part = masked_weights(
                        query, query_row, key, key_row, bounds, bounds_plane, allowed, (allowed_row, allowed_key),
                        bias, (bias_row, bias_key), top_of, part_of, rows, keys, tokens, k, unit, scale, softcap, WIDTH, CHUNK,
                    )  # fmt: skip
                    total = tl.fma(e, part[:, None], total)
                    in_bins, mass, current = _add_bins(in_bins, mass, current, e, part, line - tile, TILE)
                    if ids is not None:
                        own = tl.load(ids + rows, mask=rows < tokens, other=-2).to(tl.int32)
                        of_same, of_after = equal_tokens(e, own, token, before, rows, keys, False)
                        same += of_same * part
                        after += of_after * part
        in_bins += tl.where(tl.arange(0, BINS) - MIDDLE == current, tl.sum(mass, 0), 0)
        at = slab + of_keys + bh.to(tl.int64) * tokens + keys
        tl.store(at, tl.sum(total, 0), mask=keys < tokens)
        if write is not None:
            value += b * value_batch + (h // PER_KEY_HEAD) * value_head
            norm = norms_of_values(value, value_row, write, write_rest, h, keys, tokens, VALUE_WIDTH, PART_WIDTH, PARTS)
            begins = tl.load(start + b)
            real = (keys >= begins) & (keys < begins + tl.load(length + b))
            tl.store(at + plane, tl.where(real, norm, 0), mask=keys < tokens)
        if ids is not None:
            at = slab + looked_up + (bh.to(tl.int64) * tiles + line) * 2
            tl.store(at, tl.sum(same, 0))
            tl.store(at + 1, tl.sum(after, 0))
    else:
        ahead = line - tiles - 1
        for tile in tl.range(tl.maximum(-ahead, 0), tl.minimum(tiles, tiles - ahead), num_stages=1):
            rows, keys = tile * TILE + place, (tile + ahead) * TILE + place
            low, high = tl.load(spans + tile * SPAN), tl.load(spans + tile * SPAN + 1)
            if (low < (tile + ahead) * TILE + TILE) & (high > (tile + ahead) * TILE):
                e, part = masked_weights(
                    query, query_row, key, key_row, bounds, bounds_plane, allowed, (allowed_row, allowed_key),
                    bias, (bias_row, bias_key), top_of, part_of, rows, keys, tokens, None, unit, scale, softcap, WIDTH, CHUNK,
                )  # fmt: skip
                total = tl.fma(e, part[:, None], total)
        if (ahead == 0) | (tiles > 1):
            in_bins = bins_of_diagonals(total, ahead, TILE)
    tl.store(slab + bins + (bh.to(tl.int64) * lines + line) * BINS + tl.arange(0, BINS), in_bins)


@triton.jit
def norms_of_values(
    value, stride, write, write_rest, h, keys, tokens,
    WIDTH: tl.constexpr, PART_WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """‖v R‖ of the values of these keys."""
    vectors = ()
    for n in tl.static_range(PARTS):
        v = load_rows(value, keys, stride, n * PART_WIDTH, tokens, WIDTH, PART_WIDTH)
        vectors = vectors + (v,)  # noqa: RUF005
    return norms_of_writes(vectors, write, write_rest, h, WIDTH, PART_WIDTH, PARTS)
