"""The one name that is replaced, and how to read what a module reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@contextmanager
def replaced_sdpa(replacement: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Iterator[None]:
    """Replace torch's scaled_dot_product_attention by `replacement(original)`, and switch the fused paths around it off."""
    original = functional.scaled_dot_product_attention
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    functional.scaled_dot_product_attention = replacement(original)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fast)


def first_tensor(value: Any) -> Tensor | None:
    """The tensor that a module's input or output is, or begins with."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, tuple | list):
        return first_tensor(value[0]) if value else None
    return None


def read_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a module reads: its first argument, however it was passed."""
    return first_tensor(args) if args else first_tensor(next(iter(kwargs.values()), None))


def weight_by_input(module: nn.Module) -> Float[Tensor, "input output"] | None:
    """The matrix by which a linear module multiplies what it reads; None where it has no weight of two dimensions.

    `nn.Linear` stores it transposed, GPT-2's Conv1D as it is.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    return weight.detach().T if isinstance(module, nn.Linear) else weight.detach()
