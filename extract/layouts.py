"""Layouts of models, found once for inputs of a kind, and again when a model has changed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attlas.extract.capture.compiled import compilation_disabled
from attlas.extract.capture.discovery.find_layout import find_layout
from attlas.extract.capture.discovery.trace import is_causal_mask
from attlas.extract.capture.fingerprint import fingerprint, weights_state
from attlas.extract.capture.layout import Layout
from attlas.extract.capture.tensors import same_values
from attlas.extract.model.inputs import TEXT_INPUTS, sequence_count
from attlas.extract.model.probe_inputs import probe_inputs

# kinds of inputs and states of a model that are remembered: one that changes all the time is no reason to keep them all
_KEPT = 16


@dataclass(frozen=True)
class _Examined:
    """A layout, and the weights that the model had; of no matter where all was found."""

    layout: Layout
    weights: int

    def holds(self, model: nn.Module) -> bool:
        """Whether weights that were written since may have changed it: an update of zero is none that could be found."""
        return _is_whole(self.layout) or self.weights == weights_state(model)


_LAYOUTS: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Examined]] = weakref.WeakKeyDictionary()


def layout_of(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Layout:
    """The model's layout for inputs of these names, found by a probe of a few tokens, or the first of `inputs`.

    It is found once, as long as the model stays what it is: its modules, code, hooks, configuration.
    """
    known = _LAYOUTS.setdefault(model, {})
    key = (_inputs_key(model, inputs), fingerprint(model))
    if key not in known or not known[key].holds(model):
        known.pop(key, None)
        probe, sequences = probe_inputs(model, inputs)
        with compilation_disabled():
            layout = find_layout(model, probe, batch=sequences)
        known[key] = _Examined(layout, weights_state(model))
        for oldest in list(known)[:-_KEPT]:
            del known[oldest]
    return known[key].layout


def forget_layouts(model: nn.Module) -> bool:
    """Let a model be examined again; False where it has not been before."""
    return bool(_LAYOUTS.pop(model, None))


def _is_whole(layout: Layout) -> bool:
    projected = all(attention.projection is not None for attention in layout.attentions)
    return projected and layout.residual_refusal is None and not layout.residual_refusals


def _inputs_key(model: nn.Module, inputs: Mapping[str, Any] | None) -> frozenset[Any]:
    names = frozenset({"input_ids"} if inputs is None else inputs) - {"attention_mask"}
    if inputs is not None and not hasattr(model, "config"):
        names = _kinds(inputs)
    return names if inputs is None or names <= TEXT_INPUTS else names | {min(2, sequence_count(model, inputs))}


def _kinds(inputs: Mapping[str, Any]) -> frozenset[Any]:
    """Everything about the inputs of a module of no known make that can change which attention calls it makes."""
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
