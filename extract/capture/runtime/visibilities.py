"""The visibility of each attention call: padding, causality, windows and holes, read from its mask or pattern."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from attlas.extract.capture.intercept.request import Request
from attlas.extract.capture.layout import Attention
from attlas.extract.capture.runtime.batch import Batch
from attlas.extract.engines.visibility import Axis, Visibility, axis_of, keys_seen, visibility_from_mask, whole_axis
from attlas.extract.errors import CaptureError

# a score this far below the largest of its row was put there by a mask: some models hide keys by adding −10,000
_HIDDEN = 5000


class Visibilities:
    """The visibilities of one pass. Layers that share a mask share its visibility."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._by_mask: dict[tuple[Any, ...], tuple[Any, Visibility]] = {}
        self._self_attention: dict[tuple[int, int], Axis] = {}  # axes of self-attention, by batch and tokens

    def of_request(self, attention: Attention, request: Request, query: Tensor) -> Visibility:
        """Return the visibility of a request with these queries, [batch, head, query, width]."""
        batch, _, queries, _ = query.shape
        keys = request.key.shape[-2]
        cache_key = (id(request.mask), request.causal, attention.queries, attention.keys, batch, queries, keys)
        cached = self._by_mask.get(cache_key)
        if cached is None:
            key_axis = self._key_axis(attention, request.mask, batch, keys, query.device)
            query_axis = self._query_axis(attention, key_axis, batch, queries)
            visibility = visibility_from_mask(request.mask, causal=request.causal, queries=query_axis, keys=key_axis)
            # the mask is kept with it, so that no other object takes its id
            cached = self._by_mask[cache_key] = (request.mask, visibility)
        return cached[1]

    def of_mask(self, attention: Attention, visible: Bool[Tensor, "batch head query key"]) -> Visibility:
        """Return the visibility that says for every pair whether the query sees the key."""
        batch, _, queries, keys = visible.shape
        # heads mostly see the same keys, and one head is enough then
        visible = visible[:, :1] if bool((visible == visible[:, :1]).all()) else visible
        key_axis = self._key_axis(attention, visible, batch, keys, visible.device)
        query_axis = self._query_axis(attention, key_axis, batch, queries)
        return visibility_from_mask(visible, causal=False, queries=query_axis, keys=key_axis)

    def _input_axis(self, name: str | None) -> Axis | None:
        tokens = self._batch.texts.get(name or "")
        return None if tokens is None else tokens.axis

    def _key_axis(self, attention: Attention, mask: Tensor | None, batch: int, keys: int, device: torch.device) -> Axis:
        """The axis of the inputs, or else of the keys that any query sees."""
        input_axis = self._input_axis(attention.keys)
        if input_axis is not None:
            return input_axis
        axis = axis_of(keys_seen(mask, batch=batch, keys=keys, device=device))
        if axis is None and attention.is_cross_attention:  # positions among such keys mean nothing
            return whole_axis(batch, keys, device)
        if axis is None:
            raise CaptureError(
                f"the real tokens of a sequence must stand together; in layer {attention.layer} of the {attention.stack} "
                "there are keys between them that no query sees"
            )
        return axis

    def _query_axis(self, attention: Attention, keys: Axis, batch: int, queries: int) -> Axis:
        """The axis of the keys; for cross-attention that of the inputs, or of the queries' last self-attention."""
        if not attention.is_cross_attention:
            self._self_attention[batch, queries] = keys
            return keys
        axis = self._input_axis(attention.queries) or self._self_attention.get((batch, queries))
        return axis or whole_axis(batch, queries, keys.start.device)


def visible_scores(scores: Tensor) -> Bool[Tensor, "batch head query key"]:
    """Return which scores no mask has hidden. A row of NaN hides nothing."""
    least = (
        (scores.amax(-1, keepdim=True) - _HIDDEN).nan_to_num(-torch.inf).clamp_min(torch.finfo(scores.dtype).min / 2)
    )
    return ~(scores < least)
