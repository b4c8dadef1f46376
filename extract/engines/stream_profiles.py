"""The additive profiles of a residual site: counts of tokens, which merge by addition, so that shards need no order."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from attlas.extract.engines.profiles import Profile

if TYPE_CHECKING:  # commands that only read the catalogue do not load torch
    import torch
    from jaxtyping import Float, Float64, Int
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


@cache
def _norm_edges(device: torch.device) -> Float64[Tensor, " edge"]:
    """Where the bins of ‖x'‖² begin, and where the last one ends: 4·log₂ ‖x'‖ is 2·log₂ of its square."""
    import torch

    _, *numbers = TOKEN_NORM.numbers  # the first has no least norm
    begins = [math.ulp(0.0), *(2 ** (number / 2) for number in numbers), math.inf]
    return torch.tensor(begins, dtype=torch.float64, device=device)


def count_norms(o: ResidualObservation) -> Float[Tensor, "1 bin"]:
    """The tokens in each bin of `TOKEN_NORM`."""
    return count_squares(o.after_norms.double().square().where(o.real, 0).flatten()[None])


def count_squares(squares: Float64[Tensor, "site token"]) -> Float64[Tensor, "site bin"]:
    """The tokens of each site in each bin of `TOKEN_NORM`, from ‖x'‖²; 0, infinity and NaN have none."""
    import torch

    # from 0: below the first bin, the bins, beyond the last
    places = torch.bucketize(squares, _norm_edges(squares.device), right=True)
    return _count_places(places, len(TOKEN_NORM.numbers) + 2)[:, 1:-1]


def count_decades(o: ResidualObservation) -> Float[Tensor, "1 bin"]:
    """The tokens in each bin of `MASSIVE`."""
    size = o.after.abs()
    decades = (size.amax(-1).double() / lower_median(size).double()).log10().floor()
    has_bin = (size.amax(-1) > 0) & size.amax(-1).isfinite()
    places = decades.clamp(0, _LARGEST_DECADE).where(has_bin & o.real, len(MASSIVE.numbers)).long()
    return _count_places(places.flatten()[None], len(MASSIVE.numbers) + 1)[:, :-1]


def _count_places(places: Int[Tensor, "site token"], number: int) -> Float64[Tensor, "site place"]:
    """How many tokens of each site are at each of so many places. Waits for no device."""
    counts = places.new_zeros(len(places), number)
    return counts.scatter_add_(1, places, counts.new_ones(()).expand_as(places)).double()


def lower_median(x: Float[Tensor, "*token width"]) -> Float[Tensor, "*token"]:
    """The median over the last dimension, of two middle ones the lower."""
    import torch

    if x.device.type != "cpu":
        return x.median(-1).values
    middle = (x.shape[-1] - 1) // 2
    return torch.from_numpy(np.partition(x.numpy(), middle)[..., middle])  # several times as fast as torch's median
