"""Reading tensors from the inputs, outputs and weights of modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def first_tensor(value: Any) -> Tensor | None:
    """Return the tensor that a module's input or output is, or begins with."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return first_tensor(value[0]) if value else None
    return None


def input_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return a module's first argument, positional or not, or the tensor that it begins with."""
    return first_tensor(args) if args else first_tensor(next(iter(kwargs.values()), None))


def is_stream(value: Any) -> TypeGuard[Tensor]:
    """Whether a value may be states of tokens: floats of shape [batch, token, width]."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 3


def has_matrix(module: nn.Module) -> bool:
    """Whether a module has a two-dimensional weight, as linear modules do. It may still compute something else with it."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one object or have equal shape and values."""
    return a is b or (a.shape == b.shape and torch.equal(a, b))
