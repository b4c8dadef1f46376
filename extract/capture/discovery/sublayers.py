"""The attention sublayers of each stack: calls that write into its residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from attlas.extract.capture.discovery.states import moment
from attlas.extract.capture.discovery.trace import Call, Trace
from attlas.extract.capture.layout import Attention


class Sublayer(NamedTuple):
    """An attention call that writes into the stream of a stack, and its layer in that stack."""

    call: Call
    attention: Attention
    layer: int

    @property
    def moment(self) -> int:
        return moment(self.call.time)

    @property
    def site(self) -> str:
        return "cross_attention" if self.attention.is_cross_attention else "attention"


def sublayers_by_stack(trace: Trace, attentions: Sequence[Attention]) -> dict[str, list[Sublayer]]:
    """Return the attention sublayers of each stack.

    Cross-attention belongs to the layer of the last self-attention before it, or of the next one if that does not have the
    same queries. If neither has, as in attention pooling, it is a stack of its own.
    """
    self_attention = [None if a.is_cross_attention else number for number, a in enumerate(attentions)]
    before = [*accumulate(self_attention, _latest)]
    after = [*accumulate(self_attention[::-1], _latest)][::-1]
    sublayers: dict[str, list[Sublayer]] = {}
    for number, (call, attention) in enumerate(zip(trace.calls, attentions, strict=True)):
        hosts = (
            attentions[n]
            for n in (before[number], after[number])
            if n is not None and _has_same_queries(call, trace.calls[n])
        )
        host = next(hosts, attention)
        sublayers.setdefault(host.stack, []).append(Sublayer(call, attention, host.layer))
    return sublayers


def _latest(earlier: int | None, later: int | None) -> int | None:
    return earlier if later is None else later


def _has_same_queries(a: Call, b: Call) -> bool:
    return (a.batch, a.queries) == (b.batch, b.queries)


def stream_width(trace: Trace, sublayer: Sublayer) -> int | None:
    """Return the output width of a sublayer's projection, or of the innermost module around the call that wrote anything."""
    if sublayer.attention.shape is not None:
        return sublayer.attention.shape[1]
    for module in reversed(sublayer.call.modules):
        events = (e for e in trace.events if e.module == module and e.time > sublayer.call.time)
        output = next((event.output for event in events), None)
        if output is not None:
            return output.shape[-1]
    return None
