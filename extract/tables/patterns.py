"""What tables read of the patterns of a sample: those of attention calls whose rows are the sequences of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
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
    if len(calls) != 1 or sums.values.shape[1] != len(calls[0].rows.measured):
        return None
    places, heads = calls[0].sampled
    return Sampled(places, heads) if len(places) else None


class ChosenRows(NamedTuple):
    """Some rows of each sequence's pattern, zeros where a row is not measured or there are fewer rows.

    A learned sink is one more key, the last.
    """

    patterns: Float[Tensor, "sequence head row key"]
    measured: Bool[Tensor, "sequence head row"]


def chosen_rows(o: HeadObservation, most: int) -> ChosenRows:
    """At most so many rows of each sequence, evenly spaced: all of a sequence that has no more."""
    import torch

    from attlas.extract.engines.reference import whole_block

    queries, keys = o.visibility.queries, o.visibility.keys
    numbers = torch.arange(min(most, queries.tokens), device=o.rows.measured.device)
    length = queries.length[:, None]
    spaced = (2 * numbers + 1) * length // (2 * most)
    chosen = numbers.where(length <= most, spaced)
    exists = chosen < length
    chosen = (chosen + queries.start[:, None]).where(exists, 0)
    heads = o.rows.measured.shape[1]
    measured = o.rows.measured.gather(-1, chosen[:, None].expand(-1, heads, -1)) & exists[:, None]
    assert o.call is not None, "patterns are needed"
    block = whole_block(o.call.of_rows(chosen), measured)
    patterns = torch.zeros(*measured.shape, keys.tokens, device=measured.device)
    patterns[..., block.keys] = block.pattern.float()
    if block.sinks is not None:
        patterns = torch.cat((patterns, block.sink[..., None].float()), -1)
    return ChosenRows(patterns * measured[..., None], measured)
