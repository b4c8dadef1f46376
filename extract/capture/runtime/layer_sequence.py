"""Match attention calls to the layers of a layout."""

from __future__ import annotations

from attlas.extract.capture.layout import Attention, CaptureMethod, Layout
from attlas.extract.capture.runtime.batch import Batch, Tokens
from attlas.extract.errors import CaptureError

_UNKNOWN = Tokens(None)


class LayerSequence:
    """The attention layers of one pass, in order of execution. Calls have no names, so the order is what matches them."""

    def __init__(self, layout: Layout, batch: Batch) -> None:
        self.matched = 0
        self._layers = layout.attentions
        self._batch = batch

    @property
    def expected(self) -> Attention | None:
        """The layer of the next call, None after the last."""
        return self._layers[self.matched] if self.matched < len(self._layers) else None

    def next(self, method: CaptureMethod) -> Attention:
        """Return the layer of a call. Raises CaptureError if there is none, or if it was captured by another method."""
        attention = self.expected
        if attention is None:
            raise CaptureError(f"expected {len(self._layers)} attention calls, the model makes more")
        if attention.method != method:
            raise CaptureError(
                f"layer {attention.layer} of the {attention.stack} was examined as it attends by {attention.method}; now it "
                f"does so by {method}"
            )
        self.matched += 1
        return attention

    def tokens(self, name: str | None) -> Tokens:
        """Return the tokens of a model input."""
        return self._batch.texts.get(name or "", _UNKNOWN)

    def assert_shape(self, attention: Attention, heads: int, queries: int, keys: int) -> None:
        """Raise CaptureError unless a call has the layer's heads and the batch's tokens."""
        axes = [self.tokens(name).axis for name in (attention.queries, attention.keys)]
        expected = [count if axis is None else axis.tokens for axis, count in zip(axes, (queries, keys), strict=True)]
        if heads != attention.heads or [queries, keys] != expected:
            raise CaptureError(
                f"layer {attention.layer} of the {attention.stack} was examined with {attention.heads} heads over the "
                f"batch's own tokens; this call has {heads} heads, {queries} queries and {keys} keys for {expected[0]} and "
                f"{expected[1]} tokens"
            )

    def assert_all_matched(self) -> None:
        """Raise CaptureError unless every layer has had its call."""
        if self.matched != len(self._layers):
            raise CaptureError(
                f"every forward pass must show each attention layer once; expected {len(self._layers)} patterns, "
                f"got {self.matched}; the model changed its way since it was examined"
            )
