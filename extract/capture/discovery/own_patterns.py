"""Check a trace against the patterns that a transformers model returns itself when it attends by eager code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attlas.extract.capture.configurations import attention_implementation, configurations
from attlas.extract.capture.discovery.call_filters import split_ignored_calls, split_partial_calls
from attlas.extract.capture.discovery.trace import Call, Trace, trace_of
from attlas.extract.capture.discovery.windows import join_windows
from attlas.extract.errors import CaptureError


def matches_own_patterns(model: nn.Module, inputs: Mapping[str, Any], trace: Trace) -> bool:
    """Whether the model's own patterns confirm the trace; False if it returns none.

    Raises CaptureError if one of them is missing from the trace, or if eager code makes more calls.
    """
    if not configurations(model) or any(call.pattern is None for call in trace.calls):
        return False
    try:
        with attention_implementation(model, "eager"):
            eager = trace_of(model, {**inputs, "output_attentions": True}, batch=trace.batch, events=False)
    except Exception:  # not every model takes the argument, or has an eager form
        return False
    eager, _ = split_partial_calls(model, join_windows(model, split_ignored_calls(eager, inputs)[0]))
    heads = {call.heads for call in trace.calls}
    patterns = [p for p in _returned_attentions(eager.output) if _is_distribution(p) and _is_over_keys(p, heads)]
    missing = [p for p in patterns if not any(_is_pattern_of(p, call, trace.eps) for call in trace.calls)]
    replayed = sum(call.method == "replay" for call in trace.calls)
    if replayed:
        # A model that attends over blocks, or for a sample, returns patterns in a layout of its own. Those of replayed
        # calls are known to be right: they reproduce the module's contexts.
        shapes = {(call.queries, call.keys) for call in trace.calls if call.method != "replay"}
        missing = [p for p in missing if tuple(p.shape[-2:]) in shapes][replayed:]
    if missing or len(eager.calls) > len(trace.calls):
        raise CaptureError(
            f"every attention layer must show its pattern; {type(model).__name__} gives {len(patterns)} patterns of its own "
            f"and makes {len(eager.calls)} attention calls when it attends by eager code; {len(trace.calls)} were seen, and "
            f"{len(missing)} of its patterns were not among them"
        )
    return bool(patterns) and not replayed


def _returned_attentions(output: Any) -> list[torch.Tensor]:
    """Every tensor that a transformers model returned as attentions."""
    items = output.items() if isinstance(output, Mapping) else []
    return [
        pattern
        for name, value in items
        for pattern in (_tensors(value) if "attentions" in name else _returned_attentions(value))
    ]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in values for tensor in _tensors(item)]


def _is_distribution(pattern: torch.Tensor) -> bool:
    """Whether rows are weights that sum to 1, or less with a sink. Some models return scores or states instead."""
    return bool((pattern >= 0).all() and (pattern.sum(-1) <= 1 + 1e-2).all())


def _is_over_keys(pattern: torch.Tensor, heads: set[int]) -> bool:
    """Whether rows belong to a head. Deformable attention returns [batch, query, head, point], or levels before points."""
    if pattern.dim() > 4 and torch.allclose(pattern.sum((-1, -2)), pattern.new_ones(()), atol=1e-4):
        return False
    if pattern.dim() == 3:  # batch and heads in one dimension
        return any(len(pattern) % count == 0 for count in heads)
    return bool(heads & {*pattern.shape[1:-2]})


def _is_pattern_of(returned: torch.Tensor, call: Call, eps: float) -> bool:
    """Whether a returned pattern is that of a call. Rows are rescaled, since some leave out the share of a learned sink."""
    assert call.pattern is not None, "small enough to be kept"
    shape, traced = returned.shape[-2:], call.pattern
    if returned.numel() != traced.numel() and returned.shape[:2] == traced.shape[:2] and shape <= traced.shape[-2:]:
        traced = traced[..., -shape[0] :, -shape[1] :]  # without the tokens that the model puts before the user's
    tolerance = max(1e-4, 8 * eps)  # half precision rounds; another pattern is far off
    head_dims = range(1, returned.dim() - 3)
    for candidate in (returned, *(returned.movedim(dim, -3) for dim in head_dims)):
        candidate = candidate.flatten(0, -4) if candidate.dim() > 4 else candidate
        if candidate.numel() != traced.numel() or candidate.shape[-2:] != traced.shape[-2:]:
            continue
        if _has_same_rows(candidate.reshape(traced.shape).to(traced), traced, tolerance):
            return True
    return False


def _has_same_rows(returned: torch.Tensor, traced: torch.Tensor, tolerance: float) -> bool:
    returned, traced = (p / p.sum(-1, keepdim=True).clamp_min(1e-30) for p in (returned, traced))
    averaged = traced.mean(1, keepdim=True).expand_as(traced)  # as torch's multi-head attention may return it
    sees_keys = traced.isfinite().all(-1)  # a row that sees no key may hold anything
    return bool(sees_keys.any()) and any(
        torch.allclose(returned[sees_keys], rows[sees_keys], atol=tolerance, rtol=tolerance)
        for rows in (traced, averaged)
    )
