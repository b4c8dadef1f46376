"""Find the layout of a model by running it once on a few tokens.

Nothing is guessed from names: an output projection is the module that reads an attention call's contexts, a norm is a module
that computes what a norm does, and an update is the tensor F for which x' = x + F(x) holds.

Missing a layer would be the worst error here. So the calls are counted again in ways that know nothing of the first count: by
the model's own eager patterns if it returns them, else by its configuration, and by the modules that ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attlas.extract.capture.configurations import configurations
from attlas.extract.capture.discovery.call_filters import split_ignored_calls, split_partial_calls
from attlas.extract.capture.discovery.completeness import complete_trace
from attlas.extract.capture.discovery.input_maps import find_input_maps
from attlas.extract.capture.discovery.module_tree import owner_of
from attlas.extract.capture.discovery.projection import NoProjection, Projection, find_projection
from attlas.extract.capture.discovery.sites import find_sites, joint_refusal
from attlas.extract.capture.discovery.stacks import stack_positions
from attlas.extract.capture.discovery.trace import Call, Trace, approx_equal, trace_of
from attlas.extract.capture.discovery.windows import batch_last_calls, join_windows, may_be_in_pieces
from attlas.extract.capture.layout import Attention, Layout
from attlas.extract.capture.precision import cast_inputs, cast_weights, dtypes_to_try
from attlas.extract.capture.tensors import first_tensor
from attlas.extract.errors import CaptureError


def find_layout(model: nn.Module, inputs: Mapping[str, Any], *, batch: int) -> Layout:
    """Run the model on inputs of `batch` sequences and return its layout.

    Next to the largest entries of a stream, the model's own type may round an update away. So a model in half precision is
    examined with its weights in float32, and any model whose stream is not found completely once more in float64. If it does
    not run in that type, or shows no more, it is examined as it is.

    Raises CaptureError if fewer patterns are found than the model has attention layers.
    """
    _refuse_changing_model(model)
    layouts: list[Layout] = []
    for dtype in dtypes_to_try(model):
        try:
            with cast_weights(model, dtype):
                layout = _layout_of(model, cast_inputs(inputs, dtype), batch=batch)
        except Exception:  # kernels that take no other type, or no memory for the weights twice
            if dtype is None and not layouts:
                raise
            continue
        if layout.residual_refusal is None and not layout.residual_refusals:
            return layout
        layouts.append(layout)
    return max(layouts, key=lambda layout: len(layout.sites))


def _refuse_changing_model(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "attention_type", None) == "block_sparse":
        raise CaptureError(
            f"what a model computes must not depend on what came before; {type(model).__name__} in blocks changes for good "
            'to full attention at its first short sequence; load it with attention_type="original_full"'
        )


def _layout_of(model: nn.Module, inputs: Mapping[str, Any], *, batch: int) -> Layout:
    trace = trace_of(model, inputs, batch=batch)
    if any(call.method == "softmax" for call in trace.calls) or not trace.calls:
        trace = _trace_through_interface(model, inputs, trace) or trace
    trace, ignored = split_ignored_calls(trace, inputs)
    trace, partial = split_partial_calls(model, join_windows(model, trace))
    trace, without_pattern = complete_trace(model, inputs, trace, partial)
    modules = dict(model.named_modules())
    attentions = _attentions(model, inputs, trace, modules)
    sites, refusals = find_sites(trace, attentions, modules)
    return Layout(
        attentions,
        sites,
        joint_refusal(sites, refusals),
        width=next((a.shape[1] for a in attentions if a.shape is not None), None),
        ignored_calls=ignored,
        without_pattern=without_pattern,
        mixed=any(call.batch % batch for call in trace.calls),
        residual_refusals=refusals,
        imports_attention=trace.imports_attention,
    )


def _attentions(
    model: nn.Module, inputs: Mapping[str, Any], trace: Trace, modules: Mapping[str, nn.Module]
) -> tuple[Attention, ...]:
    batch_last = batch_last_calls(model, inputs, trace)
    projections = [_projection(trace, call, modules) for call in trace.calls]
    positions = stack_positions(model, trace, inputs)
    return tuple(
        Attention(
            stack=position.stack,
            layer=position.layer,
            heads=call.heads,
            projection=projection.module if projection else None,
            method=call.method,
            module=owner_of(model, call),
            queries=position.queries,
            keys=position.keys,
            is_cross_attention=call.is_cross_attention,
            batch_last=number in batch_last,
            dim_order=call.dim_order,
            replay=call.replay,
            in_pieces=position.queries is None and may_be_in_pieces(model, trace, call),
            shape=projection.shape if projection else None,
            no_projection=reason,
            inputs=find_input_maps(model, trace, call, modules),
        )
        for number, (call, position, (projection, reason)) in enumerate(
            zip(trace.calls, positions, projections, strict=True)
        )
    )


def _projection(trace: Trace, call: Call, modules: Mapping[str, nn.Module]) -> tuple[Projection | None, str | None]:
    """The output projection of a call, or why it has none."""
    try:
        return find_projection(trace, call, modules), None
    except NoProjection as reason:
        return None, str(reason)


def _trace_through_interface(model: nn.Module, inputs: Mapping[str, Any], original: Trace) -> Trace | None:
    """The same pass through the attention interface; None if the model's output is then another one."""
    if not configurations(model):
        return None
    try:
        through = trace_of(model, inputs, batch=original.batch, interface=True, events=False)
        if not any(call.method == "interface" for call in through.calls) or not _has_same_output(
            original, through, mask=None
        ):
            return None
        padded = _pad(inputs)
        if padded is not None:
            direct, through = (
                trace_of(model, padded, batch=original.batch, interface=interface, events=False)
                for interface in (False, True)
            )
            if not _has_same_output(direct, through, mask=padded["attention_mask"]):
                return None
        return trace_of(model, inputs, batch=original.batch, interface=True)
    except Exception:
        # the model's own code, called in a way that its authors may not have meant: the original trace stands
        return None


def _pad(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs with padding at the end of the last sequence, so that masks matter."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] < 4:
        return None
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    return {**inputs, "attention_mask": mask}


def _has_same_output(a: Trace, b: Trace, *, mask: torch.Tensor | None) -> bool:
    """Whether the model's output is the same at all real tokens. Any difference on the way would show there."""
    if len(a.calls) > len(b.calls):
        return False
    output, other = first_tensor(a.output), first_tensor(b.output)
    if output is None or other is None or output.shape != other.shape:
        return False
    if mask is not None and output.shape[:2] == mask.shape:
        output, other = output[mask.bool()], other[mask.bool()]
    return approx_equal(output.float(), other.float())
