"""The sums of an attention call, compiled: what `sums.summed` gives, in one pass over the rows of each head."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from numba import boolean, float32, float64, int64, njit, prange, types

from extract.engines.compiled import FAST, array, exp, kernel, ln
from extract.engines.cpu_kernel import QUANTITIES as ROW_ARRAYS
from extract.statistics import sums
from extract.statistics.attention import PLACE, QUANTITIES, TOKEN_CLASSES
from extract.statistics.profiles import (
    COLUMN_OF_BIN,
    HISTOGRAM_BINS,
    LARGEST_DOUBLING_BIN,
    PROFILE_COLUMNS,
    doubling_bin_edges,
)
from extract.statistics.sums import HeadObservation, HeadSums

# columns of bin 0 of each profile
_OFFSET, _ENTROPY, _MAX_WEIGHT = (COLUMN_OF_BIN[name, 0] for name in ("offset", "entropy", "max_weight"))
_ENTROPY_AT, _DISTANCE_AT, _RECEIVED_AT = (
    COLUMN_OF_BIN[f"{name}_by_position", 0] for name in ("entropy", "distance", "received")
)
_CLASSES = len(TOKEN_CLASSES)
# float64: numba makes it of a float and a float32, where NumPy's stubs say float32
_Sum = float | np.floating
_ABSENT = torch.zeros(0, 0, 0)  # stands for a quantity that is not known
_NO_CLASSES = torch.zeros(0, 0, dtype=torch.int64)


def summed(o: HeadObservation) -> HeadSums:
    """The sums of an observation on the CPU; a mask with holes, or float64, is left to plain torch."""
    rows, seen = o.rows, o.visibility
    if (
        seen.crosses
        or seen.allowed is not None
        or rows.entropy.dtype != torch.float32
        or rows.entropy.device.type != "cpu"
    ):
        return sums.summed(o)
    batch, heads, tokens = rows.entropy.shape
    values = np.empty((len(QUANTITIES), batch, heads))
    profiles = np.empty((2, heads, len(PROFILE_COLUMNS)))
    quantities = [getattr(rows, name) for name in ROW_ARRAYS]
    _sum_up(
        rows.measured.contiguous().numpy(),
        tuple((_ABSENT if t is None else t.contiguous()).numpy() for t in quantities),
        rows.received.contiguous().numpy(),
        rows.offsets.contiguous().numpy(),
        (_ABSENT if rows.value_norm is None else rows.value_norm.contiguous()).numpy(),
        seen.keys.start.numpy(),
        seen.keys.length.numpy(),
        *(t.expand(batch, -1, tokens).contiguous().numpy() for t in (seen.first, seen.last, seen.uniform_distance)),
        (_NO_CLASSES if o.classes is None else o.classes).numpy(),
        np.log(np.arange(tokens + 2).clip(2)).astype(np.float32),
        _EDGES,
        values,
        profiles,
    )
    if rows.same_token is not None and rows.induction is not None:
        values[PLACE["same_token"]] = rows.same_token.numpy()
        values[PLACE["induction"]] = rows.induction.numpy()
    for name in ("patch_distance", "patch_rows"):
        values[PLACE[name]] = np.nan
    if rows.patches is not None:
        values[PLACE["patch_distance"]] = rows.patches.distance.numpy()
        values[PLACE["patch_rows"]] = rows.patches.rows.numpy()
    return HeadSums(torch.from_numpy(values), torch.from_numpy(profiles))


# position before which each doubling bin ends: 1, 2, 3, 5, 9, …
_EDGES = np.array([doubling_bin_edges(number)[1] + 1 for number in range(LARGEST_DOUBLING_BIN + 1)])


def _rowed(kind: types.Type) -> types.Array:
    """[batch, head, token] side by side, so that loops over tokens are vectors."""
    return types.Array(kind, 3, "C")


@njit(error_model="numpy")
def _histogram_bin(share: np.float32) -> int:
    return min(max(int(share * HISTOGRAM_BINS), 0), HISTOGRAM_BINS - 1)


@njit(error_model="numpy", fastmath=FAST)
def _total(x: Float32[np.ndarray, " query"]) -> float:
    """Σ x in float64; NaN where there is no such quantity."""
    if x.shape[0] == 0:
        return np.nan
    total = 0.0
    for value in x:
        total += value
    return total


@njit(error_model="numpy")
def _of_rows(
    x: Float32[np.ndarray, "batch head token"], b: int, h: int, first: int, n: int
) -> Float32[np.ndarray, " token"]:
    return x[b, h, first : first + n] if x.shape[0] > 0 else x[:0, 0, 0]


@njit(error_model="numpy", fastmath=FAST)
def _sum_by_position(
    x: Float32[np.ndarray, " token"] | Bool[np.ndarray, " token"],
    edges: Int64[np.ndarray, " bin"],
    profile: Float64[np.ndarray, " column"],
    column: int,
) -> None:
    """Add values [token] to the doubling bins of their positions; bin k ends before position edges[k]."""
    n = x.shape[0]
    begin = 0
    for number in range(edges.shape[0]):
        if begin >= n:
            break
        end = min(edges[number], n)
        total = 0.0
        for i in range(begin, end):
            total += x[i]
        profile[column + number] += total
        begin = end


@njit(error_model="numpy", fastmath=FAST)
def _sum_rows(
    measured: Bool[np.ndarray, " query"],
    quantities: tuple[Float32[np.ndarray, "batch head query"], ...],
    b: int,
    h: int,
    first: int,
    first_key: Int64[np.ndarray, " query"],
    last_key: Int64[np.ndarray, " query"],
    uniform_distance: Float64[np.ndarray, " query"],
    ln_of: Float32[np.ndarray, " outcomes"],
    edges: Int64[np.ndarray, " bin"],
    steps: Int64[np.ndarray, " step"],
    profile: Float64[np.ndarray, "2 column"],
) -> tuple[_Sum, ...]:
    """Sums over rows, in the order of QUANTITIES; row profiles; and how many pairs begin and end at each distance.

    A row that is not measured holds zeros.
    """
    n = measured.shape[0]
    entropy, distance = _of_rows(quantities[0], b, h, first, n), _of_rows(quantities[3], b, h, first, n)
    largest = _of_rows(quantities[2], b, h, first, n)
    score_max, score_mean = _of_rows(quantities[6], b, h, first, n), _of_rows(quantities[7], b, h, first, n)
    score_variance = _of_rows(quantities[8], b, h, first, n)
    rows, several, masked, nonfinite, pairs = 0, 0, 0, 0, 0
    squared, attended, uniform, score, score_squared = 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        seen = last_key[i] > first_key[i]
        rows += measured[i]
        masked += not seen
        nonfinite += seen and not measured[i]
    for i in range(n):
        counted = np.float64(measured[i])
        keys = (last_key[i] - first_key[i]) * counted
        of_row, mean = np.float64(entropy[i]), np.float64(score_mean[i])
        pairs += keys
        squared += of_row * of_row
        attended += exp(entropy[i]) * counted
        uniform += uniform_distance[i] * counted
        score += mean * keys
        score_squared += (score_variance[i] + mean * mean) * keys
    top = np.float32(-np.inf)
    for i in range(n):
        top = max(top, score_max[i] if measured[i] else top)
    outcomes = 1 if quantities[11].shape[0] > 0 else 0
    shares = np.empty(n, np.float32)
    total_share = 0.0
    for i in range(n):
        keys = last_key[i] - first_key[i]
        counts = measured[i] and keys >= 2
        share = min(entropy[i] / ln_of[keys + outcomes], np.float32(1)) if counts else np.float32(-1)
        shares[i] = share
        several += counts
        total_share += share if counts else np.float32(0)
    for i in range(n):
        if measured[i]:
            profile[0, _MAX_WEIGHT + _histogram_bin(largest[i])] += 1
            if shares[i] >= 0:
                profile[0, _ENTROPY + _histogram_bin(shares[i])] += 1
            steps[first_key[i] - first - i + n - 1] += 1
            steps[last_key[i] - first - i + n - 1] -= 1
    _sum_by_position(entropy, edges, profile[0], _ENTROPY_AT)
    _sum_by_position(distance, edges, profile[0], _DISTANCE_AT)
    _sum_by_position(measured, edges, profile[1], _ENTROPY_AT)
    return (
        np.float64(rows),
        np.float64(several),
        np.float64(masked),
        np.float64(nonfinite),
        _total(entropy),
        squared,
        total_share,
        attended,
        _total(_of_rows(quantities[1], b, h, first, n)),
        _total(largest),
        _total(distance),
        _total(_of_rows(quantities[4], b, h, first, n)),
        _total(_of_rows(quantities[5], b, h, first, n)),
        uniform,
        _total(_of_rows(quantities[9], b, h, first, n)),
        _total(_of_rows(quantities[10], b, h, first, n)),
        _total(_of_rows(quantities[11], b, h, first, n)),
        np.float64(top),
        np.float64(pairs),
        score,
        score_squared,
    )


@njit(error_model="numpy", fastmath=FAST)
def _sum_offsets(
    offsets: Float32[np.ndarray, " distance"],
    steps: Int64[np.ndarray, " step"],
    edges: Int64[np.ndarray, " bin"],
    profile: Float64[np.ndarray, "2 column"],
) -> tuple[float, float, float, float, float]:
    """Self, previous, next, backward, forward; and the offset profile, mass and opportunity."""
    n = steps.shape[0] // 2
    middle = offsets.shape[0] // 2
    ahead, behind = offsets[middle : middle + n], offsets[middle - n + 1 : middle + 1][::-1]
    for place in range(1, 2 * n):  # steps up and down to how many pairs there are
        steps[place] += steps[place - 1]
    backward, forward = 0.0, 0.0
    begin = 0
    for number in range(edges.shape[0]):
        if begin >= n:
            break
        end = min(edges[number], n)
        up, down = 0.0, 0.0
        pairs_up, pairs_down = 0, 0
        for d in range(begin, end):
            up += ahead[d]
            pairs_up += steps[n - 1 + d]
        profile[0, _OFFSET + number] += up
        profile[1, _OFFSET + number] += pairs_up
        if number > 0:
            for d in range(begin, end):
                down += behind[d]
                pairs_down += steps[n - 1 - d]
            profile[0, _OFFSET - number] += down
            profile[1, _OFFSET - number] += pairs_down
            forward += up
            backward += down
        begin = end
    previous, following = (behind[1], ahead[1]) if n > 1 else (np.float32(0), np.float32(0))
    return np.float64(ahead[0]), np.float64(previous), np.float64(following), backward, forward


@njit(error_model="numpy", fastmath=FAST)
def _sum_keys(
    received: Float32[np.ndarray, " key"],
    value_norm: Float32[np.ndarray, " key"],
    classes: Int64[np.ndarray, " key"],
    rows: _Sum,
    sink: _Sum,
    edges: Int64[np.ndarray, " bin"],
    profile: Float64[np.ndarray, "2 column"],
    of_class: Float64[np.ndarray, " class"],
) -> tuple[_Sum, _Sum, _Sum, _Sum, _Sum, _Sum]:
    """First; then the mean row's entropy, largest and its place, and what is written on the first key and on all."""
    n = received.shape[0]
    _sum_by_position(received, edges, profile[0], _RECEIVED_AT)
    _sum_by_position(np.ones(n, np.float32), edges, profile[1], _RECEIVED_AT)
    largest, place = np.float32(-1), 0
    for j in range(n):
        if received[j] > largest:
            largest, place = received[j], j
    each = np.float32(1 / rows)
    entropy = 0.0
    for j in range(n):
        mean = received[j] * each
        # a smaller one adds less than float32 resolves
        entropy -= mean * ln(mean) if mean > np.float32(1e-30) else np.float32(0)
    of_class[:] = 0.0 if classes.shape[0] > 0 else np.nan
    for j in range(classes.shape[0]):
        of_class[classes[j]] += received[j]
    if sink > 0:
        entropy -= sink / rows * np.log(sink / rows)
    written = 0.0 if value_norm.shape[0] > 0 else np.nan
    for j in range(value_norm.shape[0]):
        written += np.float64(received[j]) * value_norm[j]
    written_first = np.float64(received[0]) * value_norm[0] if value_norm.shape[0] > 0 else np.nan
    if rows == 0:
        return np.float64(received[0]), np.nan, np.nan, np.nan, written_first, written
    return np.float64(received[0]), max(entropy, 0.0), largest / rows, np.float64(place), written_first, written


