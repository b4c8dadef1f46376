"""The output projection of an attention call: the module that reads its contexts and multiplies them by a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.discovery.norms import norms_in
from attlas.extract.capture.discovery.trace import Call, Event, Trace, approx_equal
from attlas.extract.capture.linear_map import is_near, linear_map, takes_contexts_alone
from attlas.extract.capture.tensors import has_matrix


class Projection(NamedTuple):
    """An output projection: the module's name and the shape of its matrix, contexts × stream."""

    module: str
    shape: tuple[int, int]


class NoProjection(Exception):
    """Why no matrix stands for what follows an attention call."""


def find_projection(trace: Trace, call: Call, modules: Mapping[str, nn.Module]) -> Projection:
    """Return the linear module whose input is this call's contexts, or a wrapper around it that is linear too.

    Raises NoProjection if no module reads the contexts, or if the one that does is not linear.
    """
    if call.projection is not None:
        return _projection_with_weight(call, call.projection, modules)
    reader: Event | None = None
    refusal: str | None = None
    for event in trace.events:
        if event.time < call.time or event.output is None or not approx_equal(event.input, call.contexts):
            continue
        if reader is not None and not _is_around(event, reader):
            continue
        shape = (call.contexts.shape[-1], event.output.shape[-1])
        if reader is None:
            reader, refusal = _first_reader(event, modules, shape, call.heads) or (None, refusal)
        elif _has_same_output(event, reader):
            if (
                has_matrix(modules[event.module])
                and linear_map(modules[event.module], shape, within=modules[""]) is not None
            ):
                reader = event  # an adapter that does nothing yet
        else:
            reader, refusal = _choose_wrapper(trace, event, reader, modules, shape)
    if reader is None or reader.output is None:
        raise NoProjection(refusal or "no linear module reads the contexts as attention gives them")
    if refusal is not None:
        raise NoProjection(refusal)
    return Projection(reader.module, (call.contexts.shape[-1], reader.output.shape[-1]))


def _projection_with_weight(call: Call, weight: Tensor, modules: Mapping[str, nn.Module]) -> Projection:
    """The module whose weight was passed to torch's multi-head attention, or has equal values if it was computed."""
    weights = [(name, w) for name, m in modules.items() if isinstance(w := getattr(m, "weight", None), torch.Tensor)]
    names = [name for name, other in weights if other is weight]
    names += [name for name, other in weights if other.shape == weight.shape and torch.equal(other, weight)]
    if not names:
        raise NoProjection("the weight that reads the contexts is no module's own")
    width = call.contexts.shape[-1]
    shape = (width, weight.numel() // width)
    if linear_map(modules[names[0]], shape, within=modules[""]) is None:
        raise NoProjection(f"{names[0]} is not linear in the contexts")
    return Projection(names[0], shape)


def _is_around(event: Event, inner: Event) -> bool:
    return inner.module.startswith(f"{event.module}.") or not event.module


def _has_same_output(event: Event, other: Event) -> bool:
    assert event.output is not None and other.output is not None, "both wrote"
    return event.output.shape == other.output.shape and torch.equal(event.output, other.output)


def _first_reader(
    event: Event, modules: Mapping[str, nn.Module], shape: tuple[int, int], heads: int
) -> tuple[Event, None] | tuple[None, str] | None:
    """The event if its module is linear, or why it is not; None for a module that passes contexts on, such as a dropout."""
    module = modules[event.module]
    assert event.input is not None and event.output is not None, "it read contexts"
    if event.input.shape == event.output.shape and torch.equal(event.input, event.output):
        return None
    matrix = linear_map(module, shape, within=modules[""])
    if matrix is None:
        return (None, f"{event.module} is not linear in the contexts") if has_matrix(module) else None
    return (event, None) if has_matrix(module) or _mixes_heads(matrix, heads) else None


def _mixes_heads(matrix: Float[Tensor, "input output"], heads: int) -> bool:
    """False if a map only scales contexts or works within each head: the projection comes after it."""
    if matrix.shape[0] != matrix.shape[1]:
        return True
    width = matrix.shape[0] // heads
    within_heads = torch.block_diag(*(matrix.new_ones(width, width) for _ in range(heads)))
    if heads == 1:
        within_heads = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return bool((matrix * (1 - within_heads)).any())


def _choose_wrapper(
    trace: Trace, wrapper: Event, inner: Event, modules: Mapping[str, nn.Module], shape: tuple[int, int]
) -> tuple[Event, str | None]:
    """Choose between a module and one around it with the same input and another output, or say why neither is linear.

    The wrapper does not count if it needs more than contexts, such as the stream that it adds to them, or if it only
    normalises the output of the inner module.
    """
    module = modules[wrapper.module]
    works_alone = takes_contexts_alone(module, shape[0], within=modules[""])
    if not works_alone or _normalises_output(trace, wrapper, inner, modules):
        return inner, None
    matrix = linear_map(module, shape, within=modules[""])
    if matrix is None:
        return inner, f"{wrapper.module}, which holds the projection, is not linear in the contexts"
    inner_matrix = linear_map(modules[inner.module], shape, within=modules[""])
    is_same = (
        inner_matrix is not None
        and inner_matrix.shape == matrix.shape
        and is_near(inner_matrix, matrix, inner_matrix.dtype)
    )
    return (inner if is_same else wrapper), None


def _normalises_output(trace: Trace, wrapper: Event, inner: Event, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the wrapper's output is a norm of the inner module's output, as in a sandwich."""
    assert wrapper.output is not None and inner.output is not None, "both wrote"
    flat = wrapper.output.reshape(-1)
    between = [
        event
        for event in trace.events
        if inner.time < event.time < wrapper.time
        and approx_equal(event.input, inner.output)
        and event.output is not None
        and torch.equal(event.output.reshape(-1), flat)
    ]
    return next(norms_in(between, modules, inner.output.shape[-1]), None) is not None
