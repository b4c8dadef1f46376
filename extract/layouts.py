"""Cache of model layouts, by kind of inputs and state of the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from attlas.extract.capture.compiled import compilation_disabled
from attlas.extract.capture.discovery.find_layout import find_layout
from attlas.extract.capture.discovery.trace import is_causal_mask
from attlas.extract.capture.fingerprint import fingerprint, weights_state
from attlas.extract.capture.layout import Layout
from attlas.extract.capture.tensors import same_values
from attlas.extract.errors import CaptureError
from attlas.extract.model.inputs import TEXT_INPUTS, sequence_count
from attlas.extract.model.probe_inputs import probe_inputs

T = TypeVar("T")

# per model; bounds memory for a model that keeps changing
_MAX_CACHED = 16


@dataclass(frozen=True)
class _CachedLayout:
    """A layout, and the state of the weights with which it was found."""

    layout: Layout
    weights: int

    def is_current(self, model: nn.Module) -> bool:
        """Whether the layout is still valid. New weights can complete one with gaps: a projection or update of zero is not found."""
        return _is_complete(self.layout) or self.weights == weights_state(model)


_LAYOUTS: weakref.WeakKeyDictionary[nn.Module, dict[Any, _CachedLayout]] = weakref.WeakKeyDictionary()


def layout_of(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Layout:
    """The model's layout for inputs of these names, found by a pass over a few probe tokens, or over the first of `inputs`.

    It is cached until the model changes: its modules, code, hooks or configuration.
    """
    cached = _LAYOUTS.setdefault(model, {})
    key = (_inputs_key(model, inputs), fingerprint(model))
    if key not in cached or not cached[key].is_current(model):
        cached.pop(key, None)
        probe, sequences = probe_inputs(model, inputs)
        with compilation_disabled():
            layout = find_layout(model, probe, batch=sequences)
        cached[key] = _CachedLayout(layout, weights_state(model))
        for oldest in list(cached)[:-_MAX_CACHED]:
            del cached[oldest]
    return cached[key].layout


def forget_layouts(model: nn.Module) -> bool:
    """Forget the cached layouts of a model; returns whether there were any."""
    return bool(_LAYOUTS.pop(model, None))


def with_current_layout(model: nn.Module, attempt: Callable[[], T]) -> T:
    """Make an attempt that uses the model's layout. Where a pass shows other calls, the model is examined again, and it is repeated.

    The model may have changed in a way that its fingerprint does not show.
    """
    try:
        return attempt()
    except CaptureError:
        if not forget_layouts(model):
            raise
        return attempt()


def _is_complete(layout: Layout) -> bool:
    projected = all(attention.projection is not None for attention in layout.attentions)
    return projected and layout.residual_refusal is None and not layout.residual_refusals


def _inputs_key(model: nn.Module, inputs: Mapping[str, Any] | None) -> frozenset[Any]:
    names = frozenset({"input_ids"} if inputs is None else inputs) - {"attention_mask"}
    if inputs is not None and not hasattr(model, "config"):
        names = _tensor_kinds(inputs)
    return names if inputs is None or names <= TEXT_INPUTS else names | {min(2, sequence_count(model, inputs))}


def _tensor_kinds(inputs: Mapping[str, Any]) -> frozenset[Any]:
    """Everything about the inputs of a module without a config that can change which attention calls it makes."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return frozenset(
        (
            name,
            value.dim(),
            next(n for n, other in tensors.items() if same_values(other, value)),
            is_causal_mask(value),
        )
        if isinstance(value, torch.Tensor)
        else (name, value if isinstance(value, bool | int | float | str) else None)
        for name, value in inputs.items()
    )
