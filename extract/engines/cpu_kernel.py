"""The compiled part of the cpu engine: attention calls of one batch, a few rows at a time.

Scores are exponents of two throughout (scaled by log₂ e), because those exponentials are cheapest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64
from numba import boolean, float64, int32, int64, njit, prange, types
from numba import float32 as f32

from attlas.extract.engines.compiled import FAST, array, kernel, ln, places
from attlas.extract.engines.quantities import TOKEN_CLASSES
from attlas.extract.engines.simd import (
    AHEAD,
    AHEAD_SQUARED,
    APART,
    BELOW,
    BELOW_SQUARED,
    LANES,
    ROWS,
    SQUARES,
    SUMS,
    SURPRISE,
    TILE,
    TOTAL,
    copy,
    largest_of_row,
    largest_of_rows,
    softmax_row,
    spread,
    squares_of_rows,
    sums_of_rows,
    tile,
    transpose,
)

LOG2_E = 1.4426950408889634
_LN_2 = np.float32(0.6931471805599453)
# the row quantities in the order of the kernel's array
QUANTITIES = (
    "entropy",
    "collision",
    "max_weight",
    "distance",
    "offset",
    "offset_std",
    "score_max",
    "score_mean",
    "score_variance",
    "context_norm",
    "output_norm",
    "sink",
)
_AT = places(QUANTITIES)
CLASSES = len(TOKEN_CLASSES)
# if a row's offset exceeds its spread by this factor, the spread is summed again about the offset, because the sum about
# the query loses digits
_NARROW = 4


@kernel(array(int64, 2), array(int64, 1), array(int64, 1), array(int32, 3))
def group_by_token(
    ids: Int64[np.ndarray, "batch token"],
    start: Int64[np.ndarray, " batch"],
    length: Int64[np.ndarray, " batch"],
    groups: Int32[np.ndarray, "3 batch token"],
) -> None:
    """Positions sorted by token, and for each position where its token's group begins and ends: [3, batch, token]."""
    for b in prange(ids.shape[0]):
        n = length[b]
        real = ids[b, start[b] : start[b] + n]
        order = np.argsort(real, kind="mergesort")
        first = 0
        for place in range(1, n + 1):
            if place == n or real[order[place]] != real[order[first]]:
                for member in range(first, place):
                    groups[0, b, member] = order[member]
                    groups[1, b, order[member]] = first
                    groups[2, b, order[member]] = place
                first = place


@njit(error_model="numpy", inline="always")
def _round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


@njit(error_model="numpy")
def _packed_keys(key: Float32[np.ndarray, "key width"], n: int) -> Float32[np.ndarray, "tile width TILE"]:
    """[token, width] as [tile, width, TILE]: for each tile of tokens, their entries side by side; zeros behind the last."""
    width = key.shape[1]
    tiles = _round_up(n, TILE) // TILE
    out = np.empty((tiles, width, TILE), np.float32)
    stride = key.strides[0] // 4
    whole = n // LANES * LANES if width % LANES == 0 else 0
    for j in range(0, whole, LANES):
        for k in range(0, width, LANES):
            transpose(
                key.ctypes.data + 4 * (j * stride + k),
                stride,
                out.ctypes.data + 4 * ((j // TILE * width + k) * TILE + j % TILE),
                TILE,
            )
    for j in range(whole, tiles * TILE):
        for k in range(width):
            out[j // TILE, k, j % TILE] = key[j, k] if j < n else f32(0)
    return out


@njit(error_model="numpy")
def _pack(x: Float32[np.ndarray, "row width"], n: int) -> Float32[np.ndarray, "tile row TILE"]:
    """[row, width] as [tile, row, TILE]: tiles of columns; zeros behind the last."""
    width = x.shape[1]
    tiles = _round_up(width, TILE) // TILE
    out = np.empty((tiles, n, TILE), np.float32)
    stride = x.strides[0] // 4
    for t in range(tiles):
        columns = min(TILE, width - t * TILE)
        for j in range(n):
            copy(
                x.ctypes.data + 4 * (j * stride + t * TILE),
                out.ctypes.data + 4 * (t * n + j) * TILE,
                columns,
                f32(1),
            )
            for k in range(columns, TILE):
                out[t, j, k] = f32(0)
    return out


@njit(error_model="numpy", forceinline=True)
def _take_rows(
    x: Float32[np.ndarray, "row width"],
    first: int,
    last: int,
    scale: np.float32,
    out: Float32[np.ndarray, "ROWS padded_width"],
) -> None:
    """Rows first … last−1, scaled; zeros behind them."""
    for r in range(ROWS):
        if first + r < last:
            copy(x.ctypes.data + (first + r) * x.strides[0], out.ctypes.data + r * out.strides[0], x.shape[1], scale)
        else:
            out[r, :] = f32(0)


@njit(error_model="numpy", inline="always")
def _multiply_packed(
    rows: Float32[np.ndarray, "ROWS place"],
    depth: int,
    packed: Float32[np.ndarray, "tile row TILE"],
    first: int,
    out: Float32[np.ndarray, "ROWS padded_width"],
) -> None:
    """ROWS rows [·, depth] times packed columns [tile, row, TILE] from a row on, into out [·, tile × TILE]."""
    for t in range(packed.shape[0]):
        tile(
            rows.ctypes.data,
            rows.strides[0] // 4,
            packed.ctypes.data + 4 * (t * packed.shape[1] + first) * TILE,
            out.ctypes.data + 4 * t * TILE,
            out.strides[0] // 4,
            depth,
        )


@njit(error_model="numpy", forceinline=True)
def _write_norms(
    rows: Float32[np.ndarray, "ROWS padded_width"],
    write: Float32[np.ndarray, "tile value_width TILE"],
    room: Float32[np.ndarray, "ROWS padded_width"],
    norms: Float32[np.ndarray, " LANES"],
) -> None:
    """‖row · R‖ of ROWS rows; R is lower triangular, so the rows of it above a tile's diagonal are passed over."""
    width = write.shape[1]
    for t in range(write.shape[0]):
        above = min(t * TILE, width)
        tile(
            rows.ctypes.data + 4 * above,
            rows.strides[0] // 4,
            write.ctypes.data + 4 * (t * width + above) * TILE,
            room.ctypes.data + 4 * t * TILE,
            room.strides[0] // 4,
            width - above,
        )
    squares_of_rows(room.ctypes.data, room.strides[0] // 4, write.shape[0] * TILE, norms.ctypes.data)


@njit(error_model="numpy", inline="always")
def _is_finite(x: np.float32) -> bool:
    """Whether a float is finite, from its bits: the compiler may remove float comparisons under the flags above."""
    return (np.float32(x).view(np.int32) & np.int32(0x7F800000)) != np.int32(0x7F800000)


@njit(fastmath=FAST, error_model="numpy")
def _change_scores(
    s: Float32[np.ndarray, " place"],
    low: int,
    high: int,
    softcap: np.float32,
    bias: Float32[np.ndarray, "query key"],
    r: int,
) -> None:
    """Soft-cap and bias of a row, both in natural units; the scores become powers of two."""
    if softcap > 0:
        for j in range(low, high):
            s[j] = np.tanh(s[j] / softcap) * softcap
    if bias.shape[0] > 0:
        for j in range(low, high):
            s[j] += bias[r, j]
    for j in range(low, high):
        s[j] *= f32(LOG2_E)


@njit(fastmath=FAST, error_model="numpy")
def _row_with_holes(
    s: Float32[np.ndarray, " place"],
    low: int,
    high: int,
    allowed: Bool[np.ndarray, " key"],
    i: int,
    sums: Float32[np.ndarray, "SUMS LANES"],
    r: int,
) -> tuple[np.float32, int]:
    """`softmax_row` for a row that does not see all keys between its ends; returns largest score and count."""
    count, largest = 0, f32(-np.inf)
    for j in range(low, high):
        if allowed[j]:
            count += 1
            largest = max(largest, s[j])
    for q in range(SUMS):
        sums[q, r] = f32(0)
    for j in range(low, high):
        if not allowed[j]:
            s[j] = f32(0)
            continue
        x = s[j] - largest
        e = np.exp2(max(x, f32(-126.0)))
        d = f32(np.int32(j) - np.int32(i))
        s[j] = e
        sums[TOTAL, r] += e
        sums[SURPRISE, r] += e * x
        sums[SQUARES, r] += e * e
        sums[AHEAD, r] += e * d
        sums[AHEAD_SQUARED, r] += e * d * d
        sums[APART, r] += e * abs(d)
        sums[BELOW, r] += x
        sums[BELOW_SQUARED, r] += x * x
    return largest, count


@njit(fastmath=FAST, error_model="numpy")
def _add_sink(
    sums: Float32[np.ndarray, "SUMS LANES"],
    largest: Float32[np.ndarray, " LANES"],
    sink: np.float32,
    shrunk: Float32[np.ndarray, " ROWS"],
    of_sink: Float32[np.ndarray, " ROWS"],
) -> None:
    """Include a learned sink, relative to the larger of its logit and the row's largest score, so that neither overflows."""
    for r in range(ROWS):
        top = max(largest[r], sink)
        shrunk[r] = np.exp2(largest[r] - top)
        power = np.exp2(sink - top)
        surprise = (sums[SURPRISE, r] + sums[TOTAL, r] * (largest[r] - top)) * shrunk[r]
        sums[SURPRISE, r] = surprise + (power * (sink - top) if power > 0 else f32(0))
        sums[TOTAL, r] = sums[TOTAL, r] * shrunk[r] + power
        of_sink[r] = power / sums[TOTAL, r]


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _finish_rows(
    sums: Float32[np.ndarray, "SUMS LANES"],
    largest: Float32[np.ndarray, " LANES"],
    counts: Int32[np.ndarray, " ROWS"],
    shrunk: Float32[np.ndarray, " ROWS"],
    of_sink: Float32[np.ndarray, " ROWS"],
    weights: Float32[np.ndarray, " ROWS"],
    out: Float32[np.ndarray, "quantity ROWS"],
) -> None:
    """Quantities of ROWS rows from their sums, and the weights that turn their powers into their patterns."""
    for r in range(ROWS):
        total = sums[TOTAL, r]
        weight = shrunk[r] / total
        offset = sums[AHEAD, r] * weight
        each = f32(1) / f32(counts[r])
        mean_below = sums[BELOW, r] * each
        variance = sums[BELOW_SQUARED, r] * each - mean_below * mean_below
        weights[r] = weight
        out[_AT.entropy, r] = max(ln(total) - sums[SURPRISE, r] / total * _LN_2, f32(0))
        out[_AT.collision, r] = sums[SQUARES, r] * weight * weight
        out[_AT.max_weight, r] = weight
        out[_AT.distance, r] = sums[APART, r] * weight
        out[_AT.offset, r] = offset
        out[_AT.offset_std, r] = np.sqrt(max(sums[AHEAD_SQUARED, r] * weight - offset * offset, f32(0)))
        out[_AT.score_max, r] = largest[r] * _LN_2
        out[_AT.score_mean, r] = (largest[r] + mean_below) * _LN_2
        out[_AT.score_variance, r] = max(variance, f32(0)) * (_LN_2 * _LN_2)
        out[_AT.sink, r] = of_sink[r]


@njit(fastmath=FAST, error_model="numpy")
def _spread_about_offset(
    e: Float32[np.ndarray, " place"],
    low: int,
    high: int,
    i: int,
    weight: np.float32,
    offset: np.float32,
    of_sink: np.float32,
) -> np.float32:
    """√(Σ p d² − (Σ p d)²), summed about the mean offset; the sink's mass is not in Σ p."""
    centre = np.int32(np.rint(offset))
    ahead, squared = f32(0), f32(0)
    for j in range(low, high):
        d = f32(np.int32(j) - np.int32(i) - centre)
        ahead += e[j] * d
        squared += e[j] * d * d
    ahead, on_keys, by = ahead * weight, f32(1) - of_sink, f32(centre)
    variance = squared * weight - ahead * ahead + of_sink * by * (f32(2) * ahead + by * on_keys)
    return np.sqrt(max(variance, f32(0)))


@njit(error_model="numpy")
def _look_up(
    e: Float32[np.ndarray, " place"], low: int, high: int, i: int, groups: Int32[np.ndarray, "3 token"]
) -> tuple[np.float32, np.float32]:
    """Powers of row i on other keys with its token, and on keys up to i that follow one of them."""
    j: int  # for the type checker: NumPy's stubs give an array for an index of unknown type
    same, induction = f32(0), f32(0)
    for member in range(groups[1, i], groups[2, i]):
        j = groups[0, member]
        if j != i and low <= j < high:
            same += e[j]
        if j + 1 <= i and low <= j + 1 < high:
            induction += e[j + 1]
    return same, induction


class _Room(NamedTuple):
    """Working memory for ROWS rows of a head."""

    rows: Float32[np.ndarray, "ROWS place"]  # scores, then powers of two; see `_room` for the margins
    queries: Float32[np.ndarray, "ROWS width"]
    contexts: Float32[np.ndarray, "ROWS padded_width"]  # whole tiles
    written: Float32[np.ndarray, "ROWS padded_width"]  # the same, times R
    lanes: Float32[np.ndarray, "SUMS ROWS LANES"]
    sums: Float32[np.ndarray, "SUMS LANES"]
    largest: Float32[np.ndarray, " LANES"]
    norms: Float32[np.ndarray, " LANES"]
    weights: Float32[np.ndarray, " ROWS"]  # which turn powers into the pattern
    low: Int64[np.ndarray, " ROWS"]
    high: Int64[np.ndarray, " ROWS"]
    counts: Int32[np.ndarray, " ROWS"]  # visible keys
    shrunk: Float32[np.ndarray, " ROWS"]
    of_sink: Float32[np.ndarray, " ROWS"]
    finished: Float32[np.ndarray, "quantity ROWS"]


@njit(error_model="numpy")
def _room(key_tiles: int, width: int, value_tiles: int) -> _Room:
    """Working memory for rows of so many tiles of keys, filled with zeros.

    A row has a margin on the left for the rows that begin before it, and one on the right for the last vector.
    """
    return _Room(
        np.zeros((ROWS, ROWS + key_tiles * TILE + LANES + ROWS), np.float32),
        np.zeros((ROWS, width), np.float32),
        np.zeros((ROWS, value_tiles * TILE), np.float32),
        np.zeros((ROWS, value_tiles * TILE), np.float32),
        np.zeros((SUMS, ROWS, LANES), np.float32),
        np.zeros((SUMS, LANES), np.float32),
        np.zeros(LANES, np.float32),
        np.zeros(LANES, np.float32),
        np.zeros(ROWS, np.float32),
        np.zeros(ROWS, np.int64),
        np.zeros(ROWS, np.int64),
        np.zeros(ROWS, np.int32),
        np.ones(ROWS, np.float32),
        np.zeros(ROWS, np.float32),
        np.zeros((len(QUANTITIES), ROWS), np.float32),
    )


@njit(error_model="numpy", forceinline=True)
def _reach(
    room: _Room,
    first_key: Int64[np.ndarray, " query"],
    last_key: Int64[np.ndarray, " query"],
    first: int,
    rows: int,
    n: int,
) -> tuple[int, int]:
    """First key and end of each row, and of all of them; both are 0 for a row that sees nothing."""
    low, high = n, 0
    for r in range(ROWS):
        a, z = 0, 0
        if r < rows:
            a, z = first_key[r] - first, last_key[r] - first
        if z > a:
            low, high = min(low, a), max(high, z)
        else:
            a, z = 0, 0
        room.low[r], room.high[r], room.counts[r] = a, z, z - a
    return low, high


@njit(error_model="numpy", forceinline=True)
def _score(
    room: _Room,
    keys: Float32[np.ndarray, "tile width TILE"],
    from_tile: int,
    to_tile: int,
    softcap: np.float32,
    bias: Float32[np.ndarray, "query key"],
) -> None:
    """Scores of the rows and the keys of some tiles, as exponents of two."""
    s, width = room.rows[:, ROWS:], keys.shape[1]
    for t in range(from_tile, to_tile):
        tile(
            room.queries.ctypes.data,
            width,
            keys.ctypes.data + 4 * t * width * TILE,
            s.ctypes.data + 4 * t * TILE,
            s.strides[0] // 4,
            width,
        )
    if softcap > 0 or bias.shape[0] > 0:
        for r in range(ROWS):
            _change_scores(s[r], room.low[r], room.high[r], softcap, bias, r)


@njit(error_model="numpy", forceinline=True)
def _take_scores(room: _Room, scores: Float32[np.ndarray, "query key"], low: int, high: int) -> None:
    """Scores that the model computed, as exponents of two."""
    s = room.rows[:, ROWS:]
    for r in range(scores.shape[0]):
        place = scores.ctypes.data + r * scores.strides[0] + 4 * low
        copy(place, s.ctypes.data + r * s.strides[0] + 4 * low, high - low, f32(LOG2_E))


@njit(error_model="numpy", forceinline=True)
def _raise(room: _Room, from_tile: int, to_tile: int, tiles: int, i: int) -> None:
    """Replace scores by powers of two relative to each row's largest, with their sums; zeros for invisible keys."""
    s = room.rows[:, ROWS:]
    at, stride, lanes = s.ctypes.data, s.strides[0], room.lanes.ctypes.data
    for r in range(ROWS):
        largest_of_row(at + r * stride, room.low[r], room.high[r], lanes + 4 * r * LANES)
    largest_of_rows(lanes, room.largest.ctypes.data)
    for r in range(ROWS):
        softmax_row(at + r * stride, room.low[r], room.high[r], i + r, lanes + 4 * r * LANES, room.largest[r])
    for quantity in range(SUMS):
        sums_of_rows(lanes + 4 * quantity * ROWS * LANES, room.sums.ctypes.data + 4 * quantity * LANES)
    _clear_unseen(room, from_tile, to_tile, tiles)


@njit(error_model="numpy")
def _raise_with_holes(
    room: _Room, from_tile: int, to_tile: int, tiles: int, i: int, allowed: Bool[np.ndarray, "query key"]
) -> None:
    for r in range(allowed.shape[0]):
        room.largest[r], room.counts[r] = _row_with_holes(
            room.rows[r, ROWS:], room.low[r], room.high[r], allowed[r], i + r, room.sums, r
        )
    _clear_unseen(room, from_tile, to_tile, tiles)


@njit(error_model="numpy", forceinline=True)
def _clear_unseen(room: _Room, from_tile: int, to_tile: int, tiles: int) -> None:
    """Clear the keys around those that each row sees, within these tiles and the margins that `spread` reads."""
    # nothing is ever written after the last tile
    behind = ROWS + to_tile * TILE + (LANES + ROWS if to_tile < tiles else 0)
    for r in range(ROWS):
        for j in range(max(ROWS, from_tile * TILE), ROWS + room.low[r]):
            room.rows[r, j] = f32(0)
        for j in range(ROWS + room.high[r], behind):
            room.rows[r, j] = f32(0)


@njit(error_model="numpy", forceinline=True)
def _settle(room: _Room, sink: np.float32, i: int, rows: int, measured: Bool[np.ndarray, " query"]) -> None:
    """Quantities and weights of the rows; rows without keys or with a non-finite score are cleared."""
    if sink > -np.inf:
        _add_sink(room.sums, room.largest, sink, room.shrunk, room.of_sink)
    _finish_rows(room.sums, room.largest, room.counts, room.shrunk, room.of_sink, room.weights, room.finished)
    for r in range(ROWS):
        ok = room.counts[r] > 0 and _is_finite(room.sums[BELOW_SQUARED, r]) and _is_finite(room.largest[r])
        if r < rows:
            measured[r] = ok
        if not ok:
            room.weights[r] = f32(0)
            room.rows[r, :] = f32(0)
            room.finished[:, r] = f32(0)
        elif room.finished[_AT.offset_std, r] * f32(_NARROW) < abs(room.finished[_AT.offset, r]):
            room.finished[_AT.offset_std, r] = _spread_about_offset(
                room.rows[r, ROWS:],
                room.low[r],
                room.high[r],
                i + r,
                room.weights[r],
                room.finished[_AT.offset, r],
                room.of_sink[r],
            )


@njit(error_model="numpy", forceinline=True)
def _look_up_rows(room: _Room, i: int, rows: int, groups: Int32[np.ndarray, "3 token"]) -> tuple[float, float]:
    """Mass of the rows on other keys with their tokens, and on keys up to them that follow one of these."""
    same, induction = 0.0, 0.0
    for r in range(rows):
        if room.weights[r] > 0:
            found = _look_up(room.rows[r, ROWS:], room.low[r], room.high[r], i + r, groups)
            same += found[0] * room.weights[r]
            induction += found[1] * room.weights[r]
    return same, induction


@njit(error_model="numpy", fastmath=FAST)
def _add_to_classes(
    room: _Room,
    i: int,
    rows: int,
    low: int,
    high: int,
    classes: Int64[np.ndarray, " token"],
    by_class: Float32[np.ndarray, "class key"],
) -> None:
    """Add the pattern of each row to the sums by key of the query's class."""
    for r in range(rows):
        weight = room.weights[r]
        if weight > 0:
            row, sums = room.rows[r, ROWS + low : ROWS + high], by_class[classes[i + r], low:high]
            for j in range(row.shape[0]):
                sums[j] += row[j] * weight


@njit(error_model="numpy")
def _sum_classes(
    by_class: Float32[np.ndarray, "class key"],
    classes: Int64[np.ndarray, " token"],
    flow: Float64[np.ndarray, " bin"],
) -> None:
    """Sums by class of the query and class of the key."""
    number: int  # see `_look_up`
    for query_class in range(by_class.shape[0]):
        for j in range(classes.shape[0]):
            number = query_class * CLASSES + classes[j]
            flow[number] += by_class[query_class, j]


@njit(error_model="numpy", forceinline=True)
def _gather(room: _Room, values: Float32[np.ndarray, "tile key TILE"], low: int, high: int) -> None:
    """Contexts of the rows."""
    _multiply_packed(room.rows[:, ROWS + low :], high - low, values, low, room.contexts)
    for r in range(ROWS):
        for k in range(room.contexts.shape[1]):
            room.contexts[r, k] *= room.weights[r]


@njit(error_model="numpy", forceinline=True)
def _take_contexts(room: _Room, contexts: Float32[np.ndarray, "query value_width"]) -> None:
    """Contexts of measured rows from the model's output."""
    _take_rows(contexts, 0, contexts.shape[0], f32(1), room.contexts)
    for r in range(ROWS):
        if room.weights[r] == 0:
            room.contexts[r, :] = f32(0)


@njit(error_model="numpy", forceinline=True)
def _context_norms(room: _Room, write: Float32[np.ndarray, "tile value_width TILE"]) -> None:
    """Norms of the contexts, and of what they write."""
    wide = room.contexts.shape[1]
    squares_of_rows(room.contexts.ctypes.data, wide, wide, room.norms.ctypes.data)
    for r in range(ROWS):
        room.finished[_AT.context_norm, r] = np.sqrt(room.norms[r])
    if write.shape[0] > 0:
        _write_norms(room.contexts, write, room.written, room.norms)
        for r in range(ROWS):
            room.finished[_AT.output_norm, r] = np.sqrt(room.norms[r])


@njit(error_model="numpy", forceinline=True)
def _hand_over(
    room: _Room,
    rows: int,
    output: Float32[np.ndarray, "query value_width"],
    quantities: Float32[np.ndarray, "quantity query"],
) -> None:
    for r in range(rows):
        place = output.ctypes.data + r * output.strides[0]
        copy(room.contexts.ctypes.data + r * room.contexts.strides[0], place, output.shape[1], f32(1))
    for quantity in range(quantities.shape[0]):
        for r in range(rows):
            quantities[quantity, r] = room.finished[quantity, r]


@njit(error_model="numpy")
def _value_norms(
    room: _Room,
    values: Float32[np.ndarray, "key value_width"],
    write: Float32[np.ndarray, "tile value_width TILE"],
    norms: Float32[np.ndarray, " key"],
) -> None:
    """‖v_j R‖ of every key."""
    for j in range(0, values.shape[0], ROWS):
        _take_rows(values, j, values.shape[0], f32(1), room.contexts)
        _write_norms(room.contexts, write, room.written, room.norms)
        for r in range(min(ROWS, values.shape[0] - j)):
            norms[j + r] = np.sqrt(room.norms[r])


@njit(error_model="numpy")
def _clear_padding(
    first: int,
    n: int,
    measured: Bool[np.ndarray, " query"],
    quantities: Float32[np.ndarray, "quantity query"],
    output: Float32[np.ndarray, "query value_width"],
    value_norms: Float32[np.ndarray, " key"],
) -> None:
    for j in range(measured.shape[0]):
        if j < first or j >= first + n:
            measured[j] = False
            quantities[:, j] = f32(0)
            output[j] = f32(0)
            value_norms[j] = f32(0)


@njit(error_model="numpy")
def _put_between_zeros(values: Float32[np.ndarray, " value"], first: int, out: Float32[np.ndarray, " padded"]) -> None:
    out[:first] = f32(0)
    out[first : first + values.shape[0]] = values
    out[first + values.shape[0] :] = f32(0)


def _own(kind: types.Type, dimensions: int) -> types.Array:
    """The type of arrays from the engine, whose last dimension is contiguous."""
    return types.Array(kind, dimensions, "C")


@kernel(
    array(f32, 4),
    array(f32, 4),
    array(f32, 4),
    array(f32, 4),
    array(f32, 4),
    f32,
    f32,
    array(int64, 1),
    array(int64, 1),
    array(int64, 3),
    array(int64, 3),
    array(boolean, 4),
    array(f32, 4),
    array(f32, 1),
    _own(f32, 3),
    _own(int32, 3),
    boolean,
    array(int64, 2),
    array(f32, 4),
    _own(f32, 4),
    _own(boolean, 3),
    _own(f32, 4),
    _own(f32, 4),
    _own(f32, 3),
    _own(float64, 4),
    _own(float64, 4),
)
def attend(
    query: Float32[np.ndarray, "batch head query width"],
    key: Float32[np.ndarray, "batch key_head key width"],
    value: Float32[np.ndarray, "batch key_head key value_width"],
    scores: Float32[np.ndarray, "batch head query key"],
    contexts: Float32[np.ndarray, "batch head query value_width"],
    scale: np.float32,
    softcap: np.float32,
    start: Int64[np.ndarray, " batch"],
    length: Int64[np.ndarray, " batch"],
    first_key: Int64[np.ndarray, "batch head query"],
    last_key: Int64[np.ndarray, "batch head query"],
    allowed: Bool[np.ndarray, "batch head query key"],
    bias: Float32[np.ndarray, "batch head query key"],
    sinks: Float32[np.ndarray, " head"],
    write: Float32[np.ndarray, "head value_width value_width"],
    groups: Int32[np.ndarray, "3 batch token"],
    has_ids: bool,
    classes: Int64[np.ndarray, "batch token"],
    output: Float32[np.ndarray, "batch head query value_width"],
    quantities: Float32[np.ndarray, "quantity batch head query"],
    measured: Bool[np.ndarray, "batch head query"],
    received: Float32[np.ndarray, "piece batch head key"],
    offsets: Float32[np.ndarray, "piece batch head distance"],
    value_norms: Float32[np.ndarray, "batch head key"],
    looked_up: Float64[np.ndarray, "piece 2 batch head"],
    flow: Float64[np.ndarray, "piece batch head bin"],
) -> None:
    """Compute all calls of a batch: one (sequence, head, piece of rows) after another, on all threads.

    `scores` and `contexts` are those that the model has made itself, or empty; then queries and keys have no width.
    The signature is long because a kernel takes arrays one by one; absent ones are empty.
    """
    batch, heads, tokens, _ = query.shape
    pieces = received.shape[0]
    per_key_head = heads // key.shape[1]
    holed, biased, made = allowed.shape[0] > 0, bias.shape[0] > 0, scores.shape[0] > 0
    # scores that are changed after the product stay in natural units until then
    unit = scale if softcap > 0 or biased else scale * f32(LOG2_E)
    no_bias = np.zeros((0, 0), np.float32)
    b: int  # see `_look_up`
    h: int
    for item in prange(batch * heads * pieces):
        b, h, piece = item // pieces // heads, item // pieces % heads, item % pieces
        first, n = start[b], length[b]
        real = slice(first, first + n)
        keys = _packed_keys(key[b, h // per_key_head, real], n)
        values = _pack(value[b, h // per_key_head, real], n)
        packed_write = _pack(write[h], write.shape[1]) if write.shape[0] > 0 else values[:0]
        room = _room(keys.shape[0], key.shape[3], values.shape[0])
        by_key = np.zeros(n + LANES, np.float32)
        by_distance = np.zeros(2 * n + 2 * ROWS + LANES, np.float32)
        sink = sinks[h] * f32(LOG2_E) if sinks.shape[0] > 0 else f32(-np.inf)
        by_class = np.zeros((CLASSES if classes.shape[0] > 0 else 0, n), np.float32)
        same, induction = 0.0, 0.0
        if piece == 0:
            _clear_padding(first, n, measured[b, h], quantities[:, b, h], output[b, h], value_norms[b, h])
            if write.shape[0] > 0:
                _value_norms(room, value[b, h // per_key_head, real], packed_write, value_norms[b, h, real])
        for i in range(n * piece // pieces, n * (piece + 1) // pieces, ROWS):
            rows = min(ROWS, n * (piece + 1) // pieces - i)
            those = slice(first + i, first + i + rows)
            low, high = _reach(room, first_key[b, h, those], last_key[b, h, those], first, rows, n)
            if high <= low:
                measured[b, h, those] = False
                quantities[:, b, h, those] = f32(0)
                continue
            from_tile, to_tile = low // TILE, (high + TILE - 1) // TILE
            if made:
                _take_scores(room, scores[b, h, those, real], low, high)
            else:
                _take_rows(query[b, h, those], 0, rows, unit, room.queries)
                _score(room, keys, from_tile, to_tile, softcap, bias[b, h, those, real] if biased else no_bias)
            if holed:
                _raise_with_holes(room, from_tile, to_tile, keys.shape[0], i, allowed[b, h, those, real])
            else:
                _raise(room, from_tile, to_tile, keys.shape[0], i)
            _settle(room, sink, i, rows, measured[b, h, those])
            if has_ids:
                found = _look_up_rows(room, i, rows, groups[:, b])
                same += found[0]
                induction += found[1]
            if by_class.shape[0] > 0:
                _add_to_classes(room, i, rows, low, high, classes[b, real], by_class)
            spread(
                room.rows.ctypes.data + 4 * ROWS,
                room.rows.strides[0] // 4,
                room.weights.ctypes.data,
                low,
                high,
                by_key.ctypes.data,
                by_distance.ctypes.data + 4 * (n - 1 + ROWS - i),
            )
            if made:
                _take_contexts(room, contexts[b, h, those])
            else:
                _gather(room, values, low, high)
            _context_norms(room, packed_write)
            _hand_over(room, rows, output[b, h, those], quantities[:, b, h, those])
        _put_between_zeros(by_key[:n], first, received[piece, b, h])
        _put_between_zeros(by_distance[ROWS : ROWS + 2 * n - 1], tokens - n, offsets[piece, b, h])
        if by_class.shape[0] > 0:
            _sum_classes(by_class, classes[b, real], flow[piece, b, h])
        looked_up[piece, 0, b, h] = same
        looked_up[piece, 1, b, h] = induction
