"""Arguments that the kernels of attention calls share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attlas.extract.engines.rows import AttentionCall
from attlas.extract.engines.visibility import Visibility

MIN_COLUMNS = 16  # of a product of tiles
_LOG2_E = math.log2(math.e)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """As kernels read tensors that are given without strides."""
    return None if tensor is None else tensor.contiguous()


def rows_side_by_side(tensor: Tensor) -> Tensor:
    """As kernels read queries, keys and values: the numbers of one state lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def steps_of(ends: Tensor) -> tuple[int, int, int]:
    """Strides of the ends of visible keys over sequences and heads, 0 where all share them; and from first to last."""
    _, batch, heads, _ = ends.shape
    plane, of_batch, of_head, _ = ends.stride()
    return 0 if batch == 1 else of_batch, 0 if heads == 1 else of_head, plane


def pairs_of(seen: Visibility) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """What is allowed and what is added, of pairs of query and key, as kernels read them; and the strides of both."""
    allowed = None if seen.allowed is None else seen.allowed.view(torch.int8)
    return allowed, seen.bias, (*_strides_of(allowed), *_strides_of(seen.bias))


def _strides_of(pairs: Tensor | None) -> tuple[int, ...]:
    """Strides of a tensor over pairs; 0 for a dimension that is broadcast."""
    if pairs is None:
        return (0, 0, 0, 0)
    return tuple(0 if n == 1 else s for n, s in zip(pairs.shape, pairs.stride(), strict=True))


def scoring_of(call: AttentionCall) -> tuple[float, float, float | None]:
    """The unit of scores in powers of two, by which products or scores are multiplied; the scale; the soft-cap."""
    is_natural = call.softcap is not None or call.visibility.bias is not None
    return _LOG2_E if is_natural else call.scale * _LOG2_E, call.scale, call.softcap
