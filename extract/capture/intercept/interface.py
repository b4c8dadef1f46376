"""The attention interface of transformers: an attention function and a mask function of the same name.

Without the mask function attention would land silently on padding. A model is told to use them through its
configurations, for as long as it is watched; whether it then computes what it computes by itself is seen in its probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attlas.extract.capture.intercept.sdpa import Attend, Request, refuse_dropout
from attlas.extract.engines import reference
from attlas.extract.engines.rows import AttentionCall
from attlas.extract.engines.visibility import visibility_from_mask, whole_axis

_NAME = "attlas"


def configurations(model: nn.Module) -> list[Any]:
    """Every configuration of transformers that a module of the model holds; none for a model of another make."""
    found: dict[int, Any] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())


@contextmanager
def attending_by(model: nn.Module, implementation: str) -> Iterator[None]:
    """Let the model's modules that ask their configuration how to attend get this answer."""
    held = [(config, config._attn_implementation_internal) for config in configurations(model)]
    try:
        for config, _ in held:
            config._attn_implementation_internal = implementation
        yield
    finally:
        for config, before in held:
            config._attn_implementation_internal = before


@contextmanager
def replaced_interface(model: nn.Module, attend: Attend) -> Iterator[None]:
    """Let every call through the attention interface come to `attend`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # registered for all, as masks are only made for what is; and taken away again
    ours = ((ALL_ATTENTION_FUNCTIONS, _attention_function(attend)), (ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask))
    try:
        for functions, function in ours:
            functions.register(_NAME, function)
        with attending_by(model, _NAME):
            yield
    finally:
        for functions, _ in ours:
            functions._global_mapping.pop(_NAME, None)


def _attention_function(attend: Attend) -> Any:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_other: Any,
    ) -> tuple[Tensor, None]:
        refuse_dropout(dropout)
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and attention_mask is None and query.shape[-2] > 1
        mask = attention_mask if position_bias is None else _biased(position_bias, attention_mask)

        def of_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
            queries, keys = (whole_axis(len(rows), t.shape[-2], rows.device) for t in (rows, key))
            same = queries.tokens == keys.tokens
            seen = visibility_from_mask(mask, causal=causal, queries=queries, keys=queries if same else keys)
            return reference.output_of(AttentionCall(rows, key, value, seen, scale, softcap, s_aux))

        def call_original() -> Tensor:
            return of_rows(query, mask)

        part = None if causal else of_rows
        output = attend(
            Request("interface", query, key, value, mask, causal, scale, call_original, part, softcap, s_aux)
        )
        return output.transpose(1, 2).contiguous(), None

    return attention


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask
