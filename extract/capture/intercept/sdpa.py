"""The names that are replaced while a model is watched, and how to read what a module reads and writes.

Nearly every model ends in torch's scaled_dot_product_attention. What transformers calls through its attention interface
is reached by an attention function and a mask function of our own (`interface`), what computes softmax by hand by
`softmax`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from attlas.extract.capture.layout import CaptureMethod
from attlas.extract.errors import CaptureError


@dataclass(frozen=True)
class Request:
    """An attention call that is about to be made: whoever receives it gives the output [batch, head, query, width].

    `mask` is as for scaled_dot_product_attention. `plain` makes the call as the model would, `call` a part of it: of such
    queries and the rows of the mask that are theirs; None where queries see by their places. `projection` is the weight
    that reads the contexts, and `crosses` whether the keys come from elsewhere, where the call itself says so.
    """

    way: CaptureMethod
    query: Float[Tensor, "batch head query width"]
    key: Float[Tensor, "batch key_head key width"]
    value: Float[Tensor, "batch key_head key value_width"]
    mask: Tensor | None
    causal: bool
    scale: float
    call_original: Callable[[], Tensor]
    call: Callable[[Tensor, Tensor | None], Tensor] | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    projection: Tensor | None = None
    is_cross_attention: bool | None = None


Attend = Callable[[Request], "Tensor"]

# what is computed in this context is not the model's, or heard already
interception_disabled = torch._C.DisableTorchFunction


@contextmanager
def replaced_sdpa(attend: Attend) -> Iterator[None]:
    """Replace torch's scaled_dot_product_attention by `attend`, and switch the fused paths around it off.

    A module that has imported the function calls it by a name of its own: such calls are heard by a function mode.
    """
    original = functional.scaled_dot_product_attention
    multi_head = functional.multi_head_attention_forward
    fast = torch.backends.mha.get_fastpath_enabled()
    inside = _MultiHead(multi_head)
    torch.backends.mha.set_fastpath_enabled(False)
    receiving = _receiving(original, attend, inside)
    functional.scaled_dot_product_attention = receiving
    functional.multi_head_attention_forward = inside
    try:
        with _Imported(original, receiving):
            yield
    finally:
        functional.scaled_dot_product_attention = original
        functional.multi_head_attention_forward = multi_head
        torch.backends.mha.set_fastpath_enabled(fast)


class _Imported(TorchFunctionMode):
    """Hears every call of torch's own function, by whatever name; those that `attend` makes are none of the model's."""

    def __init__(self, original: Callable[..., Tensor], receiving: Callable[..., Tensor]) -> None:
        super().__init__()
        self._original = original
        self._receiving = receiving

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (self._receiving if func is self._original else func)(*args, **(kwargs or {}))


def _receiving(original: Callable[..., Tensor], attend: Attend, inside: _MultiHead) -> Callable[..., Tensor]:
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

        def of_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
            with interception_disabled():
                return original(rows, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)

        if query.dim() == 3:  # without heads: one
            queries, keys, values = (t[:, None] for t in (query, key, value))
            mask = attn_mask if attn_mask is None or attn_mask.dim() < 3 else attn_mask[:, None]
            return attend(
                Request(
                    "sdpa",
                    queries,
                    keys,
                    values,
                    mask,
                    is_causal,
                    _scale(query, scale),
                    lambda: call_original()[:, None],
                )
            )[:, 0]
        batch = max(len(query), len(key))  # one of them may be the same for all
        queries, keys, values = (t.expand(batch, -1, -1, -1) for t in (query, key, value))
        scaling = _scale(query, scale)
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
                None if is_causal else of_rows,
                projection=inside.projection,
                is_cross_attention=inside.is_cross_attention,
            )
        )

    return scaled_dot_product_attention


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def refuse_dropout(probability: float) -> None:
    if probability:
        raise CaptureError("a pattern is measured without dropout; the model is in training mode; call model.eval()")


class _MultiHead:
    """torch's multi_head_attention_forward, made to go through scaled_dot_product_attention, and what it tells of a call.

    Asked for its weights it computes softmax itself; then it is asked twice.
    """

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self._original = original
        self._signature = inspect.signature(original)
        self.projection: Tensor | None = None
        self.is_cross_attention: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.is_cross_attention is not None:  # torch hands it on to itself where functions are followed
            return self._original(*args, **kwargs)
        given = self._signature.bind(*args, **kwargs)
        given.apply_defaults()
        _refuse_keys_that_are_no_tokens(given.arguments)
        self.projection = given.arguments["out_proj_weight"]
        self.is_cross_attention = not same_values(given.arguments["query"], given.arguments["key"])
        try:
            asked = self._original(*given.args, **given.kwargs) if given.arguments["need_weights"] else None
            given.arguments["need_weights"] = False
            seen = self._original(*given.args, **given.kwargs)
        finally:
            self.projection = self.is_cross_attention = None
        return seen if asked is None else asked


def _refuse_keys_that_are_no_tokens(given: Mapping[str, Any]) -> None:
    for setting, there in (("add_bias_kv", given["bias_k"] is not None), ("add_zero_attn", given["add_zero_attn"])):
        if there:
            raise CaptureError(
                f"every key must be a token; nn.MultiheadAttention with {setting} adds one that is none; build it without"
            )


def same_values(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def first_tensor(value: Any) -> Tensor | None:
    """The tensor that a module's input or output is, or begins with."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return first_tensor(value[0]) if value else None
    return None


def read_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a module reads: its first argument, however it was passed."""
    return first_tensor(args) if args else first_tensor(next(iter(kwargs.values()), None))


def is_stream(value: Any) -> TypeGuard[Tensor]:
    """Whether it may be states of tokens: [batch, token, width]."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 3


def has_matrix(module: nn.Module) -> bool:
    """Whether a module keeps a weight of two dimensions, as linear ones do; what it does with it is not known by that."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 2
