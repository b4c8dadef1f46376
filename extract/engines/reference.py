"""The reference engine: plain torch, a block of rows at a time, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from extract.engines.rows import ROW_QUANTITIES, AttentionCall, Rows
from extract.engines.visibility import rows_per_block, skewed_sum

if TYPE_CHECKING:
    from torch import Tensor

# in the order in which a block gives them
_ROW_NAMES = (*ROW_QUANTITIES, "sink")


def attend(call: AttentionCall, plain: Callable[[], Tensor]) -> tuple[Tensor, Rows]:
    """The model's own output, and the primitives beside it."""
    output = plain()
    return output, rows(call, output)


def rows(call: AttentionCall, output: Tensor) -> Rows:
    """The primitives of one attention call with this output, in float32 (float64 for a float64 model)."""
    exact = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    batch, heads, tokens, _ = call.query.shape
    key = call.key.to(exact).repeat_interleave(heads // call.key.shape[1], dim=1).transpose(-1, -2)
    size = rows_per_block(batch * heads * tokens)
    received = key.new_zeros(batch, heads, tokens)
    offsets = key.new_zeros(batch, heads, 2 * tokens - 1)
    looked_up = [key.new_zeros(batch, heads), key.new_zeros(batch, heads)]
    measured, quantities = [], []
    for first in range(0, tokens, size):
        last = min(first + size, tokens)
        p, row_is_measured, row_quantities = _block(call, key, first, last)
        measured.append(row_is_measured)
        quantities.append(row_quantities)
        received += p.sum(-2)
        offsets += skewed_sum(p, first)
        if call.token_ids is not None:
            for total, chosen in zip(
                looked_up, _same_and_induction(call.token_ids, call.visibility.real, first, last), strict=True
            ):
                total += (p * chosen[:, None]).sum((-1, -2))
    named = dict(zip(_ROW_NAMES, torch.cat(quantities, -2).unbind(-1), strict=True))
    if call.sinks is None:
        del named["sink"]
    same, induction = looked_up if call.token_ids is not None else (None, None)
    row_is_measured = torch.cat(measured, -1)
    return Rows(
        measured=row_is_measured,
        **named,
        **norms(call, output, row_is_measured),
        received=received,
        offsets=offsets,
        same_token=same,
        induction=induction,
    )


def norms(call: AttentionCall, output: Tensor, measured: Tensor) -> dict[str, Tensor]:
    """Sizes of the measured contexts and, where the projection is known, of what contexts and values write."""
    exact = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    contexts = output.to(exact)
    of = {"context_norm": contexts.norm(dim=-1).where(measured, 0)}
    if call.write is not None:
        write = call.write.to(exact)
        values = call.value.to(exact).repeat_interleave(contexts.shape[1] // call.value.shape[1], dim=1)
        of["update_norm"] = (contexts @ write).norm(dim=-1).where(measured, 0)
        of["value_norm"] = (values @ write).norm(dim=-1).where(call.visibility.real[:, None], 0)
    return of


def _block(call: AttentionCall, key: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern of the rows first … last−1 (zero where not measured), which are measured, and their quantities."""
    seen = call.visibility.seen(first, last)
    scores = _scores(call, key, first, last)
    measured = seen.any(-1) & (scores.isfinite() | ~seen).all(-1)
    usable = seen & measured[..., None]
    # a row without usable keys gets one score of zero, so that nothing below is undefined, and is cleared at the end
    scores = scores.where(usable, -torch.inf).where(measured[..., None], 0)
    largest = scores.amax(-1)
    shift = largest if call.sinks is None else torch.maximum(largest, call.sinks.to(scores.dtype)[None, :, None])
    below = (scores - shift[..., None]).where(usable, 0)
    weights = below.exp() * usable
    sink_weight = (
        torch.zeros_like(shift) if call.sinks is None else (call.sinks.to(scores.dtype)[None, :, None] - shift).exp()
    )
    total = (weights.sum(-1) + sink_weight).where(measured, 1)
    p, sink = weights / total[..., None], sink_weight / total
    entropy = total.log() - (p * below).sum(-1) - (sink_weight.log().where(sink_weight > 0, 0) * sink)
    count = usable.sum(-1).clamp_min(1)
    mean = (scores.where(usable, 0)).sum(-1) / count
    variance = ((scores - mean[..., None]).where(usable, 0).square()).sum(-1) / count
    d = _distances(call, first, last).to(p.dtype)
    offset = (p * d).sum(-1)
    # centred before squaring: Σ p d² − (Σ p d)² loses all digits far from the query; the sink's mass is not in Σ p
    spread = (p * (d - offset[..., None]).square()).sum(-1) + offset.square() * sink
    quantities = (
        entropy.clamp_min(0),
        p.square().sum(-1),
        p.amax(-1),
        (p * d.abs()).sum(-1),
        offset,
        spread.sqrt(),
        largest,
        mean,
        variance,
        sink,
    )
    return p, measured, torch.stack(quantities, -1) * measured[..., None]


def _scores(call: AttentionCall, key: Tensor, first: int, last: int) -> Tensor:
    scores = call.query[:, :, first:last].to(key.dtype) @ key * call.scale
    if call.softcap is not None:
        scores = (scores / call.softcap).tanh() * call.softcap
    if call.visibility.bias is not None:
        scores = scores + call.visibility.bias[..., first:last, :].to(scores.dtype)
    return scores


def _distances(call: AttentionCall, first: int, last: int) -> Tensor:
    place = torch.arange(call.key.shape[-2], device=call.key.device)
    return place[None, :] - place[first:last, None]


def _same_and_induction(ids: Tensor, real: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Where j ≠ i has the query's token, and where j ≤ i follows another copy of it."""
    place = torch.arange(ids.shape[1], device=ids.device)
    same = (
        (ids[:, first:last, None] == ids[:, None, :]) & (place[None, :] != place[first:last, None]) & real[:, None, :]
    )
    after_copy = same.roll(1, dims=-1)
    after_copy[..., 0] = False
    return same, after_copy & (place[None, :] <= place[first:last, None])
