"""What the heads of each attention call write into the stream: a small matrix for each, made of the output projection."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.discovery.projection import linear_map, signature
from attlas.extract.capture.layout import Attention, Layout


@dataclass(frozen=True)
class _Known:
    """The factors of a model's attention calls, and what each projection gave of one vector when they were made."""

    attentions: tuple[Attention, ...]
    signatures: list[Tensor | None]
    factors: dict[int, Tensor]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def write_factors(model: nn.Module, layout: Layout) -> dict[int, Float[Tensor, "head head_width head_width"]]:
    """Per attention call R with ‖c R‖ = ‖c W_O^h‖: a small matrix instead of the projection.

    None for a call whose projection is not known, or no longer linear. Made anew when a projection gives something else
    of one vector than the last time: its weights were written to, in whatever way, or an adapter was switched or merged.
    """
    projections = {
        number: (model.get_submodule(attention.projection), attention.shape)
        for number, attention in enumerate(layout.attentions)
        if attention.projection is not None and attention.shape is not None
    }
    signatures = [signature(module, shape[0], within=model) for module, shape in projections.values()]
    known = _KNOWN.get(model)
    if known is None or known.attentions != layout.attentions or not _are_same(known.signatures, signatures):
        maps = {number: linear_map(module, shape, within=model) for number, (module, shape) in projections.items()}
        factors = {
            number: _factor(found.unflatten(0, (layout.attentions[number].heads, -1)))
            for number, found in maps.items()
            if found is not None
        }
        known = _KNOWN[model] = _Known(layout.attentions, signatures, factors)
    return known.factors


def _are_same(before: Sequence[Tensor | None], now: Sequence[Tensor | None]) -> bool:
    """Whether projections give what they gave, to the bit; what is not a number is never the same."""
    if [None if x is None else (x.shape, x.dtype, x.device) for x in before] != [
        None if x is None else (x.shape, x.dtype, x.device) for x in now
    ]:
        return False
    pairs = [(a, b) for a, b in zip(before, now, strict=True) if a is not None and b is not None]
    return all(torch.equal(a, b) for a, b in pairs)


def _factor(weight: Float[Tensor, "head head_width model_width"]) -> Float[Tensor, "head head_width head_width"]:
    """Lower triangular R with R Rᵀ = W Wᵀ, from W itself in float64: its Gram matrix would lose half the digits."""
    factor = torch.linalg.qr(weight.double().transpose(-1, -2), mode="r").R.transpose(-1, -2)
    if factor.shape[-1] < factor.shape[-2]:  # heads wider than the stream
        factor = torch.nn.functional.pad(factor, (0, factor.shape[-2] - factor.shape[-1]))
    return factor.to(torch.float64 if weight.dtype == torch.float64 else torch.float32).contiguous()
