"""Some rows of each sequence's pattern, and the entropies of mixtures of heads: what comparing heads needs, in plain torch."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas.extract.engines.block import entropy
from attlas.extract.engines.reference import whole_block
from attlas.extract.engines.rows import AttentionCall, ChosenRows, ScoredCall
from attlas.extract.engines.visibility import Axis


def chosen_rows(
    call: AttentionCall | ScoredCall, measured: Bool[Tensor, "sequence head query"], most: int
) -> ChosenRows:
    """At most so many rows of each sequence of a call, evenly spaced: all of a sequence that has no more.

    measured: which rows of the call are.
    """
    places, exists = spaced_places(call.visibility.queries, most)
    heads = measured.shape[1]
    measured = measured.gather(-1, places[:, None].expand(-1, heads, -1)) & exists[:, None]
    block = whole_block(call.of_rows(places), measured)
    patterns = torch.zeros(*measured.shape, call.visibility.keys.tokens, device=measured.device)
    patterns[..., block.keys] = block.pattern.float()
    if block.sinks is not None:
        patterns = torch.cat((patterns, block.sink[..., None].float()), -1)
    patterns = patterns * measured[..., None]
    return ChosenRows(patterns, measured, mixed_entropies(patterns))


def spaced_places(queries: Axis, most: int) -> tuple[Int[Tensor, "sequence row"], Bool[Tensor, "sequence row"]]:
    """Places of evenly spaced tokens of each sequence, and which of them exist; 0 for the others."""
    numbers = torch.arange(min(most, queries.tokens), device=queries.length.device)
    length = queries.length[:, None]
    chosen = numbers.where(length <= most, (2 * numbers + 1) * length // (2 * most))
    exists = chosen < length
    return (chosen + queries.start[:, None]).where(exists, 0), exists


def mixed_entropies(patterns: Float[Tensor, "sequence head row key"]) -> Float[Tensor, "sequence row head head"]:
    """`mixed` of ChosenRows, one head with those after it at a time."""
    sequences, heads, rows, _ = patterns.shape
    mixed = patterns.new_zeros(sequences, rows, heads, heads)
    for head in range(heads):
        pairs = entropy((patterns[:, head, None] + patterns[:, head:]) / 2)
        mixed[:, :, head, head:] = pairs.transpose(1, 2)
    return mixed
