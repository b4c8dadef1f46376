"""Intercept the attention interface of transformers, with an attention function and a mask function of the same name.

Both are needed: without a mask function of that name, the model would attend to padding. The model's configurations select
them for as long as the context is open. Discovery checks that the model then returns what it returns by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attlas.extract.capture.configurations import attention_implementation
from attlas.extract.capture.intercept.request import Attend, Request, refuse_dropout
from attlas.extract.engines import reference
from attlas.extract.engines.rows import AttentionCall
from attlas.extract.engines.visibility import visibility_from_mask, whole_axis

_NAME = "attlas"


@contextmanager
def intercept_interface(model: nn.Module, attend: Attend) -> Iterator[None]:
    """Send every call through the attention interface to `attend`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # registered globally, since transformers only makes masks for implementations that are
    functions_by_registry = (
        (ALL_ATTENTION_FUNCTIONS, _attention_function(attend)),
        (ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask),
    )
    try:
        for registry, function in functions_by_registry:
            registry.register(_NAME, function)
        with attention_implementation(model, _NAME):
            yield
    finally:
        for registry, _ in functions_by_registry:
            registry._global_mapping.pop(_NAME, None)


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
        **_unused: Any,
    ) -> tuple[Tensor, None]:
        refuse_dropout(dropout)
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and attention_mask is None and query.shape[-2] > 1
        mask = attention_mask if position_bias is None else _add_bias(position_bias, attention_mask)

        def call_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
            queries, keys = (whole_axis(len(rows), t.shape[-2], rows.device) for t in (rows, key))
            keys = queries if queries.tokens == keys.tokens else keys
            visibility = visibility_from_mask(mask, causal=causal, queries=queries, keys=keys)
            return reference.output_of(AttentionCall(rows, key, value, visibility, scale, softcap, s_aux))

        def call_original() -> Tensor:
            return call_rows(query, mask)

        of_rows = None if causal else call_rows
        output = attend(
            Request("interface", query, key, value, mask, causal, scale, call_original, of_rows, softcap, s_aux)
        )
        return output.transpose(1, 2).contiguous(), None

    return attention


def _add_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask
