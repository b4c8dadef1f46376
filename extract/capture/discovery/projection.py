"""The linear map of an output projection: what a module does to contexts, whatever the module is.

A type, a weight's shape or its name tell little: a bare module may keep its weight either way round, an adapter adds to
it, a quantised one unpacks it, a hook scales what comes out. So the matrix is taken from what the module gives, and a
stored weight stands for it only where the module gives what that weight would.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.discovery.states import norms_in
from attlas.extract.capture.discovery.trace import Call, Event, Trace, fixed_rng, same
from attlas.extract.capture.intercept.sdpa import has_matrix

# roundings of a module's own type by which a linear map of contexts may be off
_ROUNDINGS = 64
# basis vectors are so much larger than one: what a bias rounds away from their images is that much less
_BASIS = 32.0
_TRIED = 8  # contexts to try a map on


class Projection(NamedTuple):
    """The module that reads an attention call's contexts and multiplies them by a matrix of this shape."""

    module: str
    shape: tuple[int, int]


class NoProjection(Exception):
    """Why no matrix stands for what follows an attention call."""


def find_projection(trace: Trace, call: Call, modules: Mapping[str, nn.Module]) -> Projection:
    """The linear module that reads exactly this call's contexts, with what is wrapped around it.

    Raises NoProjection where nothing reads them, or where what does is not linear.
    """
    if call.projection is not None:
        return _of_weight(call, call.projection, modules)
    found: Event | None = None
    refused: str | None = None
    for event in trace.events:
        if event.time < call.time or event.wrote is None or not same(event.read, call.contexts):
            continue
        if found is not None and not _is_around(event, found):
            continue
        width, given = call.contexts.shape[-1], event.wrote.shape[-1]
        if found is None:
            found, refused = _first(event, modules, (width, given), call.heads) or (None, refused)
        elif not _gives_the_same(event, found):
            found, refused = _outer(trace, event, found, modules, (width, given))
    if found is None or found.wrote is None:
        raise NoProjection(refused or "no linear module reads the contexts as attention gives them")
    if refused is not None:
        raise NoProjection(refused)
    return Projection(found.module, (call.contexts.shape[-1], found.wrote.shape[-1]))


def _of_weight(call: Call, weight: Tensor, modules: Mapping[str, nn.Module]) -> Projection:
    """The module whose weight torch's multi-head attention was given, or one that makes the same of its parameters."""
    alike = [(name, own) for name, m in modules.items() if isinstance(own := getattr(m, "weight", None), torch.Tensor)]
    names = [name for name, own in alike if own is weight]
    names += [name for name, own in alike if own.shape == weight.shape and torch.equal(own, weight)]
    if not names:
        raise NoProjection("the weight that reads the contexts is no module's own")
    width = call.contexts.shape[-1]
    shape = (width, weight.numel() // width)
    if linear_map(modules[names[0]], shape, within=modules[""]) is None:
        raise NoProjection(f"{names[0]} is not linear in the contexts")
    return Projection(names[0], shape)


def _is_around(event: Event, found: Event) -> bool:
    return found.module.startswith(f"{event.module}.") or not event.module


def _gives_the_same(event: Event, found: Event) -> bool:
    assert event.wrote is not None and found.wrote is not None, "both wrote"
    return event.wrote.shape == found.wrote.shape and torch.equal(event.wrote, found.wrote)


def _first(
    event: Event, modules: Mapping[str, nn.Module], shape: tuple[int, int], heads: int
) -> tuple[Event, None] | tuple[None, str] | None:
    """The event if its module is linear, or why it is not; None of what passes contexts on, such as a dropout."""
    module = modules[event.module]
    assert event.read is not None and event.wrote is not None, "it read contexts"
    if event.read.shape == event.wrote.shape and torch.equal(event.read, event.wrote):
        return None
    matrix = linear_map(module, shape, within=modules[""])
    if matrix is None:
        return (None, f"{event.module} is not linear in the contexts") if has_matrix(module) else None
    return (event, None) if has_matrix(module) or _mixes_heads(matrix, heads) else None


def _mixes_heads(matrix: Float[Tensor, "input output"], heads: int) -> bool:
    """False of what scales contexts, or maps those of each head by themselves: a projection comes after it."""
    if matrix.shape[0] != matrix.shape[1]:
        return True
    own = torch.block_diag(*(matrix.new_ones(matrix.shape[0] // heads, matrix.shape[0] // heads) for _ in range(heads)))
    own = own if heads > 1 else torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return bool((matrix * (1 - own)).any())


def _outer(
    trace: Trace, event: Event, found: Event, modules: Mapping[str, nn.Module], shape: tuple[int, int]
) -> tuple[Event, str | None]:
    """Of a module and one around it that reads the same and gives something else: which is the projection, or why neither.

    One that needs more than contexts, such as the stream that it adds to them, or that is a norm of what the inner one
    gives, does not belong to it.
    """
    assert event.read is not None, "it read contexts"
    module = modules[event.module]
    if not _is_of_contexts_alone(module, shape[0], modules[""]) or _is_normalized(trace, event, found, modules):
        return found, None
    matrix = linear_map(module, shape, within=modules[""])
    if matrix is None:
        return found, f"{event.module}, which holds the projection, is not linear in the contexts"
    inner = linear_map(modules[found.module], shape, within=modules[""])
    alike = inner is not None and inner.shape == matrix.shape and _is_near(inner, matrix, inner.dtype)
    return (found if alike else event), None


def _is_of_contexts_alone(module: nn.Module, width: int, within: nn.Module) -> bool:
    try:
        _given(module, _contexts(width, _like(module, within)))
    except Exception:  # the model's own code, given less than it needs
        return False
    return True


def _is_normalized(trace: Trace, event: Event, found: Event, modules: Mapping[str, nn.Module]) -> bool:
    """Whether what the outer module gives is the norm of what the inner one gives, as in a sandwich."""
    between = [
        other
        for other in trace.events
        if found.time < other.time < event.time
        and same(other.read, found.wrote)
        and other.wrote is not None
        and torch.equal(other.wrote.reshape(-1), event.wrote.reshape(-1))  # pyright: ignore
    ]
    assert found.wrote is not None, "it gave something"
    return next(norms_in(between, modules, found.wrote.shape[-1]), None) is not None


def linear_map(module: nn.Module, shape: tuple[int, int], *, within: nn.Module) -> Float[Tensor, "input output"] | None:
    """The matrix by which a module multiplies contexts of shape[0] entries to give shape[1]; None where it does otherwise.

    One without weights is given contexts of the type of the model that it stands in.
    """
    weight = _own_weight(module)
    if weight is not None and weight.shape == shape:
        return weight
    like, (width, given) = _like(module, within), shape
    try:
        zero, x = like.new_zeros(1, 1, width), _contexts(width, like)
        base, of_x = _given(module, zero), _given(module, x)
        images, size = of_x - base, torch.maximum(of_x.norm(), base.expand_as(of_x).norm())
        if of_x.shape[-1] != given or not _is_additive(module, x, base, images, size):
            return None
        for stored in _stored(module, shape, like):
            if _is_near(x.to(stored)[0] @ stored, images.to(stored), stored.dtype, size):
                return stored
        basis = _BASIS * torch.eye(width, dtype=like.dtype, device=like.device)[None]
        matrix = (_given(module, basis) - base) / _BASIS
    except Exception:  # the model's own code, called by itself
        return None
    exact = matrix.double()
    return matrix if _is_near(x[0].double() @ exact, images.double(), like.dtype, size.double()) else None


def _is_additive(module: nn.Module, x: Tensor, base: Tensor, images: Tensor, size: Tensor) -> bool:
    """Whether the image of a sum is the sum of images, before as many vectors as contexts have entries are tried."""
    half = _TRIED // 2
    of_sum = _given(module, x[:, :half] + x[:, half:]) - base
    return _is_near(of_sum.double(), (images[:half].double() + images[half:].double()), images.dtype, size.double())


def signature(module: nn.Module, width: int, *, within: nn.Module) -> Float[Tensor, " output"] | None:
    """What a module gives of one vector: it changes with the module's map, however that is written to or switched."""
    weight = _own_weight(module)
    like = _like(module, within) if weight is None else weight
    x = _contexts(width, like)[:, :1]
    try:
        return _given(module, x)[0] if weight is None else (x[0, 0] @ weight)
    except Exception:  # it gives nothing by itself
        return None


def _own_weight(module: nn.Module) -> Float[Tensor, "input output"] | None:
    """The weight of a module that does by definition what torch's Linear or transformers' Conv1D do, and no more."""
    conv = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    kinds = {nn.Linear.forward: True} | ({} if conv is None else {conv.forward: False})
    turned = kinds.get(type(module).forward)
    weight: Any = getattr(module, "weight", None)
    if turned is None or type(weight) not in (torch.Tensor, nn.Parameter) or not weight.is_floating_point():
        return None
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if any(hooks) or "forward" in vars(module) or weight.is_meta or type(module).__call__ is not nn.Module.__call__:
        return None
    return weight.detach().T if turned else weight.detach()


def _stored(module: nn.Module, shape: tuple[int, int], like: Tensor) -> list[Float[Tensor, "input output"]]:
    """A module's weight, either way round, that may be its map; in half precision nothing tells how nearly it is."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float64):
        return []
    return [w for w in (weight.detach().T, weight.detach()) if w.shape == shape and w.dtype == like.dtype]


def _given(module: nn.Module, x: Float[Tensor, "1 token input"]) -> Float[Tensor, "token output"]:
    """What a module gives of contexts, by itself; one that takes no batch is given none."""
    with torch.inference_mode(), fixed_rng():
        try:
            given = module(x)
        except Exception:  # a module that takes rows
            given = module(x[0])[None]
    given = given[0] if isinstance(given, tuple) else given
    return given[0].detach()


def _like(module: nn.Module, within: nn.Module) -> Tensor:
    """Zero, of the type that a module computes in and on its device."""
    tensors = [t for m in (module, within) for t in (*m.parameters(), *m.buffers()) if not t.is_meta]
    # what is narrower is how weights are kept
    dtype = next((t.dtype for t in tensors if t.is_floating_point() and t.element_size() > 1), torch.float32)
    return torch.zeros((), dtype=dtype, device=tensors[0].device if tensors else None)


def _contexts(width: int, like: Tensor) -> Float[Tensor, "1 token input"]:
    """Contexts to try a map on, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, _TRIED, width, generator=generator).to(like.device, like.dtype)


def _is_near(one: Tensor, other: Tensor, dtype: torch.dtype, size: Tensor | None = None) -> bool:
    size = torch.maximum(one.norm(), other.norm()) if size is None else size
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        eps = torch.finfo(torch.float16).eps
    few = _ROUNDINGS if dtype in (torch.float32, torch.float64) else 4
    return bool((one - other).norm() <= few * eps * size)
