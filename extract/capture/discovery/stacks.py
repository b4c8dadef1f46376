"""The stack and layer of every attention call, and the model inputs whose tokens its queries and keys are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from attlas.extract.capture.discovery.trace import Call, Trace

# the stack of each kind of input, in the words of transformers
_STACK_OF_MODALITY = {"image": "vision", "video": "vision", "audio": "audio", "text": "text"}
_STACK_OF_INPUT = {"input_ids": "text", "pixel_values": "vision", "input_features": "audio", "input_values": "audio"}

# stacks that may hold the tokens of a text
OF_TEXT = ("encoder", "decoder", "text")


class StackPosition(NamedTuple):
    """Where an attention call belongs. `queries` and `keys` name a model input, or are None."""

    stack: str
    layer: int
    queries: str | None
    keys: str | None


def stack_positions(model: nn.Module, trace: Trace, inputs: Mapping[str, Any]) -> list[StackPosition]:
    """Return the position of every call of a trace.

    Layers are numbered within their stack in order of execution: many models store one layer under several numbers, or none.
    """
    modalities = [_modality(model, call.modules) for call in trace.calls]
    decoder = _decoder_name(model)
    of_self_attention = {m for m, call in zip(modalities, trace.calls, strict=True) if not call.is_cross_attention}
    several = len(of_self_attention) > 1 and decoder is None
    counts: Counter[str] = Counter()
    positions = []
    for modality, call in zip(modalities, trace.calls, strict=True):
        stack = _stack(modality, call, several=several)
        positions.append(StackPosition(stack, counts[stack], *_input_names(modality, call, trace, inputs, decoder)))
        counts[stack] += 1
    return positions


def _stack(modality: str, call: Call, *, several: bool) -> str:
    if call.is_cross_attention:
        return "cross"
    if modality == "text" and not several:
        return "decoder" if call.causal else "encoder"
    return modality


def _modality(model: nn.Module, modules: tuple[str, ...]) -> str:
    """The modality of the innermost transformers model around a call; text if none declares one."""
    for name in (*reversed(modules), ""):
        module: Any = model.get_submodule(name)
        if getattr(module, "config", None) is None or not hasattr(module, "main_input_name"):
            continue
        declared = getattr(module, "input_modalities", ())
        declared = (declared,) if isinstance(declared, str) else tuple(declared or ())
        if (
            len(declared) == 1
            and declared[0] in _STACK_OF_MODALITY
            and (declared[0] != "text" or module.main_input_name == "input_ids")
        ):
            return _STACK_OF_MODALITY[declared[0]]
        if module.main_input_name in _STACK_OF_INPUT:
            return _STACK_OF_INPUT[module.main_input_name]
    return "text"


def _decoder_name(model: nn.Module) -> str | None:
    """The name of the decoder of an encoder–decoder model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    decoder: Any = model.get_decoder()  # pyright: ignore
    return next((name for name, module in model.named_modules() if module is decoder and name), None)


def _input_names(
    modality: str, call: Call, trace: Trace, inputs: Mapping[str, Any], decoder: str | None
) -> tuple[str | None, str | None]:
    """The inputs whose tokens are the queries and the keys; None for anything else."""

    def name_if_fits(name: str, tokens: int) -> str | None:
        ids = inputs.get(name)
        fits = isinstance(ids, torch.Tensor) and tuple(ids.shape[:2]) == (call.batch, tokens)
        return name if fits and call.batch == trace.batch else None

    if modality != "text":
        return None, None
    in_decoder = decoder is not None and decoder in call.modules
    queries = name_if_fits("decoder_input_ids" if in_decoder else "input_ids", call.queries)
    if not call.is_cross_attention:
        return queries, queries
    return queries, name_if_fits("input_ids", call.keys) if in_decoder else None
