"""Launch kernels with little work in Python: for small models that is what a pass on a GPU takes its time for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# what a kernel is specialised for, to the compiled kernel with its grid
_LAUNCHERS: dict[tuple[Any, ...], Callable[..., None]] = {}
_MAX_LAUNCHERS = 4096
_ALIGNMENT = 16  # bytes; kernels are compiled for tensors that begin at multiples of it


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor | None],
    numbers: tuple[float | None, ...],
    constants: tuple[int, ...],
    **options: Any,
) -> None:
    """Launch a kernel on the device of its first tensor. Its parameters are tensors, numbers and constants, in this order.

    Triton looks at every argument of every launch to find the compiled kernel. Here a kernel is found by the arguments
    themselves, as far as they are not tensors, and tensors are given as addresses.
    """
    first = tensors[0]
    assert first is not None, "kernels begin with what they read"
    device = first.get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, **options)
        return
    addresses, dtypes, misaligned = [], [], 0
    for tensor in tensors:
        address = 0 if tensor is None else tensor.data_ptr()
        addresses.append(address)
        dtypes.append(None if tensor is None else tensor.dtype)
        misaligned |= address
    key = (kernel, device, grid, numbers, constants, *dtypes, *options.values())
    launcher = None if misaligned % _ALIGNMENT else _LAUNCHERS.get(key)
    if launcher is not None:
        launcher(*addresses, *numbers, *constants)
        return
    compiled = kernel[grid](*tensors, *numbers, *constants, enable_fp_fusion=True, **options)
    if compiled is not None and not misaligned % _ALIGNMENT:  # the interpreter compiles nothing
        if len(_LAUNCHERS) >= _MAX_LAUNCHERS:
            _LAUNCHERS.clear()
        _LAUNCHERS[key] = compiled[grid]
