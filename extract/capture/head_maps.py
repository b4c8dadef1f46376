"""The matrices of every attention head, from the maps that discovery has found.

Never a matrix of the stream's width twice: what is asked of W_Q W_Kᵀ and W_V W_O follows from products of their factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.compiled import compilation_disabled
from attlas.extract.capture.layout import Attention, InputMap
from attlas.extract.capture.linear_map import linear_map, signature

Factor = Float[Tensor, "head _stream _head_width"]  # those of one layer may differ


@dataclass(frozen=True)
class HeadMaps:
    """The factors of an attention layer's heads in float64, None where there is no linear map.

    Scores are x W_Q W_Kᵀ yᵀ, with the call's scale in W_Q. What a head writes is x W_V W_O; `output` is W_Oᵀ.
    """

    query: Factor | None
    key: Factor | None
    value: Factor | None
    output: Factor | None
    is_self: bool  # queries, keys and values are read from the stream that is written to

    @property
    def query_key(self) -> LowRank | None:
        """W_QK = W_Q W_Kᵀ."""
        return None if self.query is None or self.key is None else LowRank(self.query, self.key)

    @property
    def output_value(self) -> LowRank | None:
        """W_OV = W_V W_O."""
        return None if self.value is None or self.output is None else LowRank(self.value, self.output)


@dataclass(frozen=True)
class LowRank:
    """The product A Bᵀ of two tall factors of every head, known by small products of them."""

    left: Factor
    right: Factor

    @property
    def grams(self) -> tuple[np.ndarray, np.ndarray]:
        """AᵀA and BᵀB, [head, head_width, head_width]."""
        left, right = (factor.mT @ factor for factor in (self.left, self.right))
        return left.cpu().numpy(), right.cpu().numpy()

    @property
    def core(self) -> np.ndarray | None:
        """BᵀA, which has the nonzero eigenvalues of A Bᵀ; None if A Bᵀ is not square."""
        return (self.right.mT @ self.left).cpu().numpy() if self.left.shape == self.right.shape else None


def head_maps(model: nn.Module, attention: Attention) -> HeadMaps:
    """The factors of a layer's heads as the model's weights are now."""
    inputs = attention.inputs
    with compilation_disabled():
        query, key, value = (_input_factor(model, found) for found in (inputs.query, inputs.key, inputs.value))
        output = _output_factor(model, attention)
    if query is not None and inputs.scale is not None:
        query = query * inputs.scale
    if inputs.scale is None:
        query = key = None
    return HeadMaps(query, key, value, output, inputs.is_self)


def signatures(model: nn.Module, attentions: Sequence[Attention]) -> list[Tensor | None]:
    """Vectors that change whenever one of these maps does."""
    found = []
    for attention in attentions:
        maps = (attention.inputs.query, attention.inputs.key, attention.inputs.value)
        found += [
            _signature(model, each) for each in dict.fromkeys(each and each._replace(columns=()) for each in maps)
        ]
        if attention.projection is not None and attention.shape is not None:
            found.append(signature(model.get_submodule(attention.projection), attention.shape[0], within=model))
    return found


def _signature(model: nn.Module, found: InputMap | None) -> Tensor | None:
    if found is None:
        return None
    module = model.get_submodule(found.module)
    if found.weight is None:
        return signature(module, found.shape[0], within=model)
    weight = getattr(module, found.weight).detach()
    return weight @ torch.linspace(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)


def _input_factor(model: nn.Module, found: InputMap | None) -> Factor | None:
    if found is None:
        return None
    module = model.get_submodule(found.module)
    if found.weight is None:
        matrix = linear_map(module, found.shape, within=model)
    else:
        matrix = getattr(module, found.weight).detach().T
    if matrix is None or matrix.shape != found.shape:
        return None
    matrix = _float64(matrix)
    return torch.stack([matrix[:, _index(columns)] for columns in found.columns]) * found.factor


def _output_factor(model: nn.Module, attention: Attention) -> Factor | None:
    if attention.projection is None or attention.shape is None:
        return None
    matrix = linear_map(model.get_submodule(attention.projection), attention.shape, within=model)
    return None if matrix is None else _float64(matrix).unflatten(0, (attention.heads, -1)).mT


def _index(columns: range | tuple[int, ...]) -> slice | list[int]:
    return slice(columns.start, columns.stop) if isinstance(columns, range) else list(columns)


def _float64(matrix: Tensor) -> Tensor:
    """A copy in float64, on the CPU where the device has no such type."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).detach().to(torch.float64)
