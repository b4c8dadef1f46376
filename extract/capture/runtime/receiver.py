"""The receiver of an instrumented pass: each attention call is matched to its layer, measured and summed up at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from attlas.extract.capture.intercept.recorded_call import RecordedCall
from attlas.extract.capture.intercept.replay import replay_attention
from attlas.extract.capture.intercept.request import Request, interception_disabled
from attlas.extract.capture.intercept.softmax import ManualAttention, Product, manual_attention_of
from attlas.extract.capture.layout import Attention, CaptureMethod, Layout
from attlas.extract.capture.runtime.batch import Batch
from attlas.extract.capture.runtime.layer_sequence import LayerSequence
from attlas.extract.capture.runtime.observer import Observer
from attlas.extract.capture.runtime.original_output import OriginalOutput
from attlas.extract.capture.runtime.pieces import MeasuredCall, PieceJoiner, merge_windows
from attlas.extract.capture.runtime.stream import Stream
from attlas.extract.capture.runtime.visibilities import Visibilities, visible_scores
from attlas.extract.engines import Engine
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.patches import Grid
from attlas.extract.engines.rows import AttentionCall, Classes, Reading, Rows, ScoredCall


class UnmeasuredRows(Exception):
    """Rows of a pass were not measured, so that the engine's own output stood where the model's own should have."""


class CallReceiver:
    """Measures the attention calls of one pass with an engine, and hands the results to the observer and the stream.

    `factors` are the write factors of layers, by their number. With `waits`, the device is waited for after each call, so
    that the output is the model's own where rows are not measured; without, `finish` says whether there were such rows.
    """

    def __init__(
        self,
        layout: Layout,
        batch: Batch,
        engine: Engine,
        observer: Observer,
        factors: Mapping[int, Tensor],
        stream: Stream | None,
        *,
        waits: bool = True,
    ) -> None:
        self.layers = LayerSequence(layout, batch)
        self.pieces = PieceJoiner()
        self._batch = batch
        self._engine = engine
        self._observer = observer
        self._factors = factors
        self._stream = stream
        self._visibilities = Visibilities(batch)
        self._call_numbers = count()  # of all calls, those over something else than positions included
        self._ignored = layout.ignored_calls
        self._waits = waits
        self._unmeasured: Tensor | None = None  # set to 1 by a call with such rows

    def finish(self) -> None:
        """Raise CaptureError unless every layer had its call, and UnmeasuredRows if an output was not the model's own."""
        self.layers.assert_all_matched()
        if self._unmeasured is not None and bool(self._unmeasured):
            raise UnmeasuredRows

    def attend(self, request: Request) -> Tensor:
        with interception_disabled():
            is_ignored = next(self._call_numbers) in self._ignored
            return request.call_original() if is_ignored else self._attend(request)

    def _attend(self, request: Request) -> Tensor:
        attention = self._next_layer(request.method)
        query = _unpack_heads(request.query, attention)
        self.layers.assert_shape(attention, query.shape[1], query.shape[-2], request.key.shape[-2])
        call = AttentionCall(
            query=query,
            key=request.key,
            value=request.value,
            visibility=self._visibilities.of_request(attention, request, query),
            scale=request.scale,
            softcap=request.softcap,
            sinks=request.sinks,
            write=self._write_factor(),
            token_ids=self.layers.tokens(attention.queries).ids,
            classes=self._classes(attention),
            grid=self._grid(attention, *query.shape[::2]),
            sample=self._sample(attention, len(query)),
            reading=self._reading(attention),
            unmeasured=self._mark_of_unmeasured(query.device),
        )
        original = OriginalOutput(request, query)
        output, rows = self._engine.attend(call, original.whole, self._observer.needs.row_quantities)
        self._measure(attention, call, rows, output)
        if not original.is_computed:
            output = original.fill_padding(output, call.visibility.queries)
        return output.reshape(*request.query.shape[:-1], output.shape[-1])

    def receive_product(self, product: Product) -> None:
        expected = self.layers.expected
        heads, dim_order = (None, "") if expected is None else (expected.heads, expected.dim_order)
        manual = manual_attention_of(product, batch=self._batch.sequences, heads=heads, dim_order=dim_order)
        # what is not attention was not counted in discovery either
        if manual is not None and next(self._call_numbers) not in self._ignored:
            self._measure_manual(manual)

    def _measure_manual(self, manual: ManualAttention) -> None:
        attention = self._next_layer("softmax")
        self.layers.assert_shape(attention, *manual.scores.shape[1:])
        call = ScoredCall(
            scores=manual.scores,
            value=manual.value,
            visibility=self._visibilities.of_mask(attention, visible_scores(manual.scores)),
            sinks=manual.sinks,
            write=self._write_factor(),
            token_ids=self.layers.tokens(attention.queries).ids,
            classes=self._classes(attention),
            grid=self._grid(attention, *manual.scores.shape[::2]),
            sample=self._sample(attention, len(manual.scores)),
            reading=self._reading(attention),
        )
        rows = self._engine.rows_of_scores(call, manual.contexts, self._observer.needs.row_quantities)
        self._measure(attention, call, rows, manual.contexts)

    def receive_recorded_call(self, call: RecordedCall) -> None:
        attention = self._next_layer("replay")
        assert attention.replay is not None
        axis = self.layers.tokens(attention.queries).axis
        pattern, contexts, value = replay_attention(
            call, attention.replay, heads=attention.heads, axis=axis, name=attention.module
        )
        self.layers.assert_shape(attention, *pattern.shape[1:])
        scored = ScoredCall(
            scores=pattern,
            value=value,
            visibility=self._visibilities.of_mask(attention, pattern > 0),
            write=self._write_factor(),
            token_ids=self.layers.tokens(attention.queries).ids,
            classes=self._classes(attention),
            grid=self._grid(attention, *pattern.shape[::2]),
            sample=self._sample(attention, len(pattern)),
            reading=self._reading(attention),
            weights_only=True,
        )
        of_tokens = contexts[:, :, : pattern.shape[-2]]
        rows = self._engine.rows_of_scores(scored, of_tokens, self._observer.needs.row_quantities)
        self._measure(attention, scored, rows, contexts)

    def _mark_of_unmeasured(self, device: torch.device) -> Tensor | None:
        if self._waits or device.type == "cpu":
            return None
        if self._unmeasured is None or self._unmeasured.device != device:
            if self._unmeasured is not None and bool(self._unmeasured):
                raise UnmeasuredRows
            self._unmeasured = torch.zeros(1, dtype=torch.int32, device=device)
        return self._unmeasured

    def _next_layer(self, method: CaptureMethod) -> Attention:
        """The layer of a call: that of the pieces before it, or else the next."""
        return self.pieces.attention or self.layers.next(method)

    def _write_factor(self) -> Tensor | None:
        """The write factor of the layer matched last."""
        return self._factors.get(self.layers.matched - 1)

    def _grid(self, attention: Attention, batch: int, queries: int) -> Grid | None:
        """The patch grid of a call over whole images; None over windows, or where patches were merged or dropped."""
        grid = self._batch.grids.get(attention.stack)
        is_whole = grid is not None and batch == self._batch.sequences and queries == grid.tokens
        return grid if is_whole and not attention.is_cross_attention else None

    def _classes(self, attention: Attention) -> Classes | None:
        queries, keys = (self.layers.tokens(name).classes for name in (attention.queries, attention.keys))
        return None if queries is None or keys is None else Classes(queries, keys)

    def _reading(self, attention: Attention) -> Reading | None:
        """The rows of a call over tokens that read an answer; a decoder's row reads the token that it predicts, the next."""
        queries, keys = (self.layers.tokens(name).needle for name in (attention.queries, attention.keys))
        if queries is None or keys is None:
            return None
        ahead = 1 if attention.stack in ("decoder", "cross") else 0
        span = slice(queries.span.start - ahead, queries.span.stop - ahead)
        return Reading(queries.answer.roll(-ahead, 1), keys.keys, span, ahead)

    def _sample(self, attention: Attention, batch: int) -> Tensor | None:
        """Which rows of a call's batch are of sequences of the sample: a sequence may have several windows."""
        sample = self._batch.sample
        if sample is None or batch % len(sample):
            return None
        windows = batch // len(sample)
        if windows == 1:  # nearly every call: nothing to repeat
            return sample
        return sample.repeat(windows) if attention.batch_last else sample.repeat_interleave(windows)

    def _measure(self, attention: Attention, call: AttentionCall | ScoredCall, rows: Rows, contexts: Tensor) -> None:
        """Sum the rows of each head. Nothing of the size of a pattern is kept, unless patterns are needed."""
        needs, visibility = self._observer.needs, call.visibility
        classes = self.layers.tokens(attention.keys).classes
        observation = HeadObservation(rows, visibility, classes)
        if needs.patterns:
            # over windows, others are looked up
            places = self._batch.sampled if call.sample is not None and call.sample is self._batch.sample else None
            observation = replace(observation, call=call, places=places)
        sums = self._engine.head_sums(observation, needs.head_names, profiles=needs.profiles)
        axis = visibility.queries
        measured = MeasuredCall(attention, sums, [observation], axis, contexts)
        if self.pieces.is_open:
            self.pieces.add(measured)
            return
        states = contexts.shape[-2]
        self.deliver(measured if states == axis.tokens else replace(measured, axis=replace(axis, tokens=states)))

    def deliver(self, call: MeasuredCall) -> None:
        """Hand a measured call to the observer and the stream."""
        sums = merge_windows(call.sums, self._observer.needs.head_names, self._batch.sequences, call.attention)
        self._observer.heads(call.attention, sums, call.observations)
        if self._stream is not None:
            self._stream.add_contexts(call.attention, call.axis, call.contexts, call.observations)


def _unpack_heads(query: Tensor, attention: Attention) -> Tensor:
    """Queries as [batch, head, query, width]. The heads of a single token may come as queries of the key heads."""
    batch, key_heads, rows, width = query.shape
    is_packed = key_heads != attention.heads and key_heads * rows == attention.heads
    return query.reshape(batch, attention.heads, 1, width) if is_packed else query
