"""The linear map that a module computes, found from its outputs.

A module's type, its name and the shape of its weight are not enough. A module may store its weight either way round, an
adapter adds to it, a quantised module unpacks it, a hook scales the output. So the matrix is taken from what the module
returns, and a stored weight is used only if the module returns what that weight would.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.rng import fixed_rng

# tolerance of a linear map, in roundings of the module's own type
_ROUNDINGS = 64
# scale of the basis vectors: what a bias rounds away from their images is that much smaller
_BASIS_SCALE = 32.0
_TEST_VECTORS = 8


def linear_map(module: nn.Module, shape: tuple[int, int], *, within: nn.Module) -> Float[Tensor, "input output"] | None:
    """Return the matrix of this shape by which a module multiplies its input; None if it does anything else.

    Inputs have the type and device of the module, or of the model `within` which it stands if it has no tensors.
    """
    weight = _plain_linear_weight(module)
    if weight is not None and weight.shape == shape:
        return weight
    like, (width, output_width) = _zero_like(module, within), shape
    try:
        zero, x = like.new_zeros(1, 1, width), _test_vectors(width, like)
        bias, of_x = output_of(module, zero), output_of(module, x)
        images, size = of_x - bias, torch.maximum(of_x.norm(), bias.expand_as(of_x).norm())
        if of_x.shape[-1] != output_width or not _is_additive(module, x, bias, images, size):
            return None
        for stored in _stored_weights(module, shape, like):
            if is_near(x.to(stored)[0] @ stored, images.to(stored), stored.dtype, size):
                return stored
        basis = _BASIS_SCALE * torch.eye(width, dtype=like.dtype, device=like.device)[None]
        matrix = (output_of(module, basis) - bias) / _BASIS_SCALE
    except Exception:  # the model's own code, called by itself
        return None
    exact = matrix.double()
    return matrix if is_near(x[0].double() @ exact, images.double(), like.dtype, size.double()) else None


def signature(module: nn.Module, width: int, *, within: nn.Module) -> Float[Tensor, " output"] | None:
    """Return a module's output for one fixed vector: it changes whenever the module's map does."""
    weight = _plain_linear_weight(module)
    like = _zero_like(module, within) if weight is None else weight
    x = _test_vectors(width, like)[:, :1]
    try:
        return output_of(module, x)[0] if weight is None else (x[0, 0] @ weight)
    except Exception:  # it returns nothing when called by itself
        return None


def same_signatures(before: Sequence[Tensor | None], now: Sequence[Tensor | None]) -> bool:
    """Whether signatures are equal bit for bit. NaN is never the same."""
    if [None if x is None else (x.shape, x.dtype, x.device) for x in before] != [
        None if x is None else (x.shape, x.dtype, x.device) for x in now
    ]:
        return False
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(before, now, strict=True) if a is not None and b is not None]
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for a, b in pairs:  # all on a device at once, because it is waited for
        of_device = groups.setdefault((a.dtype, a.device), ([], []))
        of_device[0].append(a)
        of_device[1].append(b)
    return all(torch.equal(torch.cat(a), torch.cat(b)) for a, b in groups.values())


def takes_contexts_alone(module: nn.Module, width: int, *, within: nn.Module) -> bool:
    """Whether a module runs when it is called with contexts and nothing else."""
    try:
        output_of(module, _test_vectors(width, _zero_like(module, within)))
    except Exception:  # the model's own code, given less than it needs
        return False
    return True


def output_of(module: nn.Module, x: Float[Tensor, "1 token input"]) -> Float[Tensor, "token output"]:
    """Return the output of a module called by itself, without the batch dimension if it does not take one."""
    with torch.inference_mode(), fixed_rng():
        try:
            output = module(x)
        except Exception:  # a module that takes rows
            output = module(x[0])[None]
    output = output[0] if isinstance(output, tuple) else output
    return output[0].detach()


def is_near(a: Tensor, b: Tensor, dtype: torch.dtype, size: Tensor | None = None) -> bool:
    """Whether two tensors differ by a few roundings of a type, relative to `size` or to the larger of them."""
    size = torch.maximum(a.norm(), b.norm()) if size is None else size
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        eps = torch.finfo(torch.float16).eps
    roundings = _ROUNDINGS if dtype in (torch.float32, torch.float64) else 4
    return bool((a - b).norm() <= roundings * eps * size)


def _is_additive(module: nn.Module, x: Tensor, bias: Tensor, images: Tensor, size: Tensor) -> bool:
    """Whether the image of a sum is the sum of the images. Cheap, so it is tested before the whole basis is."""
    half = _TEST_VECTORS // 2
    of_sum = output_of(module, x[:, :half] + x[:, half:]) - bias
    return is_near(of_sum.double(), (images[:half].double() + images[half:].double()), images.dtype, size.double())


def _plain_linear_weight(module: nn.Module) -> Float[Tensor, "input output"] | None:
    """Return the weight of a module that runs exactly the code of torch's Linear or transformers' Conv1D, without hooks."""
    conv = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    is_transposed = {nn.Linear.forward: True} | ({} if conv is None else {conv.forward: False})
    transposed = is_transposed.get(type(module).forward)
    weight: Any = getattr(module, "weight", None)
    if transposed is None or type(weight) not in (torch.Tensor, nn.Parameter) or not weight.is_floating_point():
        return None
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if any(hooks) or "forward" in vars(module) or weight.is_meta or type(module).__call__ is not nn.Module.__call__:
        return None
    return weight.detach().T if transposed else weight.detach()


def _stored_weights(module: nn.Module, shape: tuple[int, int], like: Tensor) -> list[Float[Tensor, "input output"]]:
    """A module's weight, either way round, where it may be the map. In half precision it can't be checked closely enough."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float64):
        return []
    return [w for w in (weight.detach().T, weight.detach()) if w.shape == shape and w.dtype == like.dtype]


def _zero_like(module: nn.Module, within: nn.Module) -> Tensor:
    """A zero of the type that a module computes in, on its device."""
    tensors = [t for m in (module, within) for t in (*m.parameters(), *m.buffers()) if not t.is_meta]
    # a narrower type is only how weights are stored
    dtype = next((t.dtype for t in tensors if t.is_floating_point() and t.element_size() > 1), torch.float32)
    return torch.zeros((), dtype=dtype, device=tensors[0].device if tensors else None)


def _test_vectors(width: int, like: Tensor) -> Float[Tensor, "1 token input"]:
    """Inputs to try a map on, the same every time."""
    return _made_test_vectors(width, like.device, like.dtype).clone()


@lru_cache(maxsize=64)
def _made_test_vectors(width: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "1 token input"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, _TEST_VECTORS, width, generator=generator).to(device, dtype)
