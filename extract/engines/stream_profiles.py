"""The additive profiles of a residual site: counts of tokens, which merge by addition, so that shards need no order."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from attlas.extract.engines.profiles import Profile

if TYPE_CHECKING:  # commands that only read the catalogue do not load torch
    from jaxtyping import Float, Int
    from torch import Tensor

    from attlas.extract.engines.observations import ResidualObservation

_LARGEST_NORM_BIN = 128  # norms from 2⁻³² to 2³²
_LARGEST_DECADE = 12

TOKEN_NORM = Profile(
    "token_norm",
    range(-_LARGEST_NORM_BIN, _LARGEST_NORM_BIN + 1),
    f"⌊4·log₂ ‖x'‖⌋, within ±{_LARGEST_NORM_BIN}",
    "tokens with ‖x'‖ in the bin; ‖x'‖ = 0 has none",
    "the same",
)
MASSIVE = Profile(
    "massive",
    range(_LARGEST_DECADE + 1),
    f"⌊log₁₀ (max|x'| ÷ median|x'|)⌋ of a token, at most {_LARGEST_DECADE}; the median is the lower of two middle ones",
    "tokens in the bin; x' = 0 has none",
    "the same",
)
STREAM_PROFILES = (TOKEN_NORM, MASSIVE)


class SiteSums(NamedTuple):
    """What is measured of a residual site: its columns in float64, NaN where undefined, and counts of tokens by profile.

    `counts` [part, bin] are those of `TOKEN_NORM`, in parts to be added up; None if they were not asked for.
    """

    values: Float[Tensor, "column batch"]
    counts: Float[Tensor, "part bin"] | None = None


def norm_bins(squares: Float[Tensor, "*token"]) -> Int[Tensor, "*token"]:
    """The bin of `TOKEN_NORM` of each token, from ‖x'‖², as a place from 0; one beyond the last bin where it has none."""
    bins = (2 * squares.log2()).floor().clamp(-_LARGEST_NORM_BIN, _LARGEST_NORM_BIN) + _LARGEST_NORM_BIN
    has_bin = (squares > 0) & squares.isfinite()
    return bins.where(has_bin, len(TOKEN_NORM.numbers)).long()


def count_norms(o: ResidualObservation) -> Float[Tensor, "1 bin"]:
    """The tokens in each bin of `TOKEN_NORM`."""
    return counts_of(norm_bins(o.after_norms.double().square()), o, bins=len(TOKEN_NORM.numbers))


def count_decades(o: ResidualObservation) -> Float[Tensor, "1 bin"]:
    """The tokens in each bin of `MASSIVE`."""
    size = o.after.abs()
    decades = (size.amax(-1).double() / lower_median(size).double()).log10().floor()
    has_bin = (size.amax(-1) > 0) & size.amax(-1).isfinite()
    bins = decades.clamp(0, _LARGEST_DECADE).where(has_bin, _LARGEST_DECADE + 1).long()
    return counts_of(bins, o, bins=_LARGEST_DECADE + 1)


def lower_median(x: Float[Tensor, "*token width"]) -> Float[Tensor, "*token"]:
    """The median over the last dimension, of two middle ones the lower."""
    import torch

    if x.device.type != "cpu":
        return x.median(-1).values
    middle = (x.shape[-1] - 1) // 2
    return torch.from_numpy(np.partition(x.numpy(), middle)[..., middle])  # several times as fast as torch's median


def counts_of(places: Int[Tensor, "batch token"], o: ResidualObservation, *, bins: int) -> Float[Tensor, "1 bin"]:
    """How many real tokens are at each place; what is beyond the last bin is not counted. Waits for no device."""
    places = places.where(o.real, bins).flatten()
    counts = o.after.new_zeros(bins + 1).double()
    return counts.scatter_add(0, places, counts.new_ones(()).expand(len(places)))[None, :bins]
