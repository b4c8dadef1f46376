"""Launch kernels with little work in Python: for small models that is what a pass on a GPU takes its time for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# by all arguments but the addresses of tensors: a compiled kernel with its grid
_LAUNCHERS: dict[tuple[Any, ...], Callable[..., None]] = {}
_MAX_LAUNCHERS = 1 << 14  # shapes of batches vary without end
# by what kernels are specialised for
_COMPILED: dict[tuple[Any, ...], Any] = {}
_ALIGNMENT = 16  # bytes, and elements in strides


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor | None],
    numbers: tuple[float | None, ...],
    constants: tuple[int, ...],
    **options: Any,
) -> None:
    """Launch a kernel on the device of its tensors. Its parameters are tensors, numbers and constants, in this order.

    Triton looks at every argument of every launch to find the compiled kernel. Here it is found by all arguments at once, and
    tensors are given as addresses.
    """
    device = next(tensor.get_device() for tensor in tensors if tensor is not None)
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, **options)
        return
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    is_aligned = not any(address % _ALIGNMENT for address in addresses)
    key = (kernel, device, grid, numbers, constants, *dtypes, *options.values())
    launcher = _LAUNCHERS.get(key) if is_aligned else None
    if launcher is not None:
        launcher(*addresses, *numbers, *constants)
        return
    special = (kernel, device, *map(_specialisation, numbers), constants, *dtypes, *options.values())
    compiled = _COMPILED.get(special) if is_aligned else None
    if compiled is None:
        compiled = kernel[grid](*tensors, *numbers, *constants, enable_fp_fusion=True, **options)
        if is_aligned and compiled is not None:  # the interpreter compiles nothing
            _COMPILED[special] = compiled
        return
    if len(_LAUNCHERS) >= _MAX_LAUNCHERS:
        _LAUNCHERS.clear()
    launcher = _LAUNCHERS[key] = compiled[grid]
    launcher(*addresses, *numbers, *constants)


def power_of_2_from(n: int) -> int:
    """The least power of two that is n or more; Triton's own function is made for kernels and takes tens of microseconds."""
    return 1 << (n - 1).bit_length()


def _specialisation(number: float | None) -> Any:
    """What of a number a kernel may be compiled for, as Triton has it: None, 1, multiples of 16, 64 bits."""
    if not isinstance(number, int):
        return None if number is None else float
    return number == 1, number % _ALIGNMENT == 0, abs(number) >> 31 > 0
