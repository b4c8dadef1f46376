"""The Triton engine: fused kernels that compute the output and the row quantities on a GPU.

Three passes over the tiles of a pattern, each with its own products of queries and keys, so that nothing of a pattern's
size is stored. The first goes along rows, as flash attention does: an online softmax, with every row quantity beside
it. A sum over rows needs each row's final maximum and normaliser, so two more follow: down columns of tiles for
`received`, along diagonals of tiles for `offsets`. There a program owns its line of tiles and adds them up element
by element in registers; the remaining tile is summed over its rows (skewed first, on a diagonal) and written once. Every
sum thus has one owner and one order: without atomics, the same call gives the same bytes. A distance is on two diagonals
of tiles, which costs two vectors of its size and nothing that grows with the square of the sequence.

Tiles in which no row sees anything are skipped. Scores are products in the model's own type, summed in float32. The
reference engine does what this one does not support (float64, heads wider than 256) or compute (norms of what heads
write).
"""

# kernels are Triton's language, which only looks like Python to a type checker
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from attlas.extract.engines.quantities import known_quantities
from attlas.extract.engines.rows import AttentionCall, Rows, ScoredCall

if TYPE_CHECKING:
    from torch import Tensor

# results of `_row_quantities`, in order: row quantities, and the two numbers that turn a row's scores into its pattern;
# the norm is computed with the context
_ROW_RESULTS = (
    "entropy",
    "collision",
    "max_weight",
    "distance",
    "offset",
    "offset_std",
    "score_max",
    "score_mean",
    "score_variance",
    "sink",
    "largest",
    "part",
)
_QUANTITIES = (*_ROW_RESULTS, "context_norm")
MAKES = frozenset({*_QUANTITIES, "received", "offsets", "same_token", "induction"} - {"largest", "part"})
_LARGEST = tl.constexpr(_QUANTITIES.index("largest"))
_PART = tl.constexpr(_QUANTITIES.index("part"))
_NORM = tl.constexpr(_QUANTITIES.index("context_norm"))
_LOG2_E = tl.constexpr(math.log2(math.e))
_MIN_COLUMNS = 16  # of a product of tiles
_MAX_WIDTH = 256  # of heads that the blocks below support


class Blocks(NamedTuple):
    """Sizes: rows and keys of a tile, widths of scores and of contexts in one product, warps and stages."""

    rows: int
    keys: int
    chunk: int
    part: int
    warps: int
    stages: int


# by bytes per number and padded width, for the registers (255 per thread) and shared memory (227 KiB) of an H100 or
# H200. Products of 16-bit tiles have one shape, as wide as the keys, so that the compiler keeps rows in one layout;
# float32 has no tensor cores, and its products keep a chunk of both tiles in registers.
_BLOCKS = {
    (2, 32): Blocks(rows=128, keys=32, chunk=32, part=32, warps=8, stages=3),
    (2, 64): Blocks(rows=128, keys=64, chunk=64, part=64, warps=8, stages=3),
    (2, 128): Blocks(rows=128, keys=64, chunk=128, part=64, warps=8, stages=2),
    (2, 256): Blocks(rows=64, keys=32, chunk=256, part=32, warps=8, stages=2),
    (4, 32): Blocks(rows=64, keys=32, chunk=16, part=32, warps=8, stages=2),
    (4, 64): Blocks(rows=64, keys=32, chunk=16, part=64, warps=8, stages=2),
    (4, 128): Blocks(rows=64, keys=16, chunk=16, part=64, warps=8, stages=2),
    (4, 256): Blocks(rows=32, keys=32, chunk=16, part=64, warps=8, stages=2),
}


class _Strided(NamedTuple):
    """A tensor and its strides for a kernel; a stride is 0 for a dimension that is broadcast."""

    at: Any
    strides: tuple[int, ...]


class _Mask(NamedTuple):
    first: _Strided
    last: _Strided
    allowed: _Strided
    bias: _Strided


class _Scoring(NamedTuple):
    """How products become scores, which kernels keep in units of `unit`, so that ordinary ones need no scaling."""

    scale: float
    softcap: float | None
    unit: float


def takes(call: AttentionCall | ScoredCall) -> bool:
    """Whether the engine supports a call: self-attention that the model has not computed, in float32 or less, and not too wide."""
    if isinstance(call, ScoredCall) or call.visibility.is_cross_attention:
        return False
    widest, size = max(call.query.shape[-1], call.value.shape[-1]), call.query.element_size()
    return size <= 4 and widest <= _MAX_WIDTH and call.scale > 0