@kernel(
    _rowed(boolean),
    types.UniTuple(_rowed(float32), len(ROW_ARRAYS)),
    _rowed(float32),
    _rowed(float32),
    _rowed(float32),
    array(int64, 1),
    array(int64, 1),
    _rowed(int64),
    _rowed(int64),
    _rowed(float64),
    array(int64, 2),
    types.Array(float32, 1, "C"),
    types.Array(int64, 1, "C"),
    array(float64, 3),
    array(float64, 3),
    fast=True,
)
def _sum_up(
    measured: Bool[np.ndarray, "batch head query"],
    quantities: tuple[Float32[np.ndarray, "batch head query"], ...],
    received: Float32[np.ndarray, "batch head key"],
    offsets: Float32[np.ndarray, "batch head distance"],
    value_norm: Float32[np.ndarray, "batch head key"],
    start: Int64[np.ndarray, " batch"],
    length: Int64[np.ndarray, " batch"],
    first_key: Int64[np.ndarray, "batch group query"],
    last_key: Int64[np.ndarray, "batch group query"],
    uniform_distance: Float64[np.ndarray, "batch group query"],
    classes: Int64[np.ndarray, "batch key"],
    ln_of: Float32[np.ndarray, " outcomes"],
    edges: Int64[np.ndarray, " bin"],
    values: Float64[np.ndarray, "quantity batch head"],
    profiles: Float64[np.ndarray, "2 head column"],
) -> None:
    # one head at a time, its sequences in order: sums come out the same on any number of threads
    for h in prange(measured.shape[1]):
        profile = profiles[:, h]
        profile[:] = 0.0
        for b in range(measured.shape[0]):
            first, n = start[b], length[b]
            rows = slice(first, first + n)
            steps = np.zeros(2 * n, np.int64)
            out = values[:, b, h]
            of_rows = _sum_rows(
                measured[b, h, rows],
                quantities,
                b,
                h,
                first,
                first_key[b, h % first_key.shape[1], rows],
                last_key[b, h % last_key.shape[1], rows],
                uniform_distance[b, h % uniform_distance.shape[1], rows],
                ln_of,
                edges,
                steps,
                profile,
            )
            of_offsets = _sum_offsets(offsets[b, h], steps, edges, profile)
            place = len(of_rows) + len(of_offsets) + 1
            of_keys = _sum_keys(
                received[b, h, rows],
                _of_rows(value_norm, b, h, first, n),
                classes[b, rows] if classes.shape[0] > 0 else classes[:0, 0],
                of_rows[0],
                of_rows[16],
                edges,
                profile,
                out[place : place + _CLASSES],
            )
            for number, value in enumerate(of_rows + of_offsets + (of_keys[0],)):
                out[number] = value
            place += _CLASSES
            out[place : place + 2] = np.nan  # same token and induction, which the engine sums
            for number, value in enumerate(of_keys[1:]):
                out[place + 2 + number] = value
        profile[1, _DISTANCE_AT : _DISTANCE_AT + edges.shape[0]] = profile[
            1, _ENTROPY_AT : _ENTROPY_AT + edges.shape[0]
        ]
        profile[1, _ENTROPY : _ENTROPY + HISTOGRAM_BINS] = profile[0, _ENTROPY : _ENTROPY + HISTOGRAM_BINS]
        profile[1, _MAX_WEIGHT : _MAX_WEIGHT + HISTOGRAM_BINS] = profile[0, _MAX_WEIGHT : _MAX_WEIGHT + HISTOGRAM_BINS]
