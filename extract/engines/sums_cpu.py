"""Compiled head sums: the results of `sums.head_sums` in one pass over the rows of each head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from numba import boolean, float32, float64, int64, njit, prange, types

from attlas.extract.engines import sums
from attlas.extract.engines.compiled import FAST, array, exp, kernel, ln, places
from attlas.extract.engines.cpu_kernel import QUANTITIES as ROW_ARRAYS
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.profiles import (
    COLUMN_OF_BIN,
    HISTOGRAM_BINS,
    LARGEST_DOUBLING_BIN,
    OFFSET_BINS,
    PROFILE_COLUMNS,
    doubling_bin_edges,
)
from attlas.extract.engines.quantities import TOKEN_CLASSES
from attlas.extract.engines.sums import HeadSums, head_quantity

# the head quantities that the kernel makes; others are computed in torch
MAKES = (
    "rows",
    "several",
    "masked",
    "nonfinite",
    "entropy",
    "entropy_squared",
    "entropy_share",
    "attended",
    "collision",
    "max_weight",
    "distance",
    "offset",
    "offset_std",
    "uniform_distance",
    "context_norm",
    "output_norm",
    "sink",
    "score_max",
    "pairs",
    "score",
    "score_squared",
    "self",
    "previous",
    "next",
    "backward",
    "forward",
    "first",
    "received_entropy",
    "received_max",
    "received_max_key",
    "written_first",
    "written",
)
_AT, _ROW = places(MAKES), places(ROW_ARRAYS)
# columns of bin 0 of each profile
_OFFSET, _ENTROPY, _MAX_WEIGHT = (COLUMN_OF_BIN[name, 0] for name in ("offset", "entropy", "max_weight"))
_ENTROPY_AT, _DISTANCE_AT, _RECEIVED_AT = (
    COLUMN_OF_BIN[f"{name}_by_position", 0] for name in ("entropy", "distance", "received")
)
# numba gives float64 for a float and a float32, unlike NumPy's stubs
_Sum = float | np.floating
_ABSENT = torch.zeros(0, 0, 0)  # placeholder for unknown quantities
# row quantities that the kernel always takes, known or not
_ALWAYS_READ = ("entropy", "max_weight", "distance", "score_max", "score_mean", "score_variance")
_NO_CLASSES = torch.zeros(0, 0, dtype=torch.int64)


def head_sums(o: HeadObservation, names: Sequence[str], *, profiles: bool) -> HeadSums:
    """The named head quantities and the profiles of an observation on the CPU.

    A mask with holes, cross-attention and float64 are computed in torch, and so is each quantity that is not compiled.
    """
    measured = o.rows.measured
    is_float32 = all(values.dtype == torch.float32 for name, values in o.rows.quantities.items() if name in ROW_ARRAYS)
    if (
        o.visibility.is_cross_attention
        or o.visibility.allowed is not None
        or not is_float32
        or measured.device.type != "cpu"
    ):
        return sums.head_sums(o, names, profiles=profiles)
    compiled, of_classes, of_profiles = _compiled_sums(o)
    made = dict(zip((*MAKES, *TOKEN_CLASSES), (*compiled, *of_classes), strict=True))
    values = np.full((len(names), *compiled.shape[1:]), np.nan)
    for place, name in enumerate(names):
        quantity = head_quantity(name)
        if quantity.is_known(o):
            values[place] = made[name] if name in made else quantity.compute(o).numpy()
    return HeadSums(torch.from_numpy(values), torch.from_numpy(of_profiles)[None] if profiles else None)


def _compiled_sums(
    o: HeadObservation,
) -> tuple[
    Float64[np.ndarray, "quantity batch head"],
    Float64[np.ndarray, "class batch head"],
    Float64[np.ndarray, "2 head column"],
]:
    """Head quantities in the order of MAKES, the sums of token classes, and profiles."""
    rows, visibility = o.rows, o.visibility
    batch, heads, tokens = rows.measured.shape
    values, of_classes = np.empty((len(MAKES), batch, heads)), np.empty((len(TOKEN_CLASSES), batch, heads))
    profiles = np.empty((2, heads, len(PROFILE_COLUMNS)))
    nothing = torch.zeros(rows.measured.shape)

    def array_of(name: str, otherwise: torch.Tensor) -> np.ndarray:
        known = rows.get(name)
        return (otherwise if known is None else known.contiguous()).numpy()

    _sum_up(
        rows.measured.contiguous().numpy(),
        tuple(array_of(name, nothing if name in _ALWAYS_READ else _ABSENT) for name in ROW_ARRAYS),
        array_of("received", nothing),
        array_of("offset_bins", torch.zeros(batch, heads, OFFSET_BINS)),
        array_of("value_norm", _ABSENT),
        visibility.keys.start.numpy(),
        visibility.keys.length.numpy(),
        *(
            t.expand(batch, -1, tokens).contiguous().numpy()
            for t in (visibility.first, visibility.last, visibility.uniform_distance)
        ),
        (_NO_CLASSES if o.classes is None else o.classes).numpy(),
        np.log(np.arange(tokens + 2).clip(2)).astype(np.float32),
        _EDGES,
        values,
        of_classes,
        profiles,
    )
    return values, of_classes, profiles


# position before which each doubling bin ends: 1, 2, 3, 5, 9, …
_EDGES = np.array([doubling_bin_edges(number)[1] + 1 for number in range(LARGEST_DOUBLING_BIN + 1)])


def _rowed(kind: types.Type) -> types.Array:
    """[batch, head, token] with contiguous tokens, so that loops over them are vectorised."""
    return types.Array(kind, 3, "C")


@njit(error_model="numpy")
def _histogram_bin(share: np.float32) -> int:
    return min(max(int(share * HISTOGRAM_BINS), 0), HISTOGRAM_BINS - 1)


@njit(error_model="numpy", fastmath=FAST)
def _total(x: Float32[np.ndarray, " query"]) -> float:
    """Σ x in float64; NaN if the quantity is unknown."""
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
    out: Float64[np.ndarray, " quantity"],
) -> None:
    """Write sums over rows to `out`, add row profiles, and count the pairs that begin and end at each distance.

    A row that is not measured holds zeros.
    """
    n = measured.shape[0]
    entropy = _of_rows(quantities[_ROW.entropy], b, h, first, n)
    distance = _of_rows(quantities[_ROW.distance], b, h, first, n)
    largest = _of_rows(quantities[_ROW.max_weight], b, h, first, n)
    score_max = _of_rows(quantities[_ROW.score_max], b, h, first, n)
    score_mean = _of_rows(quantities[_ROW.score_mean], b, h, first, n)
    score_variance = _of_rows(quantities[_ROW.score_variance], b, h, first, n)
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
    outcomes = 1 if quantities[_ROW.sink].shape[0] > 0 else 0
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
    out[_AT.rows], out[_AT.several], out[_AT.masked], out[_AT.nonfinite] = rows, several, masked, nonfinite
    out[_AT.entropy], out[_AT.entropy_squared], out[_AT.entropy_share] = _total(entropy), squared, total_share
    out[_AT.attended] = attended
    out[_AT.collision] = _total(_of_rows(quantities[_ROW.collision], b, h, first, n))
    out[_AT.max_weight] = _total(largest)
    out[_AT.distance] = _total(distance)
    out[_AT.offset] = _total(_of_rows(quantities[_ROW.offset], b, h, first, n))
    out[_AT.offset_std] = _total(_of_rows(quantities[_ROW.offset_std], b, h, first, n))
    out[_AT.uniform_distance] = uniform
    out[_AT.context_norm] = _total(_of_rows(quantities[_ROW.context_norm], b, h, first, n))
    out[_AT.output_norm] = _total(_of_rows(quantities[_ROW.output_norm], b, h, first, n))
    out[_AT.sink] = _total(_of_rows(quantities[_ROW.sink], b, h, first, n))
    out[_AT.score_max] = top
    out[_AT.pairs], out[_AT.score], out[_AT.score_squared] = pairs, score, score_squared


@njit(error_model="numpy", fastmath=FAST)
def _sum_offsets(
    bins: Float32[np.ndarray, " bin"],
    steps: Int64[np.ndarray, " step"],
    edges: Int64[np.ndarray, " bin"],
    profile: Float64[np.ndarray, "2 column"],
    out: Float64[np.ndarray, " quantity"],
) -> None:
    """Masses on self, previous, next, backward and forward; and mass and opportunity of the offset profile."""
    n = steps.shape[0] // 2
    middle = bins.shape[0] // 2
    for place in range(1, 2 * n):  # accumulate steps up and down into numbers of pairs
        steps[place] += steps[place - 1]
    backward, forward = 0.0, 0.0
    begin = 0
    for number in range(edges.shape[0]):
        if begin >= n:
            break
        end = min(edges[number], n)
        pairs_up, pairs_down = 0, 0
        for d in range(begin, end):
            pairs_up += steps[n - 1 + d]
        profile[0, _OFFSET + number] += bins[middle + number]
        profile[1, _OFFSET + number] += pairs_up
        if number > 0:
            for d in range(begin, end):
                pairs_down += steps[n - 1 - d]
            profile[0, _OFFSET - number] += bins[middle - number]
            profile[1, _OFFSET - number] += pairs_down
            forward += bins[middle + number]
            backward += bins[middle - number]
        begin = end
    out[_AT.self], out[_AT.previous], out[_AT.next] = bins[middle], bins[middle - 1], bins[middle + 1]
    out[_AT.backward], out[_AT.forward] = backward, forward


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
    out: Float64[np.ndarray, " quantity"],
) -> None:
    """Mass on the first key and by class; entropy, maximum and its place of the mean row; norms written by the first and all keys."""
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
        # smaller terms are below the resolution of float32
        entropy -= mean * ln(mean) if mean > np.float32(1e-30) else np.float32(0)
    of_class[:] = 0.0 if classes.shape[0] > 0 else np.nan
    for j in range(classes.shape[0]):
        of_class[classes[j]] += received[j]
    if sink > 0:
        entropy -= sink / rows * np.log(sink / rows)
    written = 0.0 if value_norm.shape[0] > 0 else np.nan
    for j in range(value_norm.shape[0]):
        written += np.float64(received[j]) * value_norm[j]
    out[_AT.first] = received[0]
    out[_AT.written] = written
    out[_AT.written_first] = np.float64(received[0]) * value_norm[0] if value_norm.shape[0] > 0 else np.nan
    if rows == 0:
        out[_AT.received_entropy], out[_AT.received_max], out[_AT.received_max_key] = np.nan, np.nan, np.nan
    else:
        out[_AT.received_entropy] = max(entropy, 0.0)
        out[_AT.received_max], out[_AT.received_max_key] = largest / rows, np.float64(place)


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
    array(float64, 3),
    fast=True,
)
def _sum_up(
    measured: Bool[np.ndarray, "batch head query"],
    quantities: tuple[Float32[np.ndarray, "batch head query"], ...],
    received: Float32[np.ndarray, "batch head key"],
    bins: Float32[np.ndarray, "batch head bin"],
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
    of_classes: Float64[np.ndarray, "class batch head"],
    profiles: Float64[np.ndarray, "2 head column"],
) -> None:
    # one head at a time and its sequences in order, so that sums do not depend on the number of threads
    for h in prange(measured.shape[1]):
        profile = profiles[:, h]
        profile[:] = 0.0
        for b in range(measured.shape[0]):
            first, n = start[b], length[b]
            rows = slice(first, first + n)
            steps = np.zeros(2 * n, np.int64)
            out = values[:, b, h]
            _sum_rows(
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
                out,
            )
            _sum_offsets(bins[b, h], steps, edges, profile, out)
            _sum_keys(
                received[b, h, rows],
                _of_rows(value_norm, b, h, first, n),
                classes[b, rows] if classes.shape[0] > 0 else classes[:0, 0],
                np.float64(out[_AT.rows]),
                np.float64(out[_AT.sink]),
                edges,
                profile,
                of_classes[:, b, h],
                out,
            )
        profile[1, _DISTANCE_AT : _DISTANCE_AT + edges.shape[0]] = profile[
            1, _ENTROPY_AT : _ENTROPY_AT + edges.shape[0]
        ]
        profile[1, _ENTROPY : _ENTROPY + HISTOGRAM_BINS] = profile[0, _ENTROPY : _ENTROPY + HISTOGRAM_BINS]
        profile[1, _MAX_WEIGHT : _MAX_WEIGHT + HISTOGRAM_BINS] = profile[0, _MAX_WEIGHT : _MAX_WEIGHT + HISTOGRAM_BINS]
