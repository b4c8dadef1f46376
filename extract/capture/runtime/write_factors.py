"""The output projections as matrices, and a small matrix per head that gives the norm of what the head writes into the stream."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.layout import Attention, Layout
from attlas.extract.capture.linear_map import linear_map, same_signatures, signature


@dataclass(frozen=True)
class _Cached:
    """Matrices of a model's attention layers, and the signatures of their projections when they were made."""

    attentions: tuple[Attention, ...]
    signatures: list[Tensor | None]
    matrices: dict[int, Tensor]


_Make = Callable[[Tensor, int], Tensor]  # from a projection's matrix and the number of heads
_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[_Make, _Cached]] = weakref.WeakKeyDictionary()


def write_factors(model: nn.Module, layout: Layout) -> dict[int, Float[Tensor, "head head_width head_width"]]:
    """Return for each attention layer the matrix R of each head with ‖c R‖ = ‖c W_O^h‖. See `output_matrices`."""
    return _matrices(model, layout, _factors)


def output_matrices(model: nn.Module, layout: Layout) -> dict[int, Float[Tensor, "context width"]]:
    """Return for each attention layer the matrix by which its output projection multiplies the heads' contexts, side by side.

    A layer without a linear projection has none. Matrices are made again when the signature of a projection has changed: its
    weights were modified in some way, or an adapter was switched or merged.
    """
    return _matrices(model, layout, _whole)


def _matrices(model: nn.Module, layout: Layout, make: _Make) -> dict[int, Tensor]:
    projections = {
        number: (model.get_submodule(attention.projection), attention.shape)
        for number, attention in enumerate(layout.attentions)
        if attention.projection is not None and attention.shape is not None
    }
    signatures = [signature(module, shape[0], within=model) for module, shape in projections.values()]
    by_kind = _CACHE.setdefault(model, {})
    cached = by_kind.get(make)
    if cached is None or cached.attentions != layout.attentions or not same_signatures(cached.signatures, signatures):
        maps = {number: linear_map(module, shape, within=model) for number, (module, shape) in projections.items()}
        matrices = {
            number: make(matrix, layout.attentions[number].heads)
            for number, matrix in maps.items()
            if matrix is not None
        }
        cached = by_kind[make] = _Cached(layout.attentions, signatures, matrices)
    return cached.matrices


def _whole(matrix: Float[Tensor, "context width"], _heads: int) -> Float[Tensor, "context width"]:
    return matrix


def _factors(matrix: Float[Tensor, "context width"], heads: int) -> Float[Tensor, "head head_width head_width"]:
    """Lower triangular R of each head with R Rᵀ = W Wᵀ, from W in float64: its Gram matrix would lose half the digits."""
    weight = matrix.unflatten(0, (heads, -1))
    factor = torch.linalg.qr(weight.double().transpose(-1, -2), mode="r").R.transpose(-1, -2)
    if factor.shape[-1] < factor.shape[-2]:  # heads wider than the stream
        factor = torch.nn.functional.pad(factor, (0, factor.shape[-2] - factor.shape[-1]))
    return factor.to(torch.float64 if weight.dtype == torch.float64 else torch.float32).contiguous()
