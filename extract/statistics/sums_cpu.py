"""The sums of an attention call, compiled: what `sums.summed` gives, in one pass over the rows of each head."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import boolean, float32, float64, int64, njit, prange, types

from extract.engines.compiled import FAST, array, kernel, ln
from extract.statistics import sums
from extract.statistics.attention import PLACE, QUANTITIES, TOKEN_CLASSES
from extract.statistics.profiles import COLUMN_OF_BIN, HISTOGRAM_BINS, PROFILE_COLUMNS
from extract.statistics.sums import HeadObservation, HeadSums

# the row quantities, in the order in which the kernel takes them
_ROWS = (
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
    "update_norm",
    "sink",
)
# columns of bin 0 of each profile
_OFFSET, _ENTROPY, _MAX_WEIGHT = (COLUMN_OF_BIN[name, 0] for name in ("offset", "entropy", "max_weight"))
_ENTROPY_AT, _DISTANCE_AT, _RECEIVED_AT = (
    COLUMN_OF_BIN[f"{name}_by_position", 0] for name in ("entropy", "distance", "received")
)
_CLASSES = len(TOKEN_CLASSES)
_ABSENT = torch.zeros(0, 0, 0)
_NO_CLASSES = torch.zeros(0, 0, dtype=torch.int64)


def summed(o: HeadObservation) -> HeadSums:
    """The sums of an observation on the CPU; a mask with holes, or float64, is left to plain torch."""
    rows, seen = o.rows, o.visibility
    if seen.allowed is not None or rows.entropy.dtype != torch.float32 or rows.entropy.device.type != "cpu":
        return sums.summed(o)
    batch, heads, tokens = rows.entropy.shape
    values = np.empty((len(QUANTITIES), batch, heads))
    profiles = np.empty((2, heads, len(PROFILE_COLUMNS)))
    quantities = [getattr(rows, name) for name in _ROWS]
    _sum_up(
        rows.measured.numpy(),
        tuple((_ABSENT if t is None else t).numpy() for t in quantities),
        rows.received.numpy(),
        rows.offsets.numpy(),
        (_ABSENT if rows.value_norm is None else rows.value_norm).numpy(),
        seen.start.numpy(),
        seen.length.numpy(),
        *(t.expand(batch, heads, tokens).numpy() for t in (seen.first, seen.last)),
        seen.uniform_distance.expand(batch, heads, tokens).numpy(),
        (_NO_CLASSES if o.classes is None else o.classes).numpy(),
        np.log(np.arange(tokens + 2).clip(1)),
        np.array([_doubling_bin(n) for n in range(tokens)]),
        values,
        profiles,
    )
    if rows.same_token is not None and rows.induction is not None:
        values[PLACE["same_token"]] = rows.same_token.numpy()
        values[PLACE["induction"]] = rows.induction.numpy()
    return HeadSums(torch.from_numpy(values), torch.from_numpy(profiles))


def _doubling_bin(n: int) -> int:
    return 0 if n == 0 else (n - 1).bit_length() + 1


@njit(error_model="numpy")
def _histogram_bin(share: Any) -> int:
    return min(max(int(share * HISTOGRAM_BINS), 0), HISTOGRAM_BINS - 1)


@njit(error_model="numpy", fastmath=FAST)
def _total(x: Any) -> Any:
    """Σ x in float64; NaN where there is no such quantity."""
    if x.shape[0] == 0:
        return np.nan
    total = 0.0
    for value in x:
        total += value
    return total


@njit(error_model="numpy")
def _of_rows(x: Any, b: int, h: int, first: int, n: int) -> Any:
    return x[b, h, first : first + n] if x.shape[0] > 0 else x[:0, 0, 0]


@njit(error_model="numpy", fastmath=FAST)
def _sum_rows(
    measured: Any,
    quantities: Any,
    b: int,
    h: int,
    first: int,
    first_key: Any,
    last_key: Any,
    uniform_distance: Any,
    ln_of: Any,
    bin_of: Any,
    steps: Any,
    profile: Any,
) -> Any:
    """Sums over rows, in the order of QUANTITIES; row profiles; and how many pairs begin and end at each distance."""
    n = measured.shape[0]
    entropy, distance = _of_rows(quantities[0], b, h, first, n), _of_rows(quantities[3], b, h, first, n)
    largest = _of_rows(quantities[2], b, h, first, n)
    score_max, score_mean = _of_rows(quantities[6], b, h, first, n), _of_rows(quantities[7], b, h, first, n)
    score_variance = _of_rows(quantities[8], b, h, first, n)
    has_sink = quantities[11].shape[0] > 0
    rows, several, masked, nonfinite, pairs = 0.0, 0.0, 0.0, 0.0, 0.0
    squared, shares, attended, uniform, score, score_squared = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    top = -np.inf
    for i in range(n):
        keys = last_key[i] - first_key[i]
        if not measured[i]:
            masked += keys <= 0
            nonfinite += keys > 0
            continue
        position = bin_of[i]
        h_i, mean = np.float64(entropy[i]), np.float64(score_mean[i])
        rows += 1
        pairs += keys
        squared += h_i * h_i
        attended += np.exp(entropy[i])
        uniform += uniform_distance[i]
        top = max(top, score_max[i])
        score += mean * keys
        score_squared += (score_variance[i] + mean * mean) * keys
        profile[0, _ENTROPY_AT + position] += h_i
        profile[1, _ENTROPY_AT + position] += 1
        profile[0, _DISTANCE_AT + position] += distance[i]
        profile[1, _DISTANCE_AT + position] += 1
        profile[0, _MAX_WEIGHT + _histogram_bin(largest[i])] += 1
        if keys >= 2:
            share = min(h_i / ln_of[keys + has_sink], 1.0)
            several += 1
            shares += share
            profile[0, _ENTROPY + _histogram_bin(share)] += 1
        steps[first_key[i] - first - i + n - 1] += 1
        steps[last_key[i] - first - i + n - 1] -= 1
    return (
        rows,
        several,
        masked,
        nonfinite,
        _total(entropy),
        squared,
        shares,
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
        top,
        pairs,
        score,
        score_squared,
    )


@njit(error_model="numpy", fastmath=FAST)
def _sum_offsets(offsets: Any, steps: Any, bin_of: Any, profile: Any) -> Any:
    """Self, previous, next, backward, forward; and the offset profile, mass and opportunity."""
    n = steps.shape[0] // 2
    middle = offsets.shape[0] // 2
    seen = 0
    backward, forward = 0.0, 0.0
    for place in range(2 * n - 1):
        d = place - (n - 1)
        mass = np.float64(offsets[middle + d])
        seen += steps[place]
        column = _OFFSET + (bin_of[d] if d >= 0 else -bin_of[-d])
        profile[0, column] += mass
        profile[1, column] += seen
        if d < 0:
            backward += mass
        elif d > 0:
            forward += mass
    if n < 2:
        return np.float64(offsets[middle]), 0.0, 0.0, backward, forward
    return (
        np.float64(offsets[middle]),
        np.float64(offsets[middle - 1]),
        np.float64(offsets[middle + 1]),
        backward,
        forward,
    )


@njit(error_model="numpy", fastmath=FAST)
def _sum_keys(
    received: Any, value_norm: Any, classes: Any, rows: Any, sink: Any, bin_of: Any, profile: Any, of_class: Any
) -> Any:
    """First; then the mean row's entropy, largest and its place, and what is written on the first key and on all."""
    n = received.shape[0]
    entropy, largest, place = 0.0, np.float32(-1), 0
    for j in range(n):
        if received[j] > largest:
            largest, place = received[j], j
        profile[0, _RECEIVED_AT + bin_of[j]] += received[j]
        profile[1, _RECEIVED_AT + bin_of[j]] += 1
    each = np.float32(1 / rows)
    for j in range(n):
        mean = received[j] * each
        entropy -= mean * ln(mean) if mean > np.float32(1e-37) else np.float32(0)
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
    array(boolean, 3),
    types.UniTuple(array(float32, 3), len(_ROWS)),
    array(float32, 3),
    array(float32, 3),
    array(float32, 3),
    array(int64, 1),
    array(int64, 1),
    array(int64, 3),
    array(int64, 3),
    array(float64, 3),
    array(int64, 2),
    array(float64, 1),
    array(int64, 1),
    array(float64, 3),
    array(float64, 3),
    fast=True,
)
def _sum_up(
    measured: Any,
    quantities: Any,
    received: Any,
    offsets: Any,
    value_norm: Any,
    start: Any,
    length: Any,
    first_key: Any,
    last_key: Any,
    uniform_distance: Any,
    classes: Any,
    ln_of: Any,
    bin_of: Any,
    values: Any,
    profiles: Any,
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
                first_key[b, h, rows],
                last_key[b, h, rows],
                uniform_distance[b, h, rows],
                ln_of,
                bin_of,
                steps,
                profile,
            )
            of_offsets = _sum_offsets(offsets[b, h], steps, bin_of, profile)
            place = len(of_rows) + len(of_offsets) + 1
            of_keys = _sum_keys(
                received[b, h, rows],
                _of_rows(value_norm, b, h, first, n),
                classes[b, rows] if classes.shape[0] > 0 else classes[:0, 0],
                of_rows[0],
                of_rows[16],
                bin_of,
                profile,
                out[place : place + _CLASSES],
            )
            for number, value in enumerate(of_rows + of_offsets + (of_keys[0],)):
                out[number] = value
            place += _CLASSES
            out[place : place + 2] = np.nan  # same token and induction, which the engine sums
            for number, value in enumerate(of_keys[1:]):
                out[place + 2 + number] = value
        profile[1, _ENTROPY : _ENTROPY + HISTOGRAM_BINS] = profile[0, _ENTROPY : _ENTROPY + HISTOGRAM_BINS]
        profile[1, _MAX_WEIGHT : _MAX_WEIGHT + HISTOGRAM_BINS] = profile[0, _MAX_WEIGHT : _MAX_WEIGHT + HISTOGRAM_BINS]
