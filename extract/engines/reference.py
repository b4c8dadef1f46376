"""The reference engine: plain torch, a block of rows at a time, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from extract.engines.patches import PatchSums
from extract.engines.rows import ROW_QUANTITIES, AttentionCall, Rows, ScoredCall
from extract.engines.visibility import Visibility, diagonal_sums, rows_per_block

# in the order in which a block gives them
_ROW_NAMES = (*ROW_QUANTITIES, "sink")


def attend(call: AttentionCall, plain: Callable[[], Tensor]) -> tuple[Tensor, Rows]:
    """The model's own output, and the primitives beside it."""
    output = plain()
    return output, rows(call, output)


def rows(call: AttentionCall, output: Tensor) -> Rows:
    """The primitives of one attention call with this output, in float32 (float64 for a float64 model)."""
    sinks = None if call.sinks is None else call.sinks[None, :, None]
    return _rows(call, _scores_of(call), sinks, output)


def rows_of_scores(call: ScoredCall, output: Tensor) -> Rows:
    """The same where the model has made the scores."""
    return _rows(call, _scores_of(call), call.sinks, output)


def rows_of_weights(call: ScoredCall, output: Tensor) -> Rows:
    """The same where no more than the weights is known, given in place of scores: their logarithms serve as those."""
    weights_of = _scores_of(call)
    return _rows(call, lambda rows, keys: weights_of(rows, keys).log(), call.sinks, output)


