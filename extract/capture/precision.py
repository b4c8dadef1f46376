"""A model with its weights in a wider type, for as long as it is examined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from attlas.extract.memory import free_bytes

_HALF = (torch.float16, torch.bfloat16)
_NARROWER = {torch.float32: _HALF, torch.float64: (*_HALF, torch.float32)}


def types_to_examine(model: nn.Module) -> tuple[torch.dtype | None, ...]:
    """The types in which a stream is sought, one after the other until it is found whole; None is the model's own."""
    if any(parameter.dtype in _HALF for parameter in model.parameters()):
        return torch.float32, torch.float64, None
    return None, torch.float64


@contextmanager
def widened(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Put twins of this type in the place of narrower parameters and buffers, and these back afterwards.

    What is shared stays shared: tied weights have one twin. The model's own tensors are not touched. Raises MemoryError
    where the twins would take more than half of what is free.
    """
    narrower = _NARROWER.get(dtype, ()) if dtype is not None else ()
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (tensors, name, tensor)
        for module in model.modules()
        for tensors in _tensors(module)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype in narrower
    ]
    own = {id(tensor): tensor for _, _, tensor in places}
    _refuse_more_than_is_free(list(own.values()), dtype)
    twins: dict[int, Any] = {}
    try:
        for tensors, name, tensor in places:
            if id(tensor) not in twins:
                twin = tensor.detach().to(dtype)
                twins[id(tensor)] = (
                    nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin
                )
            tensors[name] = twins[id(tensor)]
        yield
    finally:
        for tensors, name, tensor in places:
            tensors[name] = tensor


def _tensors(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers  # pyright: ignore


def widened_inputs(inputs: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Inputs of a narrower type, such as pixels, in this one."""
    narrower = _NARROWER.get(dtype, ()) if dtype is not None else ()
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype in narrower else value
        for name, value in inputs.items()
    }


def _refuse_more_than_is_free(tensors: list[torch.Tensor], dtype: torch.dtype | None) -> None:
    if not tensors or dtype is None:
        return
    needed = sum(tensor.numel() for tensor in tensors) * torch.finfo(dtype).bits // 8
    free = free_bytes(tensors[0].device)
    if free is not None and needed > free // 2:
        raise MemoryError(f"twins of the weights in {dtype} take {needed} bytes; {free} are free")
