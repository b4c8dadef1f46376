"""A small matrix per head that gives the norm of what the head writes into the stream, made from the output projection."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.layout import Attention, Layout
from attlas.extract.capture.linear_map import linear_map, same_signatures, signature


@dataclass(frozen=True)
class _CachedFactors:
    """The factors of a model's attention layers, and the signatures of their projections when they were made."""

    attentions: tuple[Attention, ...]
    signatures: list[Tensor | None]
    factors: dict[int, Tensor]


_CACHE: weakref.WeakKeyDictionary[nn.Module, _CachedFactors] = weakref.WeakKeyDictionary()


def write_factors(model: nn.Module, layout: Layout) -> dict[int, Float[Tensor, "head head_width head_width"]]:
    """Return for each attention layer the matrix R of each head with ‖c R‖ = ‖c W_O^h‖.

    A layer without a linear projection has none. Factors are made again when the signature of a projection has changed: its
    weights were modified in some way, or an adapter was switched or merged.
    """
    projections = {
        number: (model.get_submodule(attention.projection), attention.shape)
        for number, attention in enumerate(layout.attentions)
        if attention.projection is not None and attention.shape is not None
    }
    signatures = [signature(module, shape[0], within=model) for module, shape in projections.values()]
    cached = _CACHE.get(model)
    if cached is None or cached.attentions != layout.attentions or not same_signatures(cached.signatures, signatures):
        maps = {number: linear_map(module, shape, within=model) for number, (module, shape) in projections.items()}
        factors = {
            number: _factor(weight.unflatten(0, (layout.attentions[number].heads, -1)))
            for number, weight in maps.items()
            if weight is not None
        }
        cached = _CACHE[model] = _CachedFactors(layout.attentions, signatures, factors)
    return cached.factors


def _factor(weight: Float[Tensor, "head head_width model_width"]) -> Float[Tensor, "head head_width head_width"]:
    """Lower triangular R with R Rᵀ = W Wᵀ, from W itself in float64: its Gram matrix would lose half the digits."""
    factor = torch.linalg.qr(weight.double().transpose(-1, -2), mode="r").R.transpose(-1, -2)
    if factor.shape[-1] < factor.shape[-2]:  # heads wider than the stream
        factor = torch.nn.functional.pad(factor, (0, factor.shape[-2] - factor.shape[-1]))
    return factor.to(torch.float64 if weight.dtype == torch.float64 else torch.float32).contiguous()
