"""The reference engine: plain torch, a block of rows at a time, on any device.

It computes every row quantity, each with its own function: of a block of the pattern (`OF_BLOCKS`), or of the call and its
output (`OF_CALLS`). Only the requested ones are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from attlas.extract.engines.block import Block, exact_dtype, value_norms
from attlas.extract.engines.profiles import LARGEST_DOUBLING_BIN, OFFSET_BINS, doubling_bins
from attlas.extract.engines.quantities import ROW_QUANTITIES
from attlas.extract.engines.rows import AttentionCall, Rows, ScoredCall
from attlas.extract.engines.sampled import SAMPLED, effective_rank
from attlas.extract.engines.visibility import diagonal_sums, rows_per_block

Call = AttentionCall | ScoredCall


def attend(
    call: AttentionCall, call_original: Callable[[], Tensor], wanted: Collection[str]
) -> tuple[Float[Tensor, "batch head query value_width"], Rows]:
    """The model's own output, and the wanted row quantities."""
    output = call_original()
    return output, rows_of(call, output, wanted)


def rows_of(
    call: Call,
    output: Float[Tensor, "batch head query value_width"],
    wanted: Collection[str],
    *,
    measured: Bool[Tensor, "batch head query"] | None = None,
) -> Rows:
    """The wanted row quantities of an attention call with this output, in float32 (float64 for a float64 model).

    `measured` marks the measured rows, if they are already known.
    """
    of_blocks = [name for name in wanted if name in OF_BLOCKS]
    quantities: dict[str, Tensor] = {}
    if of_blocks or measured is None:
        measured, quantities = _sum_blocks(call, output, of_blocks, measured)
    quantities |= {name: OF_CALLS[name](call, output, measured) for name in wanted if name in OF_CALLS}
    return Rows(measured, quantities)


def blocks_of(call: Call, heads: int, measured: Bool[Tensor, "batch head query"] | None = None) -> Iterator[Block]:
    """The pattern of a call with so many heads, in blocks of rows. `measured` marks the measured rows, if they are known."""
    queries, keys = call.visibility.queries.tokens, call.visibility.keys.tokens
    size = rows_per_block(len(call.visibility.keys.start) * heads * keys)
    scores_of = _scores_of(call)
    for first in range(0, queries, size):
        last = min(first + size, queries)
        yield Block(call, scores_of, first, last, None if measured is None else measured[..., first:last])


def whole_block(call: Call, measured: Bool[Tensor, "batch head query"]) -> Block:
    """The pattern of all rows of a call at once, of which there are few."""
    return Block(call, _scores_of(call), 0, measured.shape[-1], measured)


def _sum_blocks(
    call: Call, output: Tensor, names: Collection[str], known_measured: Bool[Tensor, "batch head query"] | None
) -> tuple[Bool[Tensor, "batch head query"], dict[str, Tensor]]:
    """Which rows are measured, and quantities accumulated over blocks of the pattern."""
    measured: list[Tensor] = []
    quantities: dict[str, Tensor] = {}
    of_queries: dict[str, list[Tensor]] = {name: [] for name in names if ROW_QUANTITIES[name].axis == "query"}
    for block in blocks_of(call, output.shape[1], known_measured):
        measured.append(block.measured)
        for name in names:
            value = OF_BLOCKS[name](block)
            if name in of_queries:
                of_queries[name].append(value * block.measured)
            else:
                quantities[name] = _accumulate(quantities.get(name), value, block, ROW_QUANTITIES[name].axis)
    return torch.cat(measured, -1), quantities | {name: torch.cat(values, -1) for name, values in of_queries.items()}


def _accumulate(total: Tensor | None, value: Tensor, block: Block, axis: str) -> Tensor:
    """Add a block's values per key, bin or head to the total."""
    if axis != "key":
        return value if total is None else total + value
    if total is None:
        total = value.new_zeros(*value.shape[:2], block.call.visibility.keys.tokens)
    total[..., block.keys] += value
    return total


