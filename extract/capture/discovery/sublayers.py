"""Which attention calls write into the stream of which stack, and how wide it is there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from attlas.extract.capture.discovery.states import moment
from attlas.extract.capture.discovery.trace import Call, Trace
from attlas.extract.capture.layout import Attention


class Member(NamedTuple):
    """An attention call that writes into a stack's stream, and its layer there."""

    call: Call
    attention: Attention
    layer: int

    @property
    def moment(self) -> int:
        return moment(self.call.time)

    @property
    def site(self) -> str:
        return "cross_attention" if self.attention.is_cross_attention else "attention"


def members_of(trace: Trace, attentions: Sequence[Attention]) -> dict[str, list[Member]]:
    """The calls of each stack. Cross-attention is a part of the layer whose own attention came last, or else comes next;
    where its queries are no tokens of that stack, as in a pooling of it, it is a stack of its own."""
    own = [None if a.is_cross_attention else number for number, a in enumerate(attentions)]
    before, after = [*accumulate(own, _later)], [*accumulate(own[::-1], _later)][::-1]
    members: dict[str, list[Member]] = {}
    for number, (call, attention) in enumerate(zip(trace.calls, attentions, strict=True)):
        hosts = (
            attentions[n] for n in (before[number], after[number]) if n is not None and _alike(call, trace.calls[n])
        )
        host = next(hosts, attention)
        members.setdefault(host.stack, []).append(Member(call, attention, host.layer))
    return members


def _later(one: int | None, other: int | None) -> int | None:
    return one if other is None else other


def _alike(one: Call, other: Call) -> bool:
    return (one.batch, one.queries) == (other.batch, other.queries)


def width_of(trace: Trace, member: Member) -> int | None:
    """The width of the stream that a call writes into: its projection's, or that of what the module around it wrote."""
    if member.attention.shape is not None:
        return member.attention.shape[1]
    for module in reversed(member.call.inside):
        wrote = next((e.wrote for e in trace.events if e.module == module and e.time > member.call.time), None)
        if wrote is not None:
            return wrote.shape[-1]
    return None
