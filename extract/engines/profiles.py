"""The additive profiles of a head: float64 sums that merge by addition, so that shards need no order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attlas.extract.engines.quantities import TOKEN_CLASSES

if TYPE_CHECKING:  # commands that only read the catalogue do not load torch
    from jaxtyping import Int
    from torch import Tensor

HISTOGRAM_BINS = 64
LARGEST_DOUBLING_BIN = 24  # positions and distances up to 2²³
OFFSET_BINS = 2 * LARGEST_DOUBLING_BIN + 1  # of signed distances; that of distance 0 is in the middle


@dataclass(frozen=True)
class Profile:
    """One profile: its bins, and what a bin is, sums and counts."""

    name: str
    numbers: range
    bins: str
    sum: str
    count: str


def doubling_bins(values: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Signed doubling bin of integers: 0, ±1, ±2, ±3 for 3–4, ±4 for 5–8, …"""
    size = values.abs()
    # the exponent of frexp is exact for integers, where log2 rounds near powers of two
    exponent = (size - 1).clamp_min(0).double().frexp().exponent.to(size.dtype)
    return values.sign() * (exponent + 1).where(size > 0, 0)


def doubling_bin_edges(number: int) -> tuple[int, int]:
    """First and last position (or distance) of a doubling bin: 0, 1, 2, 3–4, 5–8, … ; negative bins mirror them."""
    if number < 0:
        low, high = doubling_bin_edges(-number)
        return -high, -low
    return (number, number) if number < 3 else (2 ** (number - 2) + 1, 2 ** (number - 1))


_OFFSETS = range(-LARGEST_DOUBLING_BIN, LARGEST_DOUBLING_BIN + 1)
_POSITIONS = range(LARGEST_DOUBLING_BIN + 1)
_HISTOGRAM = range(HISTOGRAM_BINS)
_OFFSET_BINS = "signed distance d = j − i: 0, ±1, ±2, ±3 for 3–4, ±4 for 5–8, … doubling"
_POSITION_BINS = "position from 0: 0, 1, 2, 3 for 3–4, 4 for 5–8, … doubling"
_HISTOGRAM_BINS = "64 equal bins of [0, 1]; bin k holds [k/64, (k+1)/64), the last one is closed"
_ROWS = "rows at those positions"

PROFILES = (
    Profile("offset", _OFFSETS, _OFFSET_BINS, "Σ p at that distance", "visible (query, key) pairs at that distance"),
    Profile("entropy", _HISTOGRAM, _HISTOGRAM_BINS, "rows with H_i / ln m_i in the bin (m_i ≥ 2)", "the same"),
    Profile("max_weight", _HISTOGRAM, _HISTOGRAM_BINS, "rows with max_j p in the bin", "the same"),
    Profile("entropy_by_position", _POSITIONS, _POSITION_BINS, "Σ H_i, nats", _ROWS),
    Profile("distance_by_position", _POSITIONS, _POSITION_BINS, "Σ_i Σ_j p·|d|, tokens", _ROWS),
    Profile("received_by_position", _POSITIONS, _POSITION_BINS, "Σ_i p[i,j] of keys j", "keys at those positions"),
)

# measured if it is asked for: its sums are a row quantity of its own
CLASS_FLOW = Profile(
    "class_flow",
    range(len(TOKEN_CLASSES) ** 2),
    f"8·(class of the query) + class of the key; classes in the order {', '.join(TOKEN_CLASSES)}, from 0",
    "Σ_i Σ_j p of queries of the one class and keys of the other",
    "rows of the query's class",
)

# columns of all bins of all profiles
PROFILE_COLUMNS = tuple((p.name, number) for p in PROFILES for number in p.numbers)
COLUMN_OF_BIN = {bin_: column for column, bin_ in enumerate(PROFILE_COLUMNS)}