def _entropy(block: Block) -> Tensor:
    surprise = (block.pattern * block.below).sum(-1)
    of_sink = block.sink_weight.log().where(block.sink_weight > 0, 0) * block.sink
    return (block.total.log() - surprise - of_sink).clamp_min(0)


def _offset_std(block: Block) -> Tensor:
    """Centred before squaring, because Σ p d² − (Σ p d)² loses all digits far from the query; Σ p excludes the sink's mass."""
    squares = (block.pattern * (block.distances - block.offset[..., None]).square()).sum(-1)
    return (squares + block.offset.square() * block.sink).sqrt()


def _score_variance(block: Block) -> Tensor:
    centred = (block.usable_scores - block.score_mean[..., None]).where(block.usable, 0)
    return centred.square().sum(-1) / block.keys_counted


def _offset_bins(block: Block) -> Float[Tensor, "batch head bin"]:
    """Added up with a matrix product, whose order of summation is the same in every run."""
    sums = diagonal_sums(block.pattern)
    # the first diagonal is that from the block's last row to its first key
    first = block.keys.start - (block.last - 1)
    bins = doubling_bins(torch.arange(first, first + sums.shape[-1], device=sums.device)) + LARGEST_DOUBLING_BIN
    return sums @ torch.nn.functional.one_hot(bins, OFFSET_BINS).to(sums.dtype)


def _class_flow(block: Block) -> Float[Tensor, "batch head bin"]:
    classes = block.call.classes
    assert classes is not None, "asked for where classes are known"
    of_queries, of_keys = (
        classes.of_each(numbers).to(block.pattern.dtype)
        for numbers in (classes.queries[:, block.rows], classes.keys[:, block.keys])
    )
    return (of_queries.transpose(-1, -2)[:, None] @ (block.pattern @ of_keys[:, None])).flatten(-2)


def _mass_where(block: Block, chosen: Bool[Tensor, "batch row key"]) -> Float[Tensor, "batch head"]:
    return (block.pattern * chosen[:, None, :, block.keys]).sum((-1, -2))


def _patch_mass(block: Block) -> Float[Tensor, "batch head"]:
    """Σ p over the patches that the block's patches see."""
    grid = block.call.grid
    assert grid is not None, "asked for where there is a grid"
    begin, end = max(grid.prefix, block.first), min(grid.end, block.last)
    rows, keys = slice(begin - block.first, max(begin, end) - block.first), slice(grid.prefix, grid.end)
    return block.pattern[..., rows, keys].sum((-1, -2), dtype=torch.float64)


OF_BLOCKS: dict[str, Callable[[Block], Tensor]] = {
    "entropy": _entropy,
    "collision": lambda block: block.pattern.square().sum(-1),
    "max_weight": lambda block: block.pattern.amax(-1),
    "distance": lambda block: (block.pattern * block.distances.abs()).sum(-1),
    "offset": lambda block: block.offset,
    "offset_std": _offset_std,
    "score_max": lambda block: block.largest,
    "score_mean": lambda block: block.score_mean,
    "score_variance": _score_variance,
    "sink": lambda block: block.sink,
    "received": lambda block: block.pattern.sum(-2),
    "offset_bins": _offset_bins,
    "class_flow": _class_flow,
    "same_token": lambda block: _mass_where(block, block.equal_tokens[0]),
    "induction": lambda block: _mass_where(block, block.equal_tokens[1]),
    "patch_distance": lambda block: block.patch_sums.distance,
    "patch_mass": _patch_mass,
    "patch_rows": lambda block: block.patch_sums.rows,
    **SAMPLED,
}


def _context_norm(_call: Call, output: Tensor, measured: Tensor) -> Tensor:
    return output.to(exact_dtype(output)).norm(dim=-1).where(measured, 0)


def _output_norm(call: Call, output: Tensor, measured: Tensor) -> Tensor:
    assert call.write is not None, "asked for where the projection is known"
    exact = exact_dtype(output)
    return (output.to(exact) @ call.write.to(exact)).norm(dim=-1).where(measured, 0)


# the score of a token that does not see itself: finite in every type, and without weight
_UNSEEN = -1e38


def _query_norm(call: Call, _output: Tensor, measured: Tensor) -> Tensor:
    assert isinstance(call, AttentionCall), "asked for where queries are known"
    return call.query.to(exact_dtype(call.query)).norm(dim=-1).where(measured, 0)


def _key_norm(call: Call, output: Tensor, _measured: Tensor) -> Tensor:
    assert isinstance(call, AttentionCall), "asked for where keys are known"
    norms = call.key.to(exact_dtype(call.key)).norm(dim=-1).where(call.visibility.keys.real[:, None], 0)
    return norms.repeat_interleave(output.shape[1] // norms.shape[1], dim=1)


def _self_score(call: Call, _output: Tensor, measured: Tensor) -> Tensor:
    visibility = call.visibility
    if isinstance(call, ScoredCall):
        scores = call.scores.to(exact_dtype(call.scores)).diagonal(dim1=-2, dim2=-1)
    else:
        exact = exact_dtype(call.query)
        key = call.key.to(exact).repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
        scores = (call.query.to(exact) * key).sum(-1) * call.scale
        if call.softcap is not None:
            scores = (scores / call.softcap).tanh() * call.softcap
        if visibility.bias is not None:
            scores = scores + visibility.bias.diagonal(dim1=-2, dim2=-1).to(exact)
    place = visibility.queries.place
    sees_itself = (visibility.first <= place) & (place < visibility.last)
    if visibility.allowed is not None:
        sees_itself = sees_itself & visibility.allowed.diagonal(dim1=-2, dim2=-1)
    return scores.masked_fill(~sees_itself, _UNSEEN).where(measured, 0)


def _class_rows(call: Call, _output: Tensor, measured: Tensor) -> Tensor:
    assert call.classes is not None, "asked for where classes are known"
    return call.classes.rows(measured)


def _reading_rows(call: Call, output: Tensor, measured: Tensor) -> Tensor:
    return _of_readers(call, output, measured, lambda _block, keys: torch.ones_like(keys, dtype=torch.bool))


def _retrieved(call: Call, output: Tensor, measured: Tensor) -> Tensor:
    return _of_readers(call, output, measured, lambda block, keys: _in_needle(block, keys))


def _copied(call: Call, output: Tensor, measured: Tensor) -> Tensor:
    def has_read_id(block: Block, keys: Tensor) -> Tensor:
        assert call.token_ids is not None and call.reading is not None, "asked for where ids and readers are known"
        ids = call.token_ids
        read = ids.roll(-call.reading.ahead, 1)[:, None, block.rows]
        return _in_needle(block, keys) & (_at(ids, keys) == read)

    return _of_readers(call, output, measured, has_read_id)


def _of_readers(
    call: Call, output: Tensor, measured: Tensor, holds: Callable[[Block, Tensor], Tensor]
) -> Float[Tensor, "batch head"]:
    """The number of rows that read an answer for which it holds, given the keys of their largest weights."""
    reading = call.reading
    assert reading is not None, "asked for where rows read an answer"
    span = reading.span
    block = Block(call, _scores_of(call), span.start, span.stop, measured[..., span])
    strongest = block.usable_scores.argmax(-1) + block.keys.start
    counted = reading.rows[:, None, span] & block.measured & holds(block, strongest)
    return counted.sum(-1).to(exact_dtype(output))


def _in_needle(block: Block, keys: Tensor) -> Bool[Tensor, "batch head row"]:
    assert block.call.reading is not None, "asked for where rows read an answer"
    return _at(block.call.reading.keys, keys)


def _at(values: Tensor, keys: Int[Tensor, "batch head row"]) -> Shaped[Tensor, "batch head row"]:
    """The values [batch, key] at these keys."""
    return values[:, None].expand(-1, keys.shape[1], -1).gather(-1, keys)


def _pattern_rank(call: Call, output: Tensor, measured: Tensor) -> Float[Tensor, "batch head"]:
    """Of one sequence after the other, so that only its whole pattern is in memory."""
    each = [_ranks_of_sequence(call, measured, number) for number in range(len(measured))]
    return torch.stack(each) if each else output.new_zeros(measured.shape[:2])


def _ranks_of_sequence(call: Call, measured: Tensor, number: int) -> Float[Tensor, " head"]:
    """Of the pattern times the factor that makes its largest row sum to 1, so that a learned sink leaves no pattern of zeros."""
    chosen = torch.tensor([number], device=measured.device)
    alone, of_rows, heads = call.of_sequences(chosen), measured[chosen], measured.shape[1]
    queries, keys = alone.visibility.queries, alone.visibility.keys
    log_shares: list[Tensor] = []
    pattern: Tensor | None = None
    for block in blocks_of(alone, heads, of_rows):
        if pattern is None:
            pattern = block.pattern.new_zeros(heads, queries.tokens, keys.tokens)
        weights = block.key_weights[0]
        pattern[:, block.rows, block.keys] = weights / weights.sum(-1, keepdim=True).where(
            block.measured[0, ..., None], 1
        )
        log_shares.append(block.log_share_of_keys[0].where(block.measured[0], -torch.inf))
    assert pattern is not None, "a call has queries"
    log_share = torch.cat(log_shares, -1)
    pattern *= (log_share - log_share.amax(-1, keepdim=True).nan_to_num(neginf=0))[..., None].exp()
    of_tokens = pattern[:, queries.real[0]][..., keys.real[0]]
    return torch.stack([effective_rank(head) for head in of_tokens]).to(pattern.dtype)


OF_CALLS: dict[str, Callable[[Call, Tensor, Tensor], Tensor]] = {
    "class_rows": _class_rows,
    "context_norm": _context_norm,
    "output_norm": _output_norm,
    "value_norm": lambda call, output, _measured: value_norms(call, output.shape[1]),
    "query_norm": _query_norm,
    "key_norm": _key_norm,
    "pattern_rank": _pattern_rank,
    "reading_rows": _reading_rows,
    "retrieved": _retrieved,
    "copied": _copied,
    "self_score": _self_score,
}


def output_of(call: AttentionCall) -> Float[Tensor, "batch head query value_width"]:
    """The output of the call, computed from its definition, where the model's own attention function cannot be used."""
    exact = exact_dtype(call.query)
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
    """Softmax over visible keys; a row that sees none is uniform, as with a mask that is added to the scores."""
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return scores.softmax(-1).where(seen.any(-1, keepdim=True), 1 / scores.shape[-1])


def _scores_of(call: Call) -> Callable[[slice, slice], Float[Tensor, "batch head row key"]]:
    """Scores of some rows and keys, in float32 (float64 for a float64 model); of weights alone their logarithms serve."""
    if isinstance(call, ScoredCall):
        exact, scores = exact_dtype(call.scores), call.scores
        if call.weights_only:
            return lambda rows, keys: scores[:, :, rows, keys].to(exact).log()
        return lambda rows, keys: scores[:, :, rows, keys].to(exact)
    heads = call.query.shape[1]
    key = call.key.to(exact_dtype(call.query)).repeat_interleave(heads // call.key.shape[1], dim=1).transpose(-1, -2)
    return lambda rows, keys: _scores(call, key, rows, keys)


def _scores(call: AttentionCall, key: Tensor, rows: slice, keys: slice = slice(None)) -> Tensor:
    scores = call.query[:, :, rows].to(key.dtype) @ key[..., keys] * call.scale
    if call.softcap is not None:
        scores = (scores / call.softcap).tanh() * call.softcap
    if call.visibility.bias is not None:
        scores = scores + call.visibility.bias[..., rows, keys].to(scores.dtype)
    return scores
