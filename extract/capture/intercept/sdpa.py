"""Intercept torch's scaled_dot_product_attention, which nearly every model ends in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from attlas.extract.capture.intercept.request import Attend, Request, interception_disabled, refuse_dropout
from attlas.extract.capture.tensors import same_values
from attlas.extract.errors import CaptureError


@contextmanager
def intercept_sdpa(attend: Attend, *, finds_imported: bool = True) -> Iterator[None]:
    """Send every call of scaled_dot_product_attention to `attend`, with the fused paths around it switched off.

    Calls through `torch.nn.functional` reach the replacement by name. A module that imported the function itself still
    calls the original: those calls are caught by a function mode, which slows down every other operation of torch.
    """
    original = functional.scaled_dot_product_attention
    original_multi_head = functional.multi_head_attention_forward
    fast_path = torch.backends.mha.get_fastpath_enabled()
    multi_head = _MultiHeadForward(original_multi_head)
    torch.backends.mha.set_fastpath_enabled(False)
    replacement = _replacement(original, attend, multi_head)
    imported = _replacement(original, lambda request: attend(replace(request, is_imported=True)), multi_head)
    functional.scaled_dot_product_attention = replacement
    functional.multi_head_attention_forward = multi_head
    try:
        with _CallsOfOriginal(original, imported) if finds_imported else nullcontext():
            yield
    finally:
        functional.scaled_dot_product_attention = original
        functional.multi_head_attention_forward = original_multi_head
        torch.backends.mha.set_fastpath_enabled(fast_path)


class _CallsOfOriginal(TorchFunctionMode):
    """Redirects calls of the original function, under whatever name they are made."""

    def __init__(self, original: Callable[..., Tensor], replacement: Callable[..., Tensor]) -> None:
        super().__init__()
        self._original = original
        self._replacement = replacement

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (self._replacement if func is self._original else func)(*args, **(kwargs or {}))


def _replacement(
    original: Callable[..., Tensor], attend: Attend, multi_head: _MultiHeadForward
) -> Callable[..., Tensor]:
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        refuse_dropout(dropout_p)

        def call_original() -> Tensor:
            with interception_disabled():
                return original(
                    query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
                )

        def call_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
            with interception_disabled():
                return original(rows, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)

        scaling = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        if query.dim() == 3:  # no head dimension: one head
            queries, keys, values = (t[:, None] for t in (query, key, value))
            mask = attn_mask if attn_mask is None or attn_mask.dim() < 3 else attn_mask[:, None]
            request = Request("sdpa", queries, keys, values, mask, is_causal, scaling, lambda: call_original()[:, None])
            return attend(request)[:, 0]
        batch = max(len(query), len(key))  # either may be shared by the whole batch
        queries, keys, values = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
        return attend(
            Request(
                "sdpa",
                queries,
                keys,
                values,
                attn_mask,
                is_causal,
                scaling,
                call_original,
                None if is_causal else call_rows,
                projection=multi_head.projection,
                is_cross_attention=multi_head.is_cross_attention,
                in_projections=multi_head.in_projections,
            )
        )

    return scaled_dot_product_attention


class _MultiHeadForward:
    """Replaces torch's multi_head_attention_forward so that it always calls scaled_dot_product_attention.

    If the caller wants weights, torch computes the softmax itself. The function is then run a second time without them. While
    it runs, `projection`, `in_projections` and `is_cross_attention` are those of the call.
    """

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self._original = original
        self._signature = _signature(original)
        self.projection: Tensor | None = None
        self.is_cross_attention: bool | None = None
        self.in_projections: tuple[tuple[Tensor, Tensor], ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.is_cross_attention is not None:  # torch calls the function from itself where a function mode is active
            return self._original(*args, **kwargs)
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        _refuse_added_keys(bound.arguments)
        self.projection = bound.arguments["out_proj_weight"]
        self.is_cross_attention = not same_values(bound.arguments["query"], bound.arguments["key"])
        self.in_projections = _in_projections(bound.arguments)
        try:
            with_weights = self._original(*bound.args, **bound.kwargs) if bound.arguments["need_weights"] else None
            bound.arguments["need_weights"] = False
            intercepted = self._original(*bound.args, **bound.kwargs)
        finally:
            self.projection = self.is_cross_attention = None
            self.in_projections = ()
        return intercepted if with_weights is None else with_weights


@lru_cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _in_projections(arguments: Mapping[str, Any]) -> tuple[tuple[Tensor, Tensor], ...]:
    """What queries, keys and values are made of, and by which weights: one for all three, or one for each."""
    separate = [arguments[f"{letter}_proj_weight"] for letter in "qkv"]
    weights = separate if arguments["use_separate_proj_weight"] else [arguments["in_proj_weight"]] * 3
    inputs = [arguments[name] for name in ("query", "key", "value")]
    return tuple(zip(inputs, weights, strict=True))


def _refuse_added_keys(arguments: Mapping[str, Any]) -> None:
    settings = {"add_bias_kv": arguments["bias_k"] is not None, "add_zero_attn": arguments["add_zero_attn"]}
    for setting, is_on in settings.items():
        if is_on:
            raise CaptureError(
                f"every key must be a token; nn.MultiheadAttention with {setting} adds one that is none; build it without"
            )
