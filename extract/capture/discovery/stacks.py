"""Which stack an attention call belongs to, its layer there, and whose tokens its queries and keys are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from attlas.extract.capture.discovery.trace import Call, Trace

# what transformers calls the kinds of input that a model takes, in the words of `stack`
_TOWERS = {"image": "vision", "video": "vision", "audio": "audio", "text": "text"}
_INPUTS = {"input_ids": "text", "pixel_values": "vision", "input_features": "audio", "input_values": "audio"}

# stacks that may hold the tokens of a text
OF_TEXT = ("encoder", "decoder", "text")


class Place(NamedTuple):
    stack: str
    layer: int
    queries: str | None
    keys: str | None


def stacks_of(model: nn.Module, trace: Trace, inputs: Mapping[str, Any]) -> list[Place]:
    """Layers are numbered within their stack as they come: many models hold one layer under several numbers, or none."""
    kinds = [modality(model, call.inside) for call in trace.calls]
    decoder = _part(model, "get_decoder")
    several = (
        len({k for k, call in zip(kinds, trace.calls, strict=True) if not call.is_cross_attention}) > 1
        and decoder is None
    )
    counts: Counter[str] = Counter()
    places = []
    for kind, call in zip(kinds, trace.calls, strict=True):
        stack = _stack(kind, call, several=several)
        places.append(Place(stack, counts[stack], *_tokens(kind, call, trace, inputs, decoder)))
        counts[stack] += 1
    return places


def _stack(kind: str, call: Call, *, several: bool) -> str:
    if call.is_cross_attention:
        return "cross"
    if kind == "text" and not several:
        return "decoder" if call.causal else "encoder"
    return kind


def modality(model: nn.Module, inside: tuple[str, ...]) -> str:
    """What the innermost model of transformers around a call reads; text where none says."""
    for name in (*reversed(inside), ""):
        module: Any = model.get_submodule(name)
        if getattr(module, "config", None) is None or not hasattr(module, "main_input_name"):
            continue
        read = getattr(module, "input_modalities", ())
        read = (read,) if isinstance(read, str) else tuple(read or ())
        if len(read) == 1 and read[0] in _TOWERS and (read[0] != "text" or module.main_input_name == "input_ids"):
            return _TOWERS[read[0]]
        if module.main_input_name in _INPUTS:
            return _INPUTS[module.main_input_name]
    return "text"


def _part(model: nn.Module, getter: str) -> str | None:
    """The name of the encoder or decoder of an encoder–decoder model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, getter):
        return None
    part: Any = getattr(model, getter)()
    return next((name for name, module in model.named_modules() if module is part and name), None)


def _tokens(
    kind: str, call: Call, trace: Trace, inputs: Mapping[str, Any], decoder: str | None
) -> tuple[str | None, str | None]:
    """The inputs whose tokens queries and keys are; None for what is no token of an input."""

    def named(name: str, count: int) -> str | None:
        ids = inputs.get(name)
        alike = isinstance(ids, torch.Tensor) and tuple(ids.shape[:2]) == (call.batch, count)
        return name if alike and call.batch == trace.batch else None

    if kind != "text":
        return None, None
    in_decoder = decoder is not None and decoder in call.inside
    queries = named("decoder_input_ids" if in_decoder else "input_ids", call.queries)
    if not call.is_cross_attention:
        return queries, queries
    return queries, named("input_ids", call.keys) if in_decoder else None