def output_of(call: AttentionCall) -> Float[Tensor, "batch head query value_width"]:
    """What the call gives, by its definition; for models whose own function knows nothing of the seam."""
    exact = _exact(call.query)
    heads, queries = call.query.shape[1:3]
    of_heads = (t.to(exact).repeat_interleave(heads // t.shape[1], dim=1) for t in (call.key, call.value))
    key, value = next(of_heads).transpose(-1, -2), next(of_heads)
    size = rows_per_block(len(call.query) * heads * key.shape[-1])
    blocks = [
        _pattern(_scores(call, key, slice(n, n + size)), call.visibility.seen(n, n + size), call.sinks) @ value
        for n in range(0, queries, size)
    ]
    return torch.cat(blocks, -2).to(call.query.dtype)


def _pattern(scores: Tensor, seen: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over what is seen; a row that sees nothing looks at all alike, as where a mask is added to the scores."""
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return scores.softmax(-1).where(seen.any(-1, keepdim=True), 1 / scores.shape[-1])


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(
    call: AttentionCall | ScoredCall,
    scores_of: Callable[[slice, slice], Float[Tensor, "batch head row key"]],
    sinks: Float[Tensor, "#batch head #query"] | None,
    output: Float[Tensor, "batch head query value_width"],
) -> Rows:
    batch, heads = output.shape[:2]
    queries, keys = call.visibility.queries.tokens, call.visibility.keys.tokens
    size = rows_per_block(batch * heads * keys)
    received = output.new_zeros(batch, heads, keys, dtype=_exact(output))
    offsets = received.new_zeros(batch, heads, queries + keys - 1)
    looked_up = [received.new_zeros(batch, heads), received.new_zeros(batch, heads)]
    patches = None if call.grid is None else PatchSums.zero(received)
    measured, quantities = [], []
    for first in range(0, queries, size):
        last = min(first + size, queries)
        # of a window no more than what it reaches; distances over an image are counted on whole rows
        near = call.visibility.reach(first, last) if patches is None else slice(0, keys)
        scores = scores_of(slice(first, last), near)
        of_rows = None if sinks is None else sinks.to(scores.dtype).expand(-1, -1, queries)[..., first:last]
        p, row_is_measured, row_quantities = _block(call.visibility, scores, of_rows, first, last, near)
        measured.append(row_is_measured)
        quantities.append(row_quantities)
        received[..., near] += p.sum(-2)
        if call.visibility.crosses:
            continue
        sums = diagonal_sums(p)
        nearest = near.start - last + queries  # the distance from the last row to its first key, among all
        offsets[..., nearest : nearest + sums.shape[-1]] += sums
        if patches is not None and call.grid is not None:
            patches.add(scores, call.visibility.seen(first, last), row_is_measured, call.grid, first)
        if call.token_ids is not None:
            chosen = _same_and_induction(call.token_ids, call.visibility.keys.real, first, last)
            for total, where in zip(looked_up, chosen, strict=True):
                total += (p * where[:, None, :, near]).sum((-1, -2))
    named = dict(zip(_ROW_NAMES, torch.cat(quantities, -2).unbind(-1), strict=True))
    if sinks is None:
        del named["sink"]
    known = call.token_ids is not None and not call.visibility.crosses
    row_is_measured = torch.cat(measured, -1)
    return Rows(
        measured=row_is_measured,
        **named,
        **norms(call, output, row_is_measured),
        received=received,
        offsets=offsets,
        same_token=looked_up[0] if known else None,
        induction=looked_up[1] if known else None,
        patches=patches,
    )


def patch_sums(call: AttentionCall | ScoredCall, measured: Bool[Tensor, "batch head query"]) -> PatchSums | None:
    """How far the measured rows look, in patches, for engines that hold no scores: they are made once more, in blocks."""
    if call.grid is None:
        return None
    scores_of = _scores_of(call)
    sums = PatchSums.zero(measured)
    size = rows_per_block(len(measured) * measured.shape[1] * call.visibility.keys.tokens)
    for first in range(0, call.grid.tokens, size):
        last = min(first + size, call.grid.tokens)
        scores, seen = scores_of(slice(first, last), slice(None)), call.visibility.seen(first, last)
        sums.add(scores, seen, measured[..., first:last], call.grid, first)
    return sums


def _scores_of(call: AttentionCall | ScoredCall) -> Callable[[slice, slice], Float[Tensor, "batch head row key"]]:
    """Scores of some rows and keys, in float32 (float64 for a float64 model)."""
    if isinstance(call, ScoredCall):
        exact = _exact(call.scores)
        return lambda rows, keys: call.scores[:, :, rows, keys].to(exact)
    heads = call.query.shape[1]
    key = call.key.to(_exact(call.query)).repeat_interleave(heads // call.key.shape[1], dim=1).transpose(-1, -2)
    return lambda rows, keys: _scores(call, key, rows, keys)


def norms(call: AttentionCall | ScoredCall, output: Tensor, measured: Tensor) -> dict[str, Tensor]:
    """Sizes of the measured contexts and, where the projection is known, of what contexts and values write."""
    exact = _exact(output)
    contexts = output.to(exact)
    of = {"context_norm": contexts.norm(dim=-1).where(measured, 0)}
    if call.write is not None:
        write = call.write.to(exact)
        of["update_norm"] = (contexts @ write).norm(dim=-1).where(measured, 0)
        if call.value is None:
            return of
        values = call.value.to(exact).repeat_interleave(contexts.shape[1] // call.value.shape[1], dim=1)
        of["value_norm"] = (values @ write).norm(dim=-1).where(call.visibility.keys.real[:, None], 0)
    return of


def _block(
    visibility: Visibility, scores: Tensor, sinks: Tensor | None, first: int, last: int, near: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows first … last−1: their pattern over these keys (zero where not measured), which are measured, quantities."""
    seen = visibility.seen(first, last)[..., near]
    measured = seen.any(-1) & (scores.isfinite() | ~seen).all(-1)
    usable = seen & measured[..., None]
    # a row without usable keys gets one score of zero, so that nothing below is undefined, and is cleared at the end
    scores = scores.where(usable, -torch.inf).where(measured[..., None], 0)
    largest = scores.amax(-1)
    shift = largest if sinks is None else torch.maximum(largest, sinks)
    below = (scores - shift[..., None]).where(usable, 0)
    weights = below.exp() * usable
    sink_weight = torch.zeros_like(shift) if sinks is None else (sinks - shift).exp()
    total = (weights.sum(-1) + sink_weight).where(measured, 1)
    p, sink = weights / total[..., None], sink_weight / total
    entropy = total.log() - (p * below).sum(-1) - (sink_weight.log().where(sink_weight > 0, 0) * sink)
    count = usable.sum(-1).clamp_min(1)
    mean = (scores.where(usable, 0)).sum(-1) / count
    variance = ((scores - mean[..., None]).where(usable, 0).square()).sum(-1) / count
    d = (visibility.keys.place[None, near] - visibility.queries.place[first:last, None]).to(p.dtype)
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


def _scores(call: AttentionCall, key: Tensor, rows: slice, keys: slice = slice(None)) -> Tensor:
    scores = call.query[:, :, rows].to(key.dtype) @ key[..., keys] * call.scale
    if call.softcap is not None:
        scores = (scores / call.softcap).tanh() * call.softcap
    if call.visibility.bias is not None:
        scores = scores + call.visibility.bias[..., rows, keys].to(scores.dtype)
    return scores


def _same_and_induction(ids: Tensor, real: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Where j ≠ i has the query's token, and where j ≤ i follows another copy of it."""
    place = torch.arange(ids.shape[1], device=ids.device)
    same = (
        (ids[:, first:last, None] == ids[:, None, :]) & (place[None, :] != place[first:last, None]) & real[:, None, :]
    )
    after_copy = same.roll(1, dims=-1)
    after_copy[..., 0] = False
    return same, after_copy & (place[None, :] <= place[first:last, None])