def attend(call: AttentionCall, call_original: Callable[[], Tensor]) -> tuple[Tensor, Rows]:
    """Output and row quantities of one attention call; if a row is not measured, the output is the model's own."""
    widest, size = max(call.query.shape[-1], call.value.shape[-1]), call.query.element_size()
    return attend_in_blocks(call, call_original, _BLOCKS[size, max(32, triton.next_power_of_2(widest))])


def attend_in_blocks(call: AttentionCall, call_original: Callable[[], Tensor], blocks: Blocks) -> tuple[Tensor, Rows]:
    """`attend` with tiles of these sizes."""
    batch, heads, tokens, _ = call.query.shape
    lines = triton.cdiv(tokens, blocks.rows)
    quantities = call.query.new_empty(len(_QUANTITIES), batch, heads, tokens, dtype=torch.float32)
    spans = call.query.new_empty(batch, heads, lines, 2, dtype=torch.int32)
    common = _common_arguments(call, blocks) | {"quantities": quantities, "spans": spans}
    with torch.cuda.device_of(call.query):
        output, measured, looked_up = _rows(call, blocks, common)
        received, offsets = _sums(call, blocks, common)
    # last, because it waits for the device
    if bool(measured.sum() < heads * call.visibility.keys.length.sum()):
        output = call_original()
    made = dict(zip(_QUANTITIES, quantities.unbind(), strict=True)) | {"received": received, "offsets": offsets}
    made |= zip(("same_token", "induction"), looked_up.sum(-1).unbind(), strict=True)
    return output, Rows(measured, {name: made[name] for name in known_quantities(MAKES, call.facts)})


def _common_arguments(call: AttentionCall, blocks: Blocks) -> dict[str, Any]:
    """Arguments common to all kernels."""
    batch, heads, tokens, width = call.query.shape
    return {
        "query": _with_strides(call.query),
        "key": _with_strides(call.key),
        "mask": _mask(call),
        "scoring": _scoring(call),
        "batch": batch,
        "heads": heads,
        "per_key_head": heads // call.key.shape[1],
        "tokens": tokens,
        "WIDTH": width,
        "CHUNK": min(blocks.chunk, max(_MIN_COLUMNS, triton.next_power_of_2(width))),
        "ROWS": blocks.rows,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "enable_fp_fusion": True,
    }


