"""Head sums on a GPU: the results of `engines.sums.head_sums`, one program for each head of a sequence."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from attlas.extract.engines.profiles import COLUMN_OF_BIN, HISTOGRAM_BINS, LARGEST_DOUBLING_BIN, PROFILE_COLUMNS
from attlas.extract.engines.quantities import TOKEN_CLASSES
from attlas.extract.engines.triton import rows as of_rows
from attlas.extract.engines.triton.columns import BINS, MIDDLE, bin_of
from attlas.extract.engines.triton.tiles import load_bounds

# the head quantities that the kernel makes
MADE = (
    "rows",
    "several",
    "masked",
    "nonfinite",
    "attended",
    "entropy_squared",
    "entropy_share",
    "uniform_distance",
    "pairs",
    "score",
    "score_squared",
    "score_max",
    "self",
    "previous",
    "next",
    "backward",
    "forward",
    "same_token",
    "induction",
    "first",
    "received_entropy",
    "received_max",
    "received_max_key",
    "written_first",
    "written",
    *TOKEN_CLASSES,
    # sums of rows, in the order of `rows.QUANTITIES`
    "entropy",
    "collision",
    "max_weight",
    "distance",
    "offset",
    "offset_std",
    "largest_score",  # not a head quantity: it is the sum of `score_max`
    "score_mean",
    "score_variance",
    "sink",
    "context_norm",
    "output_norm",
)
_ROWS = tl.constexpr(MADE.index("rows"))
# sums of parts stand where what is made of them goes
_TOP = tl.constexpr(MADE.index("score_max"))
_LOGS = tl.constexpr(MADE.index("received_entropy"))
_LARGEST = tl.constexpr(MADE.index("received_max"))
_LARGEST_KEY = tl.constexpr(MADE.index("received_max_key"))
_WRITTEN = tl.constexpr(MADE.index("written"))
_RECEIVED_MASS = tl.constexpr(len(MADE))
_SELF = tl.constexpr(MADE.index("self"))
_CLASSES = tl.constexpr(MADE.index(TOKEN_CLASSES[0]))
_CLASS_COUNT = tl.constexpr(len(TOKEN_CLASSES))
_OF_ROWS = tl.constexpr(MADE.index("entropy"))
_SUMMED = tl.constexpr(of_rows.QUANTITIES.index("output_norm") + 1)
VALUES = 64  # a power of two that holds them all
_VALUES = tl.constexpr(VALUES)
_ENTROPY = tl.constexpr(of_rows.QUANTITIES.index("entropy"))
_MAX_WEIGHT = tl.constexpr(of_rows.QUANTITIES.index("max_weight"))
_DISTANCE = tl.constexpr(of_rows.QUANTITIES.index("distance"))
_SCORE_MAX = tl.constexpr(of_rows.QUANTITIES.index("score_max"))
_SCORE_MEAN = tl.constexpr(of_rows.QUANTITIES.index("score_mean"))
_SCORE_VARIANCE = tl.constexpr(of_rows.QUANTITIES.index("score_variance"))
_PART = of_rows.PART
_SINK = tl.constexpr(of_rows.QUANTITIES.index("sink"))

COLUMNS = tl.constexpr(len(PROFILE_COLUMNS))
_HISTOGRAM = tl.constexpr(HISTOGRAM_BINS)
_POSITIONS = tl.constexpr(32)  # a power of two that holds all bins of positions
_POSITION_BINS = tl.constexpr(LARGEST_DOUBLING_BIN + 1)
_OFFSET_BINS = tl.constexpr(2 * LARGEST_DOUBLING_BIN + 1)
# columns of the first bin of each profile
_OFFSETS = tl.constexpr(COLUMN_OF_BIN["offset", -LARGEST_DOUBLING_BIN])
_SHARES = tl.constexpr(COLUMN_OF_BIN["entropy", 0])
_WEIGHTS = tl.constexpr(COLUMN_OF_BIN["max_weight", 0])
_ENTROPY_AT = tl.constexpr(COLUMN_OF_BIN["entropy_by_position", 0])
_DISTANCE_AT = tl.constexpr(COLUMN_OF_BIN["distance_by_position", 0])
_RECEIVED_AT = tl.constexpr(COLUMN_OF_BIN["received_by_position", 0])


@triton.jit
def _sum_to(n):
    """1 + 2 + … + n; 0 for n ≤ 0."""
    n = tl.maximum(n, 0)
    return n * (n + 1) // 2


@triton.jit
def _first_of_bin(bins):
    """The smallest distance of a doubling bin from 0 on; also the one after the largest of the bin before."""
    return tl.where(bins < 3, bins, (1 << tl.minimum(tl.maximum(bins - 2, 0), 24)) + 1)


@triton.jit
def _put(profile, column, values, numbers, COUNT: tl.constexpr):
    tl.store(profile + column + numbers, values, mask=numbers < COUNT)


@triton.jit
def _add_bins(sums, bins, values, numbers):
    """Add values to the bins of these numbers."""
    return sums + tl.sum(tl.where(bins[:, None] == numbers[None, :], values[:, None], 0), 0)


@triton.jit
def _bins_of_head(bins, bh, lines):
    """Mass by doubling bin of the distance, over all rows."""
    in_bins = tl.zeros([BINS], tl.float64)
    for line in range(lines):
        in_bins += tl.load(bins + (bh.to(tl.int64) * lines + line) * BINS + tl.arange(0, BINS)).to(tl.float64)
    return in_bins


@triton.jit
def _at(sums, number, place):
    """One number of a vector."""
    return tl.sum(tl.where(number == place, sums, 0), 0)


@triton.jit(do_not_specialize=["batch", "heads", "tokens", "lines", "tiles", "parts", "part_rows"])
def sum_rows_and_keys(
    slab, bounds, start, length, classes, places, sums_of_parts, values, profiles,
    bounds_batch, bounds_head, bounds_plane, of_keys, bins, looked_up, batch, heads, tokens, lines, tiles, parts, part_rows,
    HAS_SINK: tl.constexpr,
    HAS_WRITE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Sums over some rows and keys of one head of one sequence, and their profiles.

    With one part, `values` are written as `finish_head` writes them; with several, their sums go to `sums_of_parts`, float64
    [batch, head, part, VALUES]. `profiles` is float32 [batch, part, 2, head, column], or None.
    """
    bh, number_of_part = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    plane = batch.to(tl.int64) * heads * tokens
    quantities = slab + bh.to(tl.int64) * tokens
    received_by = slab + of_keys + bh.to(tl.int64) * tokens
    bounds += b * bounds_batch + h * bounds_head
    begin = tl.load(start + b).to(tl.int32)
    end = begin + tl.load(length + b).to(tl.int32)
    low, high = tl.maximum(begin, number_of_part * part_rows), tl.minimum(end, (number_of_part + 1) * part_rows)
    number = tl.arange(0, _VALUES)
    sums = tl.zeros([_VALUES], tl.float64)
    top = tl.full([], -float("inf"), tl.float32)
    received_logs, received_mass = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    written = tl.zeros([], tl.float64)
    largest, largest_key = tl.full([], -1.0, tl.float32), tl.zeros([], tl.int32)
    in_classes = tl.zeros([_CLASS_COUNT], tl.float64)
    class_number = tl.arange(0, _CLASS_COUNT)
    if profiles is not None:
        profiles += (((b * parts + number_of_part) * 2) * heads + h) * COLUMNS
        positions = tl.arange(0, _POSITIONS)
        shares = tl.zeros([_HISTOGRAM], tl.float32)
        weights = tl.zeros([_HISTOGRAM], tl.float32)
        of_histogram = tl.arange(0, _HISTOGRAM)
        entropies = tl.zeros([_POSITIONS], tl.float32)
        distances = tl.zeros([_POSITIONS], tl.float32)
        counts = tl.zeros([_POSITIONS], tl.float32)
        received_at = tl.zeros([_POSITIONS], tl.float32)
        keys_at = tl.zeros([_POSITIONS], tl.float32)
        pairs_at = tl.zeros([BINS], tl.float32)
        offset = tl.arange(0, BINS) - MIDDLE
        size = tl.abs(offset)
        nearest, farthest = _first_of_bin(size), _first_of_bin(size + 1) - 1
        lowest = tl.where(offset < 0, -farthest, nearest)
        highest = tl.where(offset < 0, -nearest, farthest)
    for at in range(low // ROWS * ROWS, high, ROWS):
        rows = at + tl.arange(0, ROWS)
        real = (rows >= low) & (rows < high)
        ok = tl.load(quantities + _PART * plane + rows, mask=real, other=0) > 0
        first, last = load_bounds(bounds, bounds_plane, rows, tokens)
        seen = tl.where(real, tl.maximum(last - first, 0), 0)
        keys = tl.where(ok, seen, 0)
        entropy = tl.load(quantities + _ENTROPY * plane + rows, mask=ok, other=0)
        several = keys >= 2
        outcomes = tl.maximum(keys + HAS_SINK, 2).to(tl.float32)
        share = tl.where(several, tl.minimum(entropy / tl.log(outcomes), 1), 0)
        before = _sum_to(rows - first) - _sum_to(rows - last)
        after = _sum_to(last - 1 - rows) - _sum_to(first - 1 - rows)
        uniform = (before + after).to(tl.float32) / tl.maximum(seen, 1).to(tl.float32)
        score_mean = tl.load(quantities + _SCORE_MEAN * plane + rows, mask=ok, other=0).to(tl.float64)
        score_variance = tl.load(quantities + _SCORE_VARIANCE * plane + rows, mask=ok, other=0)
        score_max = tl.load(quantities + _SCORE_MAX * plane + rows, mask=ok, other=-float("inf"))
        top = tl.maximum(top, tl.max(score_max, 0))
        of_row = (
            ok.to(tl.float32),
            several.to(tl.float32),
            (real & (seen == 0)).to(tl.float32),
            ((seen > 0) & (ok == 0)).to(tl.float32),
            tl.where(ok, tl.exp(entropy), 0),
            entropy.to(tl.float64) * entropy,
            share,
            tl.where(ok, uniform, 0),
            keys.to(tl.float32),
            score_mean * keys,
            (score_variance + score_mean * score_mean) * keys,
        )
        for n in tl.static_range(len(of_row)):
            sums += tl.where(number == _ROWS + n, tl.sum(of_row[n], 0).to(tl.float64), 0)
        for n in tl.static_range(_SUMMED):
            if (n != _SINK or HAS_SINK) and (n != _SUMMED - 1 or HAS_WRITE):
                of_quantity = tl.load(quantities + n * plane + rows, mask=ok, other=0)
                if n == _ENTROPY:  # its variance is a difference of large sums
                    of_quantity = of_quantity.to(tl.float64)
                sums += tl.where(number == _OF_ROWS + n, tl.sum(of_quantity, 0).to(tl.float64), 0)

        received = tl.load(received_by + rows, mask=real, other=0)
        received_mass += tl.sum(received, 0)
        # smaller terms are below the resolution of float32
        received_logs += tl.sum(tl.where(received > 1e-30, received * tl.log(tl.maximum(received, 1e-30)), 0), 0)
        most = tl.max(tl.where(real, received, -1), 0)
        place = tl.min(tl.where(real & (received == most), rows, tokens), 0)
        largest_key = tl.where(most > largest, place, largest_key)
        largest = tl.maximum(largest, most)
        if HAS_WRITE:
            written += tl.sum(received * tl.load(received_by + plane + rows, mask=real, other=0), 0)
        if classes is not None:
            of_class = tl.load(classes + b * tokens + rows, mask=real, other=-1).to(tl.int32)
            masses = tl.sum(tl.where(of_class[:, None] == class_number[None, :], received[:, None], 0), 0)
            in_classes += masses.to(tl.float64)
        if profiles is not None:
            ones, none = tl.full([ROWS], 1.0, tl.float32), tl.full([ROWS], -1, tl.int32)
            of_share = tl.where(several, tl.minimum((share * _HISTOGRAM).to(tl.int32), _HISTOGRAM - 1), none)
            shares = _add_bins(shares, of_share, ones, of_histogram)
            weight = tl.load(quantities + _MAX_WEIGHT * plane + rows, mask=ok, other=0)
            of_weight = tl.where(ok, tl.minimum((weight * _HISTOGRAM).to(tl.int32), _HISTOGRAM - 1), none)
            weights = _add_bins(weights, of_weight, ones, of_histogram)
            distance = tl.load(quantities + _DISTANCE * plane + rows, mask=ok, other=0)
            position = tl.where(real, bin_of(rows - begin), none)
            of_measured = tl.where(ok, position, none)
            entropies = _add_bins(entropies, of_measured, entropy, positions)
            distances = _add_bins(distances, of_measured, distance, positions)
            counts = _add_bins(counts, of_measured, ones, positions)
            received_at = _add_bins(received_at, position, received, positions)
            keys_at = _add_bins(keys_at, position, ones, positions)
            nearer = tl.maximum((first - rows)[:, None], lowest[None, :])
            farther = tl.minimum((last - 1 - rows)[:, None], highest[None, :])
            pairs_at += tl.sum(tl.where(ok[:, None], tl.maximum(farther - nearer + 1, 0), 0).to(tl.float32), 0)

    of_part = (top, received_logs, largest, largest_key, written, received_mass)
    of_places = (_TOP, _LOGS, _LARGEST, _LARGEST_KEY, _WRITTEN, _RECEIVED_MASS)
    for n in tl.static_range(len(of_part)):
        sums += tl.where(number == of_places[n], of_part[n].to(tl.float64), 0)
    for n in tl.static_range(_CLASS_COUNT):
        sums += tl.where(number == _CLASSES + n, _at(in_classes, class_number, n), 0)
    if sums_of_parts is None:
        _finish(
            sums, slab, places, values, bh, begin, end, of_keys, bins, looked_up, batch, heads, tokens, lines, tiles,
            HAS_SINK, HAS_WRITE, HAS_IDS,
        )  # fmt: skip
    else:
        tl.store(sums_of_parts + (bh.to(tl.int64) * parts + number_of_part) * _VALUES + number, sums)

    if profiles is not None:
        counted = profiles + heads.to(tl.int64) * COLUMNS
        in_bins = tl.zeros([BINS], tl.float64)
        if number_of_part == 0:
            in_bins = _bins_of_head(slab + bins, bh, lines)
        _put(profiles, _OFFSETS, in_bins.to(tl.float32), tl.arange(0, BINS), _OFFSET_BINS)
        _put(counted, _OFFSETS, pairs_at, tl.arange(0, BINS), _OFFSET_BINS)
        for half in tl.static_range(2):
            _put(profiles + half * heads.to(tl.int64) * COLUMNS, _SHARES, shares, of_histogram, _HISTOGRAM)
            _put(profiles + half * heads.to(tl.int64) * COLUMNS, _WEIGHTS, weights, of_histogram, _HISTOGRAM)
        _put(profiles, _ENTROPY_AT, entropies, positions, _POSITION_BINS)
        _put(counted, _ENTROPY_AT, counts, positions, _POSITION_BINS)
        _put(profiles, _DISTANCE_AT, distances, positions, _POSITION_BINS)
        _put(counted, _DISTANCE_AT, counts, positions, _POSITION_BINS)
        _put(profiles, _RECEIVED_AT, received_at, positions, _POSITION_BINS)
        _put(counted, _RECEIVED_AT, keys_at, positions, _POSITION_BINS)


@triton.jit(do_not_specialize=["batch", "heads", "tokens", "lines", "tiles", "parts"])
def finish_head(
    slab, start, length, places, sums_of_parts, values,
    of_keys, bins, looked_up, batch, heads, tokens, lines, tiles, parts,
    HAS_SINK: tl.constexpr,
    HAS_WRITE: tl.constexpr,
    HAS_IDS: tl.constexpr,
):  # fmt: skip
    """The head quantities of one head of one sequence, from the sums of its parts."""
    bh = tl.program_id(0)
    b = (bh // heads).to(tl.int64)
    begin = tl.load(start + b).to(tl.int32)
    end = begin + tl.load(length + b).to(tl.int32)
    number = tl.arange(0, _VALUES)
    is_maximum = (number == _TOP) | (number == _LARGEST)
    sums = tl.where(is_maximum, -float("inf"), tl.zeros([_VALUES], tl.float64))
    for part in range(parts):
        of_part = tl.load(sums_of_parts + (bh.to(tl.int64) * parts + part) * _VALUES + number)
        is_new = _at(of_part, number, _LARGEST) > tl.max(tl.where(number == _LARGEST, sums, -float("inf")), 0)
        key = tl.where(is_new, of_part, sums)
        together = tl.where(is_maximum, tl.maximum(sums, of_part), sums + of_part)
        sums = tl.where(number == _LARGEST_KEY, key, together)
    _finish(
        sums, slab, places, values, bh, begin, end, of_keys, bins, looked_up, batch, heads, tokens, lines, tiles,
        HAS_SINK, HAS_WRITE, HAS_IDS,
    )  # fmt: skip


@triton.jit
def _finish(
    sums, slab, places, values, bh, begin, end, of_keys, bins, looked_up, batch, heads, tokens, lines, tiles,
    HAS_SINK: tl.constexpr, HAS_WRITE: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Write the quantities of one head, from the sums over all its rows and keys.

    `values` is float64 [quantity, batch, head]. `places` says for each of MADE where it goes: to place // 2, or nowhere if it
    is negative; as NaN if it is odd.
    """
    number = tl.arange(0, _VALUES)
    received_by = slab + of_keys + bh.to(tl.int64) * tokens
    measured = _at(sums, number, _ROWS)
    count = tl.maximum(measured, 1)
    # −Σ p̄ ln p̄ with p̄ = received / count
    entropy = (tl.log(count) * _at(sums, number, _RECEIVED_MASS) - _at(sums, number, _LOGS)) / count
    if HAS_SINK:
        sink = _at(sums, number, _OF_ROWS + _SINK) / count
        entropy -= tl.where(sink > 0, sink * tl.log(tl.maximum(sink, 1e-300)), 0)
    undefined = tl.where(measured > 0, 0.0, float("nan")).to(tl.float64)
    largest = tl.max(tl.where(number == _LARGEST, sums, -float("inf")), 0)
    key = _at(sums, number, _LARGEST_KEY)
    first = tl.load(received_by + begin, mask=end > begin, other=0).to(tl.float64)
    written_first = first
    if HAS_WRITE:
        plane = batch.to(tl.int64) * heads * tokens
        written_first *= tl.load(received_by + plane + begin, mask=end > begin, other=0)
    in_bins, of_bin = _bins_of_head(slab + bins, bh, lines), tl.arange(0, BINS) - MIDDLE
    same, induction = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    if HAS_IDS:
        for tile in range(tiles):
            found = slab + looked_up + (bh.to(tl.int64) * tiles + tile) * 2
            same += tl.load(found).to(tl.float64)
            induction += tl.load(found + 1).to(tl.float64)
    made = (
        _at(in_bins, of_bin, 0),
        _at(in_bins, of_bin, -1),
        _at(in_bins, of_bin, 1),
        tl.sum(tl.where(of_bin < 0, in_bins, 0), 0),
        tl.sum(tl.where(of_bin > 0, in_bins, 0), 0),
        same,
        induction,
        first,
        tl.maximum(entropy, 0) + undefined,
        largest / count + undefined,
        key - begin + undefined,
        written_first,
    )
    for n in tl.static_range(len(made)):
        sums = tl.where(number == _SELF + n, made[n].to(tl.float64), sums)
    place = tl.load(places + number)
    sums = tl.where(place % 2 != 0, float("nan"), sums)
    tl.store(values + (place // 2).to(tl.int64) * batch * heads + bh, sums, mask=place >= 0)
