"""Row quantities that need whole rows of the pattern at once: sorted weights, and the pattern weighted by values' norms; or all of
its rows: its singular values.

They cost more than a pass over the keys, so a run computes them for a sample of its sequences only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.extract.engines.block import Block, entropy

# a share is reached within one part in a million, so that ties do not depend on rounding
_TOLERANCE = 1e-6
# the keys that StreamingLLM keeps: the first ones, and those of a window that ends at the query (Xiao 2024)
STREAMING_FIRST, STREAMING_LAST = 4, 64


def keys_for_mass(block: Block, share: float) -> Float[Tensor, "batch head row"]:
    """The fewest keys that hold this share of what the row gives to its keys."""
    enough = share * (1 - _TOLERANCE) * block.cumulative[..., -1:]
    return (torch.searchsorted(block.cumulative, enough).squeeze(-1) + 1).double()


def gini(block: Block) -> Float[Tensor, "batch head row"]:
    """Σ |p_j − p_k| / (2 m Σ p) over the m visible keys; 0 if they are equal.

    In the order of weights this is Σ_r (m + 1 − 2r) p_r / (m Σ p), and Σ_r r p_r follows from the cumulative sums.
    """
    keys, total = block.usable.sum(-1), block.cumulative[..., -1]
    ranked = (block.cumulative.shape[-1] + 1) * total - block.cumulative.sum(-1)
    shares = keys * total
    return ((keys + 1) * total - 2 * ranked) / shares.where(shares > 0, 1)


def mass_top(block: Block, keys: int) -> Float[Tensor, "batch head row"]:
    most = min(keys, block.cumulative.shape[-1])
    return block.cumulative[..., most - 1] * (block.largest - block.shift).exp() / block.total


def mass_streaming(block: Block) -> Float[Tensor, "batch head row"]:
    visibility = block.call.visibility
    query, key = visibility.queries.positions[:, block.rows, None], visibility.keys.positions[:, None, block.keys]
    kept: Bool[Tensor, "batch row key"] = (key < STREAMING_FIRST) | ((key <= query) & (key > query - STREAMING_LAST))
    return (block.pattern * kept[:, None]).sum(-1)


def norm_distance(block: Block) -> Float[Tensor, "batch head row"]:
    return (block.norm_weighted * block.distances.abs()).sum(-1)


def mixture_entropy(block: Block) -> Float[Tensor, "batch head row"]:
    """The same of all heads."""
    return entropy(block.outcomes.mean(1, keepdim=True).double()).expand_as(block.measured)


def effective_rank(pattern: Float[Tensor, "query key"]) -> Float[Tensor, ""]:
    """exp of the entropy of the normalised squares of the singular values; 0 of a pattern without any weight.

    They are the eigenvalues of the smaller Gram matrix. In float32 their rounding would add up to 1e-4 over hundreds of keys.
    """
    exact = pattern.double()
    gram = exact @ exact.T if len(exact) < exact.shape[1] else exact.T @ exact
    squares = torch.linalg.eigvalsh(gram).clamp_min(0)
    total = squares.sum()
    shares = squares / total.where(total > 0, 1)
    return (-shares.xlogy(shares).sum()).clamp_min(0).exp().where(total > 0, 0)


SAMPLED: dict[str, Callable[[Block], Tensor]] = {
    "keys_for_half_mass": partial(keys_for_mass, share=0.5),
    "keys_for_90_mass": partial(keys_for_mass, share=0.9),
    "gini": gini,
    "mass_top_4": partial(mass_top, keys=4),
    "mass_top_16": partial(mass_top, keys=16),
    "mass_top_64": partial(mass_top, keys=64),
    "mass_streaming": mass_streaming,
    "mixture_entropy": mixture_entropy,
    "norm_entropy": lambda block: entropy(block.norm_weighted),
    "norm_distance": norm_distance,
    "norm_max_weight": lambda block: block.norm_weighted.amax(-1),
    "norm_rows": lambda block: (block.norm_total > 0).to(block.norm_total.dtype),
}