def _rows(call: AttentionCall, blocks: Blocks, common: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, which rows are measured, and the look-ups by blocks of rows; the rest is written to the arrays in `common`."""
    batch, heads, tokens, _ = call.query.shape
    lines, width = triton.cdiv(tokens, blocks.rows), call.value.shape[-1]
    # in the layout that the model reads next, with the heads of a token contiguous
    output = call.query.new_empty(batch, tokens, heads, width).transpose(1, 2)
    measured = call.query.new_empty(batch, heads, tokens, dtype=torch.bool)
    looked_up = call.query.new_empty(2, batch, heads, lines, dtype=torch.float32)
    _along_rows[(batch * heads * lines,)](
        value=_with_strides(call.value),
        sinks=None if call.sinks is None else call.sinks.contiguous(),
        ids=None if call.token_ids is None else call.token_ids.contiguous(),
        start=call.visibility.keys.start.contiguous(),
        output=_with_strides(output),
        measured=measured,
        looked_up=looked_up,
        VALUE_WIDTH=width,
        PART=blocks.part,
        PARTS=triton.cdiv(width, blocks.part),
        KEYS=blocks.keys,
        **common,
    )
    return output, measured, looked_up


def _sums(call: AttentionCall, blocks: Blocks, common: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`received` and `offsets`, from the row quantities."""
    batch, heads, tokens, _ = call.query.shape
    lines = triton.cdiv(tokens, blocks.rows)
    received = call.query.new_empty(batch, heads, tokens, dtype=torch.float32)
    _along_lines[(batch * heads * lines,)](sums=received, DIAGONAL=False, **common)
    # distance d at d + middle, from the diagonal of tiles that begins at or before it and from the one after
    middle = lines * blocks.rows
    halves = call.query.new_zeros(2, batch, heads, 2 * middle, dtype=torch.float32)
    _along_lines[(batch * heads * (2 * lines - 1),)](sums=halves, DIAGONAL=True, **common)
    upper, lower = halves[..., middle - tokens + 1 : middle + tokens]
    return received, upper + lower


def _with_strides(tensor: Tensor | None) -> _Strided:
    if tensor is None:
        return _Strided(None, ())
    return _Strided(tensor, tuple(0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))


def _mask(call: AttentionCall) -> _Mask:
    seen = call.visibility
    allowed = None if seen.allowed is None else seen.allowed.view(torch.int8)
    return _Mask(_with_strides(seen.first), _with_strides(seen.last), _with_strides(allowed), _with_strides(seen.bias))


def _scoring(call: AttentionCall) -> _Scoring:
    if call.softcap is None and call.visibility.bias is None:
        return _Scoring(1.0, None, call.scale)
    return _Scoring(call.scale, call.softcap, 1.0)


@triton.jit
def _tile(tensor, b, h, rows, columns, held, WIDTH: tl.constexpr):
    """Load rows of one head; masked-out ones are zero."""
    at = tensor.at + b * tensor.strides[0] + h * tensor.strides[1]
    at += rows.to(tl.int64)[:, None] * tensor.strides[2] + columns[None, :] * tensor.strides[3]
    return tl.load(at, mask=held[:, None] & (columns < WIDTH)[None, :], other=0)


@triton.jit
def _put(tensor, b, h, rows, columns, held, WIDTH: tl.constexpr, tile):
    """Store rows of one head where the mask is set."""
    at = tensor.at + b * tensor.strides[0] + h * tensor.strides[1]
    at += rows.to(tl.int64)[:, None] * tensor.strides[2] + columns[None, :] * tensor.strides[3]
    tl.store(at, tile.to(tensor.at.dtype.element_ty), mask=held[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _of_pairs(tensor, b, h, rows, keys, seen):
    """Load the visible pairs of a tile from a tensor over pairs; 0 for the others."""
    at = tensor.at + b * tensor.strides[0] + h * tensor.strides[1]
    at += rows.to(tl.int64)[:, None] * tensor.strides[2] + keys.to(tl.int64)[None, :] * tensor.strides[3]
    return tl.load(at, mask=seen, other=0)


@triton.jit
def _end(tensor, b, h, rows, tokens):
    """Load one end of each row's visible keys; 0 beyond the tokens, so that these rows see nothing."""
    at = tensor.at + b * tensor.strides[0] + h * tensor.strides[1] + rows.to(tl.int64) * tensor.strides[2]
    return tl.load(at, mask=rows < tokens, other=0).to(tl.int32)


@triton.jit
def _span(first, last, tokens):
    """First key and end over all rows; equal if they see nothing."""
    high = tl.max(tl.where(last > first, last, 0), 0)
    return tl.minimum(tl.min(tl.where(last > first, first, tokens), 0), high), high


@triton.jit
def _visible(mask, b, h, rows, keys, first, last):
    seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
    if mask.allowed.at is not None:
        seen &= _of_pairs(mask.allowed, b, h, rows, keys, seen) != 0
    return seen


@triton.jit
def _tanh(x):
    """tanh, by its series near zero, where 1 − exp(−2x) would lose digits."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    s = x * x
    near = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _products(query, key, b, h, key_head, rows, keys, tokens, q, k, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Queries times keys, CHUNK of the width at a time; `q` and `k` are tiles that are already loaded."""
    products = tl.zeros([rows.shape[0], keys.shape[0]], tl.float32)
    for at in tl.static_range(0, WIDTH, CHUNK):
        columns = at + tl.arange(0, CHUNK)
        left = _tile(query, b, h, rows, columns, rows < tokens, WIDTH) if q is None else q
        right = _tile(key, b, key_head, keys, columns, keys < tokens, WIDTH) if k is None else k
        products = tl.dot(left, tl.trans(right), products, input_precision="ieee")
    return products


@triton.jit
def _scores(products, mask, scoring, b, h, rows, keys, seen):
    """Scores in their unit; arbitrary for invisible pairs."""
    scores = products
    if scoring.softcap is not None:
        scores = _tanh(scores * (scoring.scale / scoring.softcap)) * scoring.softcap
    elif mask.bias.at is not None:
        scores *= scoring.scale
    if mask.bias.at is not None:
        scores += _of_pairs(mask.bias, b, h, rows, keys, seen).to(tl.float32)
    return scores


@triton.jit
def _merge_moments(weight, mean, squares, other_weight, other_mean, other_squares):
    """Merge weight, mean and squared deviations of two parts without cancellation (Chan, Golub, LeVeque 1979)."""
    together = weight + other_weight
    part = 1 / tl.where(together > 0, together, 1)
    difference = other_mean - mean
    # relative to the heavier part, because the mean of a part without weight is arbitrary
    mean = tl.where(
        weight > other_weight, mean + difference * other_weight * part, other_mean - difference * weight * part
    )
    return together, mean, squares + other_squares + difference * difference * weight * (other_weight * part)


@triton.jit
def _with_scores(moments, scores, seen):
    """Update count, mean and squared deviations of a row's scores with one more tile."""
    count = tl.sum(seen.to(tl.float32), 1)
    mean = tl.sum(tl.where(seen, scores, 0), 1) / tl.maximum(count, 1)
    off = tl.where(seen, scores - mean[:, None], 0)
    return _merge_moments(moments[0], moments[1], moments[2], count, mean, tl.sum(off * off, 1))


@triton.jit
def _with_weights(softmax, scores, seen, unit):
    """The row's largest score, Σ e·(score − largest) and Σ e², with one more tile; e there; what older sums fall to."""
    largest, total, surprise, squares = softmax
    new = tl.maximum(largest, tl.max(tl.where(seen, scores, -float("inf")), 1))
    # before the first visible key there is nothing to rescale, and −∞ − (−∞) is undefined
    fall = tl.where(largest > -float("inf"), largest - new, 0)
    fade = tl.exp2(fall * unit)
    below = tl.where(seen, scores - new[:, None], 0)
    e = tl.where(seen, tl.exp2(below * unit), 0)
    surprise = fade * (surprise + fall * total) + tl.sum(e * below, 1)
    return (new, fade * total, surprise, fade * fade * squares + tl.sum(e * e, 1)), e, fade


@triton.jit
def _with_places(places, e, fade, faded, rows, first, KEYS: tl.constexpr):
    """Σ e·d, Σ e·|d|, mean place (counted from the tile's first key) and its squared deviations; Σ e."""
    ahead, distance, mean, squares = places
    keys = first + tl.arange(0, KEYS)
    local = tl.arange(0, KEYS).to(tl.float32)
    mass = tl.sum(e, 1)
    tile_mean = tl.sum(e * local[None, :], 1) / tl.where(mass > 0, mass, 1)
    # about the tile's own mean: about the query, the spread of a narrow, distant pattern would lose its digits
    off = local[None, :] - tile_mean[:, None]
    total, mean, squares = _merge_moments(faded, mean - KEYS, fade * squares, mass, tile_mean, tl.sum(e * off * off, 1))
    ahead = fade * ahead + (tile_mean + (first - rows).to(tl.float32)) * mass
    distance = fade * distance + tl.sum(e * tl.abs((keys[None, :] - rows[:, None]).to(tl.float32)), 1)
    return (ahead, distance, mean, squares), total


@triton.jit
def _with_copies(copies, e, fade, ids, own, begins, rows, keys, tokens):
    """Mass on other keys with the row's token, and on keys up to the row that follow one of these."""
    same, induction = copies
    token = tl.load(ids + keys, mask=keys < tokens, other=0).to(tl.int32)
    follows = (keys > begins) & (keys < tokens)
    before = tl.load(ids + keys - 1, mask=follows, other=0).to(tl.int32)
    is_copy = (token[None, :] == own[:, None]) & (keys[None, :] != rows[:, None])
    after_copy = (before[None, :] == own[:, None]) & follows[None, :] & (keys[None, :] <= rows[:, None])
    return (
        fade * same + tl.sum(tl.where(is_copy, e, 0), 1),
        fade * induction + tl.sum(tl.where(after_copy, e, 0), 1),
    )


@triton.jit
def _with_values(context, e, fade, value, b, h, keys, held, WIDTH: tl.constexpr, PART: tl.constexpr):
    """Σ e·v, in parts of its width."""
    added = ()
    for n in tl.static_range(len(context)):
        v = _tile(value, b, h, keys, tl.arange(0, PART) + n * PART, held, WIDTH)
        part = tl.dot(e.to(v.dtype), v, context[n] * fade[:, None], input_precision="ieee")
        added = added + (part,)  # noqa: RUF005
    return added


@triton.jit
def _row_quantities(moments, softmax, places, ok, sink_logit, unit):
    """The row quantities from the sums over all keys, in the order of _ROW_RESULTS."""
    count, mean, deviations = moments
    ahead, distance, _, spread = places
    largest, total, surprise, squares = softmax
    largest, total = tl.where(ok, largest, 0), tl.where(ok, total, 1)
    top, whole, sink = largest * unit, total, tl.zeros_like(total)
    entropy = -surprise * unit
    if sink_logit is not None:
        top = tl.maximum(largest * unit, sink_logit)
        whole = total * tl.exp(largest * unit - top) + tl.exp(sink_logit - top)
        sink = tl.exp(sink_logit - top) / whole
        entropy -= total * (largest * unit - top)
    part = tl.exp(largest * unit - top) / whole
    entropy = entropy * part + tl.log(whole)
    if sink_logit is not None:
        entropy -= tl.where(sink > 0, sink * (sink_logit - top), 0)
    # the spread of the keys, and what the sink's mass at d = 0 adds
    std = tl.sqrt(spread * part + ahead * part * (ahead / total) * sink)
    return (
        tl.maximum(entropy, 0),
        squares * part * part,
        tl.minimum(part, 1),
        distance * part,
        ahead * part,
        std,
        largest * unit,
        mean * unit,
        deviations / tl.maximum(count, 1) * unit * unit,
        sink,
        largest,
        part,
    )


@triton.jit(do_not_specialize=["batch", "heads", "per_key_head", "tokens"])
def _along_rows(
    query,
    key,
    value,
    mask,
    scoring,
    sinks,
    ids,
    start,
    output,
    quantities,
    measured,
    looked_up,
    spans,
    batch,
    heads,
    per_key_head,
    tokens,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One block of rows of one head: its output, row quantities and look-ups, and the span of keys that it sees."""
    lines = tl.cdiv(tokens, ROWS)
    bh = tl.program_id(0) // lines
    line = lines - 1 - tl.program_id(0) % lines  # with a causal mask the last rows take longest, so they start first
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    key_head = h // per_key_head
    rows = line * ROWS + tl.arange(0, ROWS)
    held = rows < tokens
    first, last = _end(mask.first, b, h, rows, tokens), _end(mask.last, b, h, rows, tokens)
    low, high = _span(first, last, tokens)
    tl.store(spans + (bh * lines + line) * 2, low)
    tl.store(spans + (bh * lines + line) * 2 + 1, high)

    q = None
    if CHUNK >= WIDTH:
        q = _tile(query, b, h, rows, tl.arange(0, CHUNK), held, WIDTH)
    if ids is not None:
        ids += b * tokens
        own = tl.load(ids + rows, mask=held, other=0).to(tl.int32)
        begins = tl.load(start + b).to(tl.int32)
    zero = tl.zeros([ROWS], tl.float32)
    moments, softmax = (zero, zero, zero), (zero - float("inf"), zero, zero, zero)
    places, copies = (zero, zero, zero, zero), (zero, zero)
    context = ()
    for _ in tl.static_range(PARTS):
        context = context + (tl.zeros([ROWS, PART], tl.float32),)  # noqa: RUF005 (Triton unpacks no tuples)
    for at in range(low // KEYS * KEYS, high, KEYS):
        keys = at + tl.arange(0, KEYS)
        seen = _visible(mask, b, h, rows, keys, first, last)
        products = _products(query, key, b, h, key_head, rows, keys, tokens, q, None, WIDTH, CHUNK)
        scores = _scores(products, mask, scoring, b, h, rows, keys, seen)
        moments = _with_scores(moments, scores, seen)
        (largest, faded, surprise, squares), e, fade = _with_weights(softmax, scores, seen, scoring.unit * _LOG2_E)
        places, total = _with_places(places, e, fade, faded, rows, at, KEYS)
        softmax = (largest, total, surprise, squares)
        if ids is not None:
            copies = _with_copies(copies, e, fade, ids, own, begins, rows, keys, tokens)  # pyright: ignore[reportPossiblyUnboundVariable]
        # values outside the span, such as padding, are arbitrary: zero times them need not be zero
        inside = (keys >= low) & (keys < high)
        context = _with_values(context, e, fade, value, b, key_head, keys, inside, VALUE_WIDTH, PART)

    # their mean is finite only if all scores are
    ok = (moments[0] > 0) & (tl.abs(moments[1]) < float("inf"))
    sink_logit = None
    if sinks is not None:
        sink_logit = tl.load(sinks + h).to(tl.float32)
    row = _row_quantities(moments, softmax, places, ok, sink_logit, scoring.unit)
    at = bh.to(tl.int64) * tokens + rows
    plane = batch.to(tl.int64) * heads * tokens
    for n in tl.static_range(_NORM):
        tl.store(quantities + n * plane + at, tl.where(ok, row[n], 0), mask=held)
    tl.store(measured + at, ok, mask=held)
    square = zero
    for n in tl.static_range(PARTS):
        part = tl.where(ok[:, None], context[n] * row[_PART][:, None], 0)
        square += tl.sum(part * part, 1)
        _put(output, b, h, rows, tl.arange(0, PART) + n * PART, held, VALUE_WIDTH, part)
    tl.store(quantities + _NORM * plane + at, tl.sqrt(square), mask=held)
    if ids is not None:
        part = tl.where(ok, row[_PART], 0)
        at = looked_up + bh * lines + line
        tl.store(at, tl.sum(tl.where(ok, copies[0] * part, 0), 0))
        tl.store(at + batch * heads * lines, tl.sum(tl.where(ok, copies[1] * part, 0), 0))


@triton.jit
def _visible_blocks(spans, blocks, shift, slope: tl.constexpr, ROWS: tl.constexpr):
    """The first block of rows that sees something of its tile in this line, and the one after the last."""
    low, high = blocks, 0
    for at in range(0, blocks, 128):
        block = at + tl.arange(0, 128)
        first = tl.load(spans + block * 2, mask=block < blocks, other=0)
        last = tl.load(spans + block * 2 + 1, mask=block < blocks, other=0)
        key = (shift + slope * block) * ROWS
        sees = (first < key + ROWS) & (last > key) & (last > first)
        low = tl.minimum(low, tl.min(tl.where(sees, block, blocks), 0))
        high = tl.maximum(high, tl.max(tl.where(sees, block + 1, 0), 0))
    return low, high


@triton.jit(do_not_specialize=["batch", "heads", "per_key_head", "tokens"])
def _along_lines(
    query,
    key,
    mask,
    scoring,
    quantities,
    spans,
    sums,
    batch,
    heads,
    per_key_head,
    tokens,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """One column of tiles of one head summed to its keys, or one diagonal of tiles to its distances."""
    blocks = tl.cdiv(tokens, ROWS)
    lines = 2 * blocks - 1 if DIAGONAL else blocks
    bh = tl.program_id(0) // lines
    line = tl.program_id(0) % lines
    shift = line - (blocks - 1) if DIAGONAL else line
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    key_head = h // per_key_head
    batch_heads = batch.to(tl.int64) * heads
    quantities += bh.to(tl.int64) * tokens
    place = tl.arange(0, ROWS)
    k = None
    if CHUNK >= WIDTH and not DIAGONAL:
        keys = shift * ROWS + place
        k = _tile(key, b, key_head, keys, tl.arange(0, CHUNK), keys < tokens, WIDTH)
    low, high = _visible_blocks(spans + bh * blocks * 2, blocks, shift, 1 if DIAGONAL else 0, ROWS)
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for block in range(low, high):
        rows = block * ROWS + place
        keys = (shift + block if DIAGONAL else shift) * ROWS + place
        largest = tl.load(quantities + _LARGEST * batch_heads * tokens + rows, mask=rows < tokens, other=0)
        part = tl.load(quantities + _PART * batch_heads * tokens + rows, mask=rows < tokens, other=0)
        first, last = _end(mask.first, b, h, rows, tokens), _end(mask.last, b, h, rows, tokens)
        # rows that are not measured add nothing
        seen = _visible(mask, b, h, rows, keys, first, tl.where(part > 0, last, first))
        products = _products(query, key, b, h, key_head, rows, keys, tokens, None, k, WIDTH, CHUNK)
        scores = _scores(products, mask, scoring, b, h, rows, keys, seen)
        p = tl.exp2((scores - largest[:, None]) * (scoring.unit * _LOG2_E)) * part[:, None]
        total += tl.where(seen, p, 0)
    if DIAGONAL:
        # rotate row r by r places: a column then has one distance, and after the wrap the distance ROWS before it
        turn = place[None, :] + place[:, None]
        total = tl.gather(total, turn % ROWS, 1)
        width = 2 * blocks * ROWS
        at = sums + bh.to(tl.int64) * width + line * ROWS + place
        tl.store(at + ROWS, tl.sum(tl.where(turn < ROWS, total, 0), 0))
        tl.store(at + batch_heads * width, tl.sum(tl.where(turn < ROWS, 0, total), 0))
    else:
        keys = shift * ROWS + place
        tl.store(sums + bh.to(tl.int64) * tokens + keys, tl.sum(total, 0), mask=keys < tokens)
