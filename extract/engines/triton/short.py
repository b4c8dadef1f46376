"""Short sequences, whose patterns fit into one tile: one pass computes everything from the same scores."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from attlas.extract.engines.triton.columns import BINS, bins_of_diagonals, equal_tokens, norms_of_values, tokens_of
from attlas.extract.engines.triton.rows import row_quantities, store_output, store_rows
from attlas.extract.engines.triton.tiles import load_bounds, masked_scores


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
def whole_patterns(
    query, key, value, output, bounds, start, length, slab, unmeasured, sinks, write, write_rest, ids, allowed, bias,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    bounds_batch, bounds_head, bounds_plane,
    allowed_batch, allowed_head, allowed_row, allowed_key,
    bias_batch, bias_head, bias_row, bias_key,
    of_keys, bins, looked_up,
    batch, heads, tokens, unit, scale, softcap,
    PER_KEY_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PART_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The output of one head of one sequence, and all that the passes along rows and columns write of it."""
    bh = tl.program_id(0)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    query += b * query_batch + h * query_head
    key += b * key_batch + (h // PER_KEY_HEAD) * key_head
    value += b * value_batch + (h // PER_KEY_HEAD) * value_head
    bounds += b * bounds_batch + h * bounds_head
    plane = batch.to(tl.int64) * heads * tokens
    rows = tl.arange(0, TILE)
    first, last = load_bounds(bounds, bounds_plane, rows, tokens)
    sees = last > first
    high = tl.max(tl.where(sees, last, 0), 0)
    low = tl.minimum(tl.min(tl.where(sees, first, tokens), 0), high)
    if allowed is not None:
        allowed += b * allowed_batch + h * allowed_head
    if bias is not None:
        bias += b * bias_batch + h * bias_head
    scores, seen = masked_scores(
        query, query_row, key, key_row, allowed, (allowed_row, allowed_key), bias, (bias_row, bias_key),
        rows, rows, first, last, tokens, None, None, scale, softcap, WIDTH, CHUNK,
    )  # fmt: skip
    scores = tl.where(seen, scores, -float("inf"))
    largest = tl.max(scores, 1)
    top = tl.where(largest == -float("inf"), 0, largest * unit)
    below = tl.fma(scores, unit, -top[:, None])
    e = tl.exp2(below)
    below = tl.where(seen, below, 0)
    count = tl.maximum(last - first, 0).to(tl.float32) if allowed is None else tl.sum(seen.to(tl.float32), 1)
    total = tl.sum(e, 1)
    place = rows.to(tl.float32)
    mean = tl.sum(e * place[None, :], 1) / tl.where(total > 0, total, 1)
    off = place[None, :] - mean[:, None]
    sums = (
        largest,
        count,
        tl.sum(below, 1),
        tl.sum(below * below, 1),
        total,
        tl.sum(e * below, 1),
        tl.sum(e * e, 1),
        tl.sum(e * tl.abs(place[None, :] - place[:, None]), 1),
        mean,
        tl.sum(e * off * off, 1),
    )
    ok = sees & (count > 0) & (tl.abs(sums[2]) < float("inf"))
    sink_logit = None
    if sinks is not None:
        sink_logit = tl.load(sinks + h).to(tl.float32)
    row, top, part = row_quantities(sums, ok, sink_logit, rows, 0, unit)
    at = slab + bh.to(tl.int64) * tokens + rows
    store_rows(at, plane, row, top, part, ok, rows < tokens)
    begins = tl.load(start + b).to(tl.int32)
    real = (rows >= begins) & (rows < begins + tl.load(length + b))
    if tl.max((real & (ok == 0)).to(tl.int32), 0) > 0:
        tl.store(unmeasured, 1)

    # values outside the span, such as padding, are arbitrary: zero times them need not be zero
    inside = (rows >= low) & (rows < high)
    context = ()
    for n in tl.static_range(PARTS):
        columns = tl.arange(0, PART_WIDTH) + n * PART_WIDTH
        v = tl.load(
            value + rows.to(tl.int64)[:, None] * value_row + columns[None, :],
            mask=inside[:, None] & (columns < VALUE_WIDTH)[None, :],
            other=0,
        )
        context = context + (tl.dot(e.to(v.dtype), v, input_precision="ieee"),)  # noqa: RUF005
    store_output(
        at, plane, output + ((b * tokens + rows) * heads + h)[:, None] * VALUE_WIDTH, context, part, ok, rows < tokens,
        write, write_rest, h, VALUE_WIDTH, PART_WIDTH, PARTS,
    )  # fmt: skip

    # rows that are not measured add nothing
    p = tl.where(ok[:, None], e * part[:, None], 0)
    tl.store(at + of_keys, tl.sum(p, 0), mask=rows < tokens)
    if write is not None:
        norm = norms_of_values(value, value_row, write, write_rest, h, rows, tokens, VALUE_WIDTH, PART_WIDTH, PARTS)
        tl.store(at + of_keys + plane, tl.where(real, norm, 0), mask=rows < tokens)
    if ids is not None:
        ids += b * tokens
        token, before = tokens_of(ids, begins, rows, tokens)
        own = tl.load(ids + rows, mask=rows < tokens, other=-2).to(tl.int32)
        same, after = equal_tokens(p, own, token, before, rows, rows, False)
        tl.store(slab + looked_up + bh.to(tl.int64) * 2, tl.sum(same, 0))
        tl.store(slab + looked_up + bh.to(tl.int64) * 2 + 1, tl.sum(after, 0))
    in_bins = bins_of_diagonals(p, 0, TILE)
    tl.store(slab + bins + bh.to(tl.int64) * BINS + tl.arange(0, BINS), in_bins)
