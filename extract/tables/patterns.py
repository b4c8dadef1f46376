"""What tables read of the patterns of a sample: those of attention calls whose rows are the sequences of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from attlas.extract.engines.observations import HeadObservation
    from attlas.extract.engines.sums import HeadSums

OF_SAMPLE = "Of the sample's sequences (`--sample`)."


class Sampled(NamedTuple):
    """The places in the batch of the sample's sequences, and what was observed of these."""

    places: Int[Tensor, " sequence"]
    heads: HeadObservation


def sample_of(sums: HeadSums, calls: Sequence[HeadObservation]) -> Sampled | None:
    """The sample of an attention layer; None if the batch has none of it, or if the layer attends over windows of sequences."""
    call = call_over_sequences(sums, calls)
    if call is None:
        return None
    places, heads = call.sampled
    return Sampled(places, heads) if len(places) else None


def call_over_sequences(sums: HeadSums, calls: Sequence[HeadObservation]) -> HeadObservation | None:
    """The call of an attention layer; None if it attends over windows of sequences, or in several pieces."""
    if len(calls) != 1 or sums.values.shape[1] != len(calls[0].visibility.keys.start):
        return None
    return calls[0]
