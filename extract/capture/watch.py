"""Watch a forward pass: attention calls as they happen, and the residual stream beside them.

What a call shows is summed up at once: nothing of the size of a pattern is held.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from extract.capture.layout import Attention, Layout, Site
from extract.capture.seam import replaced_sdpa, weight_by_input
from extract.capture.stream import CompiledStream, Stream
from extract.engines.rows import AttentionCall
from extract.engines.visibility import Visibility, see
from extract.errors import CaptureError
from extract.statistics.sums import HeadObservation, HeadSums

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from extract.engines import Engine

# one name is replaced for the whole process, so one forward pass is watched at a time
_WATCHING = threading.Lock()


@dataclass(frozen=True)
class Batch:
    """What is known of a batch besides the model's inputs; real tokens of a sequence stand together."""

    start: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"]
    tokens: int
    token_ids: Int[Tensor, "batch token"] | None = None
    classes: Int[Tensor, "batch token"] | None = None


class Observer(Protocol):
    """Takes observations as they are made."""

    def heads(self, attention: Attention, sums: HeadSums) -> None: ...

    def residual(self, site: Site, values: Float[Tensor, "column batch"]) -> None: ...


@dataclass
class _Watch:
    """The state of one watched forward pass."""

    layout: Layout
    batch: Batch
    engine: Engine
    observer: Observer
    factors: Mapping[int, Tensor]
    stream: Stream | None
    calls: int = 0
    seen_masks: dict[tuple[int, bool], tuple[Any, Visibility]] = field(default_factory=dict)

    @property
    def next_write(self) -> Tensor | None:
        """How the heads of the attention call that comes next write into the stream."""
        attentions = self.layout.attentions
        return self.factors.get(attentions[self.calls].layer) if self.calls < len(attentions) else None


@contextmanager
def watching(
    model: nn.Module,
    layout: Layout,
    *,
    batch: Batch,
    engine: Engine,
    observer: Observer,
    residual: bool = True,
) -> Iterator[None]:
    """Watch one forward pass made inside this context.

    Raises CaptureError when the pass shows other attention calls or residual sites than the layout has.
    """
    stream = None
    if residual and layout.residual_refusal is None:
        kind = CompiledStream if engine.compiled else Stream
        stream = kind(layout, batch.start, batch.length, batch.tokens, observer.residual)
    watch = _Watch(layout, batch, engine, observer, _write_factors(model, layout), stream)
    with _WATCHING, ExitStack() as stack:
        if stream is not None:
            stack.enter_context(stream.watched(model))
        stack.enter_context(replaced_sdpa(lambda original: _watched(watch, original)))
        yield
        if watch.calls != len(layout.attentions):
            raise CaptureError(
                f"every forward pass must show each attention layer once; expected {len(layout.attentions)} patterns, "
                f"got {watch.calls}; the model changed its way since it was examined"
            )
        if stream is not None and stream.done != len(layout.sites):
            raise CaptureError(
                f"every forward pass must show each residual site once; expected {len(layout.sites)}, got {stream.done}"
            )


_FACTORS: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], dict[int, Tensor]]] = weakref.WeakKeyDictionary()


def _write_factors(model: nn.Module, layout: Layout) -> dict[int, Tensor]:
    """Per layer R [head, head_width, head_width] with ‖c R‖ = ‖c W_O^h‖: a small matrix instead of the projection.

    Computed anew when a weight has changed since the last time.
    """
    weights = {
        attention.layer: (attention.heads, weight)
        for attention in layout.attentions
        if attention.projection is not None
        and (weight := weight_by_input(model.get_submodule(attention.projection))) is not None
    }
    # torch counts the writes into a tensor, except one made in inference mode, which can't be trained either
    state = tuple((w.data_ptr(), w.dtype, None if w.is_inference() else w._version) for _, w in weights.values())
    known = _FACTORS.get(model)
    if known is None or known[0] != state:
        factors = {layer: _write_factor(weight.unflatten(0, (heads, -1))) for layer, (heads, weight) in weights.items()}
        known = _FACTORS[model] = (state, factors)
    return known[1]


def _write_factor(weight: Float[Tensor, "head head_width model_width"]) -> Float[Tensor, "head head_width head_width"]:
    """Lower triangular R with R Rᵀ = W Wᵀ, from W itself in float64: its Gram matrix would lose half the digits."""
    factor = torch.linalg.qr(weight.double().transpose(-1, -2), mode="r").R.transpose(-1, -2)
    if factor.shape[-1] < factor.shape[-2]:  # heads wider than the stream
        factor = torch.nn.functional.pad(factor, (0, factor.shape[-2] - factor.shape[-1]))
    return factor.to(torch.float64 if weight.dtype == torch.float64 else torch.float32).contiguous()


def _watched(watch: _Watch, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise CaptureError(
                "a pattern is measured without dropout; the model is in training mode; call model.eval()"
            )

        def plain() -> Tensor:
            return original(
                query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )

        call = AttentionCall(
            query=query,
            key=key,
            value=value,
            visibility=_visibility(watch, attn_mask, causal=is_causal),
            scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
            write=watch.next_write,
            token_ids=watch.batch.token_ids,
        )
        return _observe_heads(watch, call, plain)

    return attend


def _visibility(watch: _Watch, mask: Tensor | None, *, causal: bool) -> Visibility:
    """The visibility of a mask; layers share masks, so it is read once."""
    key = (id(mask), causal)
    known = watch.seen_masks.get(key)
    if known is None:
        batch = watch.batch
        read = see(mask, causal=causal, start=batch.start, length=batch.length, tokens=batch.tokens)
        # the mask is kept with it, so that no other object takes its id
        known = watch.seen_masks[key] = (mask, read)
    return known[1]


def _observe_heads(watch: _Watch, call: AttentionCall, plain: Callable[[], Tensor]) -> Tensor:
    if watch.calls >= len(watch.layout.attentions):
        raise CaptureError(f"expected {len(watch.layout.attentions)} attention calls, the model makes more")
    attention = watch.layout.attentions[watch.calls]
    tokens = watch.batch.tokens
    if call.query.shape[1] != attention.heads or call.query.shape[-2] != tokens or call.key.shape[-2] != tokens:
        raise CaptureError(
            f"layer {attention.layer} was examined with {attention.heads} heads over the batch's own tokens; this call has "
            f"{call.query.shape[1]} heads, {call.query.shape[-2]} queries and {call.key.shape[-2]} keys for {tokens} tokens"
        )
    watch.calls += 1
    output, rows = watch.engine.attend(call, plain)
    observed = HeadObservation(rows, call.visibility, watch.batch.classes)
    watch.observer.heads(attention, watch.engine.summed(observed))
    if watch.stream is not None:
        watch.stream.contexts(attention.layer, output)
    return output
