"""Calls of a trace that are not the attention of one layer: over something else than positions, or a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from attlas.extract.capture.discovery.module_tree import owner_of
from attlas.extract.capture.discovery.trace import PROBE_TOKENS, Call, Trace
from attlas.extract.capture.tensors import is_stream

# exceptions, by class: modules whose contexts are more than the product of one softmax with values
OF_SEVERAL_SOFTMAXES = ("InformerProbSparseAttention", "LEDEncoderSelfAttention", "LongformerSelfAttention")


def split_ignored_calls(trace: Trace, inputs: Mapping[str, Any]) -> tuple[Trace, frozenset[int]]:
    """Split off calls with as many heads as the probe has tokens: they attend over layers or the like, at one position."""
    ids = inputs.get("input_ids")
    tokens = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None
    is_probe = tokens == PROBE_TOKENS  # no model has this number of heads
    ignored = frozenset(
        n for n, call in enumerate(trace.calls) if call.heads == tokens != call.keys and (is_probe or call.queries == 1)
    )
    calls = [call for n, call in enumerate(trace.calls) if n not in ignored]
    return replace(trace, calls=calls), ignored


def split_partial_calls(model: nn.Module, trace: Trace) -> tuple[Trace, list[Call]]:
    """Split off calls that may be only a part of their module's attention: of some queries, or over blocks of keys."""
    partial = [call for call in trace.calls if _is_partial(model, trace, call)]
    return replace(trace, calls=[call for call in trace.calls if call not in partial]), partial


def _is_partial(model: nn.Module, trace: Trace, call: Call) -> bool:
    owner = owner_of(model, call)
    if type(model.get_submodule(owner)).__name__ in OF_SEVERAL_SOFTMAXES:
        return True
    end = next((e for e in trace.events if e.module == owner and e.time > call.time), None)
    if end is None or not is_stream(end.output) or len(end.output) != trace.batch:
        return False
    started = max((e.time for e in trace.events if e.module == owner and e.time < call.time), default=0)
    rows = sum(
        other.batch * other.queries
        for other in trace.calls
        if started < other.time < end.time and owner in other.modules
    )
    in_blocks = call.queries != call.keys and call.batch > trace.batch
    return rows < end.output.shape[:2].numel() or (in_blocks and rows == end.output.shape[:2].numel())
