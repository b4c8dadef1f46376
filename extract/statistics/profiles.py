"""The additive profiles of a head: float64 sums that merge by addition, so that shards need no order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from extract.statistics.attention import HeadObservation

HISTOGRAM_BINS = 64


@dataclass(frozen=True)
class Profile:
    """One profile: its bins and the function that sums an observation into them.

    `accumulate` gives (bin of each column, sums, counts): bins Int[bins], the others Float64[head, bins].
    """

    name: str
    bins: str
    sum: str
    count: str
    accumulate: Callable[[HeadObservation], tuple[Tensor, Tensor, Tensor]]


def doubling_bins(values: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Signed doubling bin of integers: 0, ±1, ±2, ±3 for 3–4, ±4 for 5–8, …"""
    size = values.abs()
    # the exponent of frexp is exact for integers, where log2 rounds near powers of two
    exponent = (size - 1).clamp_min(0).double().frexp().exponent.to(size.dtype)
    return values.sign() * (exponent + 1).where(size > 0, 0)


def _by_bin(
    bins: Int[Tensor, " n"], sums: Float[Tensor, "head n"], counts: Float[Tensor, "head n"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the columns that share a bin."""
    found, place = bins.unique(return_inverse=True)
    width = (sums.shape[0], found.shape[0])
    total = sums.new_zeros(width).index_add_(1, place, sums)
    return found, total, counts.new_zeros(width).index_add_(1, place, counts)


def _offset(o: HeadObservation) -> tuple[Tensor, Tensor, Tensor]:
    reach = o.rows.offsets.shape[-1] // 2
    distances = o.visibility.start.new_tensor(range(-reach, reach + 1))
    pairs = o.visibility.pairs_of(o.rows.measured)
    return _by_bin(doubling_bins(distances), o.rows.offsets.double().sum(0), pairs.double().sum(0))


def _histogram(values: Tensor, included: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = values.shape[1]
    bins = (values * HISTOGRAM_BINS).floor().clamp(0, HISTOGRAM_BINS - 1).long()
    head = bins.new_tensor(range(heads)).view(1, heads, 1)
    flat = (bins + head * HISTOGRAM_BINS)[included.expand_as(bins)]
    counts = flat.bincount(minlength=heads * HISTOGRAM_BINS).view(heads, HISTOGRAM_BINS).double()
    return bins.new_tensor(range(HISTOGRAM_BINS)), counts, counts


def _entropy(o: HeadObservation) -> tuple[Tensor, Tensor, Tensor]:
    return _histogram(o.entropy_share, o.several)


def _max_weight(o: HeadObservation) -> tuple[Tensor, Tensor, Tensor]:
    return _histogram(o.rows.max_weight, o.rows.measured)


def _by_position(o: HeadObservation, values: Tensor, included: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum [batch, head, token] values by doubling bins of the token's position."""
    heads = values.shape[1]
    bins = doubling_bins(o.visibility.positions.clamp_min(0)).reshape(-1)
    sums = values.double().transpose(0, 1).reshape(heads, -1)
    counts = included.expand_as(values).double().transpose(0, 1).reshape(heads, -1)
    return _by_bin(bins, sums, counts)


def _entropy_by_position(o: HeadObservation) -> tuple[Tensor, Tensor, Tensor]:
    return _by_position(o, o.rows.entropy, o.rows.measured)


def _distance_by_position(o: HeadObservation) -> tuple[Tensor, Tensor, Tensor]:
    return _by_position(o, o.rows.distance, o.rows.measured)


def _received_by_position(o: HeadObservation) -> tuple[Tensor, Tensor, Tensor]:
    return _by_position(o, o.rows.received, o.visibility.real[:, None, :])


_OFFSET_BINS = "signed distance d = j − i: 0, ±1, ±2, ±3 for 3–4, ±4 for 5–8, … doubling"
_POSITION_BINS = "position from 0: 0, 1, 2, 3 for 3–4, 4 for 5–8, … doubling"
_HISTOGRAM_BINS = "64 equal bins of [0, 1]; bin k holds [k/64, (k+1)/64), the last one is closed"

PROFILES = (
    Profile("offset", _OFFSET_BINS, "Σ p at that distance", "visible (query, key) pairs at that distance", _offset),
    Profile("entropy", _HISTOGRAM_BINS, "rows with H_i / ln m_i in the bin (m_i ≥ 2)", "the same", _entropy),
    Profile("max_weight", _HISTOGRAM_BINS, "rows with max_j p in the bin", "the same", _max_weight),
    Profile("entropy_by_position", _POSITION_BINS, "Σ H_i, nats", "rows at those positions", _entropy_by_position),
    Profile(
        "distance_by_position",
        _POSITION_BINS,
        "Σ_i Σ_j p·|d|, tokens",
        "rows at those positions",
        _distance_by_position,
    ),
    Profile(
        "received_by_position", _POSITION_BINS, "Σ_i p[i,j] of keys j", "keys at those positions", _received_by_position
    ),
)
