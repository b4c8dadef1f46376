"""Running a model with its weights in a wider type during discovery."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from attlas.extract.memory import free_bytes

_HALF = (torch.float16, torch.bfloat16)
_NARROWER = {torch.float32: _HALF, torch.float64: (*_HALF, torch.float32)}


def dtypes_to_try(model: nn.Module) -> tuple[torch.dtype | None, ...]:
    """Types in which to look for the stream, in turn, until all of it is found. None is the model's own type."""
    if any(parameter.dtype in _HALF for parameter in model.parameters()):
        return torch.float32, torch.float64, None
    return None, torch.float64


@contextmanager
def cast_weights(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Replace narrower parameters and buffers by copies of this type, and restore them afterwards.

    Tied weights share one copy. The model's own tensors are not modified. Raises MemoryError if the copies would take more
    than half of the free memory.
    """
    narrower = _NARROWER.get(dtype, ()) if dtype is not None else ()
    entries: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (tensors, name, tensor)
        for module in model.modules()
        for tensors in _tensors(module)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype in narrower
    ]
    originals = {id(tensor): tensor for _, _, tensor in entries}
    _refuse_more_than_is_free(list(originals.values()), dtype)
    copies: dict[int, Any] = {}
    try:
        for tensors, name, tensor in entries:
            if id(tensor) not in copies:
                copied = tensor.detach().to(dtype)
                copies[id(tensor)] = (
                    nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
                )
            tensors[name] = copies[id(tensor)]
        yield
    finally:
        for tensors, name, tensor in entries:
            tensors[name] = tensor


def _tensors(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers  # pyright: ignore


def cast_inputs(inputs: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Convert inputs of a narrower type, such as pixels, to this one."""
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
        raise MemoryError(f"copies of the weights in {dtype} take {needed} bytes; {free} are free")
