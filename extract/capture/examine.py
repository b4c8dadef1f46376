"""Find what a model is made of by watching it run once on a few tokens.

Nothing is guessed from names: the output projection of an attention call is the module that reads its contexts, a norm
is a module that does what a norm does, and a sublayer's update is the tensor F for which x' = x + F(x) holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from extract.capture.layout import Attention, Layout
from extract.capture.probe import Call, Trace, same, trace_of
from extract.capture.seam import weight_by_input
from extract.capture.sites import find_sites
from extract.errors import CaptureError


def find_layout(model: nn.Module, inputs: Mapping[str, Any]) -> Layout:
    """Run the model once on small inputs and find its attention calls, projections, norms and residual sites.

    Raises CaptureError where fewer patterns arrive than the model says it has attention layers.
    """
    trace = trace_of(model, inputs)
    expected = expected_layers(model)
    calls = trace.calls
    if not calls or (expected is not None and len(calls) != expected):
        raise CaptureError(
            f"every attention layer must show its pattern; {type(model).__name__} has "
            f"{'at least one' if expected is None else expected} and showed {len(calls)}; load it with "
            'attn_implementation="sdpa", or it is a kind that is not measured yet'
        )
    if not all(c.self_attention for c in calls):
        raise CaptureError(
            f"only self-attention over the model's own tokens is measured; {type(model).__name__} has attention calls "
            "over something else"
        )
    modules = dict(model.named_modules())
    found = [_projection(trace, c, modules) for c in calls]
    attentions = tuple(
        Attention("decoder" if c.causal else "encoder", n, c.heads, p.module if p else None)
        for n, (c, p) in enumerate(zip(calls, found, strict=True))
    )
    width = next((p.width for p in found if p is not None), None)
    sites, refusal = find_sites(trace, modules, width)
    return Layout(attentions, sites, refusal, width)


def expected_layers(model: nn.Module) -> int | None:
    """How many attention calls the model says a forward pass makes, or None where it does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return sum(isinstance(m, nn.MultiheadAttention) for m in model.modules()) or None
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return sum("attention" in kind for kind in kinds)
    return getattr(config, "num_hidden_layers", None)


class _Projection(NamedTuple):
    module: str
    width: int  # of the stream it writes into


def _projection(trace: Trace, call: Call, modules: Mapping[str, nn.Module]) -> _Projection | None:
    """The linear module that reads exactly this call's contexts; None where something stands between."""
    for event in trace.events:
        if event.time < call.time or not same(event.read, call.contexts):
            continue
        weight = weight_by_input(modules[event.module])
        if weight is None or event.wrote is None:
            continue
        if weight.shape == (call.contexts.shape[-1], event.wrote.shape[-1]):
            return _Projection(event.module, weight.shape[-1])
    return None
