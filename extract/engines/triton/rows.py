"""The pass along rows: output, row quantities and what the pass along columns needs, by an online softmax."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from attlas.extract.engines.triton.tiles import (
    LOG2_E,
    load_bounds,
    load_rows,
    masked_scores,
    products,
    soft_capped,
)

# what the kernel writes of each row, in this order: its quantities, then the two numbers that turn its scores into its
# pattern: p = part · 2^(s · unit · log2 e − top)
QUANTITIES = (
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
    "context_norm",
    "output_norm",
    "top",
    "part",
)
TOP = tl.constexpr(QUANTITIES.index("top"))
PART = tl.constexpr(QUANTITIES.index("part"))
_OF_SUMS = tl.constexpr(QUANTITIES.index("context_norm"))
_LEAST = tl.constexpr(2.0**-126)  # the smallest normal number
# of a block of rows: the keys that any of its rows sees, and those that all of them see, each from the first to the end
SPAN = tl.constexpr(4)


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
def _add_tile(sums, scores, seen, keys_seen, rows, at, unit, KEYS: tl.constexpr, WHOLE: tl.constexpr):
    """The sums of a row with one more tile of scores; its weights e = 2^(s·unit − top); and what older sums fall to.

    In a WHOLE tile every row sees every key, and all keys are on one side of every row. Of all visible keys so far, sums are
    the largest score; their number, Σ b and Σ b² of b = s·unit − top; Σ e, Σ e·b, Σ e²; Σ e·|d|; the mean place, counted from
    the tile's first key, and the squared deviations from it.
    """
    largest, count, below, below_squares, total, surprise, squares, distance, mean, spread = sums
    before = largest
    if not WHOLE:
        scores = tl.where(seen, scores, -float("inf"))
    largest = tl.maximum(largest, tl.max(scores, 1))
    top = largest * unit
    if not WHOLE:
        top = tl.where(largest == -float("inf"), 0, top)
    # exactly 0 unless the largest score is a new one: the compiler may fuse the difference with a product, whose rounding
    # would then be in every tile; before the first visible key there is nothing to rescale, and −∞ − (−∞) is undefined
    fall = tl.where((count > 0) & (largest > before), before * unit - top, 0)
    fade = tl.exp2(fall)
    b = tl.fma(scores, unit, -top[:, None])
    e = tl.exp2(b)
    if not WHOLE:
        b = tl.where(seen, b, 0)
        e = tl.where(seen, e, 0)
    below_squares += fall * (2 * below + fall * count) + tl.sum(b * b, 1)
    below += fall * count + tl.sum(b, 1)
    count += keys_seen
    surprise = fade * (surprise + fall * total) + tl.sum(e * b, 1)
    squares = fade * fade * squares + tl.sum(e * e, 1)

    mass = tl.sum(e, 1)
    # about the tile's middle, then about its own mean: about the query, the spread of a narrow, distant pattern would
    # lose its digits
    local = tl.arange(0, KEYS).to(tl.float32)
    tile_mean = tl.sum(e * local[None, :], 1) / tl.where(mass > 0, mass, 1)
    off = local[None, :] - tile_mean[:, None]
    tile_spread = tl.sum(e * off * off, 1)
    faded = fade * total
    total, mean, spread = _merge_moments(faded, mean - KEYS, fade * spread, mass, tile_mean, tile_spread)
    if WHOLE:
        distance = fade * distance + tl.abs(tile_mean + (at - rows).to(tl.float32)) * mass
    else:
        keys = at + tl.arange(0, KEYS)
        distance = fade * distance + tl.sum(e * tl.abs((keys[None, :] - rows[:, None]).to(tl.float32)), 1)
    return (
        (
            largest,
            count,
            below,
            below_squares,
            total,
            surprise,
            squares,
            distance,
            mean,
            spread,
        ),
        e,
        fade,
    )


@triton.jit
def _with_values(
    context, e, fade, value, stride, keys, low, high, WIDTH: tl.constexpr, PART_WIDTH: tl.constexpr, WHOLE: tl.constexpr
):
    """Σ e·v, in parts of its width."""
    added = ()
    for n in tl.static_range(len(context)):
        columns = tl.arange(0, PART_WIDTH) + n * PART_WIDTH
        place = value + keys.to(tl.int64)[:, None] * stride + columns[None, :]
        if WHOLE and (WIDTH % PART_WIDTH == 0):
            v = tl.load(place)
        elif WHOLE:
            v = tl.load(place, mask=(columns < WIDTH)[None, :], other=0)
        else:
            # values outside the span, such as padding, are arbitrary: zero times them need not be zero
            inside = (keys >= low) & (keys < high)
            v = tl.load(place, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0)
        part = tl.dot(e.to(v.dtype), v, context[n] * fade[:, None], input_precision="ieee")
        added = added + (part,)  # noqa: RUF005 (Triton unpacks no tuples)
    return added


@triton.jit
def row_quantities(sums, ok, sink_logit, rows, at, unit):
    """The quantities of rows from the sums over all keys, in their order up to the sink; then top, part.

    `at` is the key that mean places are counted from.
    """
    largest, count, below, below_squares, total, surprise, squares, distance, mean, spread = sums
    largest, total, count = tl.where(ok, largest, 0), tl.where(ok, total, 1), tl.maximum(count, 1)
    ahead = (mean + (at - rows).to(tl.float32)) * total
    natural = 1 / LOG2_E  # b is in powers of two
    top = largest * unit
    highest, sink = top * natural, tl.zeros_like(total)
    entropy = -surprise * natural
    whole, shift = total, highest
    if sink_logit is not None:
        shift = tl.maximum(highest, sink_logit)
        whole = total * tl.exp(highest - shift) + tl.exp(sink_logit - shift)
        sink = tl.exp(sink_logit - shift) / whole
        entropy -= total * (highest - shift)
    part = tl.exp(highest - shift) / whole
    entropy = entropy * part + tl.log(whole)
    if sink_logit is not None:
        entropy -= tl.where(sink > 0, sink * (sink_logit - shift), 0)
    # the spread of the keys, and what the sink's mass at d = 0 adds
    std = tl.sqrt(spread * part + ahead * part * (ahead / total) * sink)
    below_mean = below / count
    variance = tl.maximum(below_squares / count - below_mean * below_mean, 0)
    return (
        (
            tl.maximum(entropy, 0),
            squares * part * part,
            tl.minimum(tl.exp2(tl.fma(largest, unit, -top)) * part, 1),
            distance * part,
            ahead * part,
            std,
            highest,
            (top + below_mean) * natural,
            variance * natural * natural,
            sink,
        ),
        top,
        part,
    )


@triton.jit
def store_rows(at, plane, row, top, part, ok, held):
    """Write row quantities to the slab, up to the sink, and what the pass along columns needs."""
    for n in tl.static_range(_OF_SUMS):
        tl.store(at + n * plane, tl.where(ok, row[n], 0), mask=held)
    tl.store(at + TOP * plane, top, mask=held)
    # 0 only where a row is not measured: next to a learned sink that takes all of it, a row's share may be too small for a float
    tl.store(at + PART * plane, tl.where(ok, tl.maximum(part, _LEAST), 0), mask=held)


@triton.jit
def store_output(
    at, plane, output, context, part, ok, held, write, write_rest, h,
    WIDTH: tl.constexpr, PART_WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write rows of the output, in the layout that the model reads next, with the heads of a token side by side; and norms."""
    square, written = tl.zeros_like(part), ()
    for n in tl.static_range(PARTS):
        columns = tl.arange(0, PART_WIDTH) + n * PART_WIDTH
        c = tl.where(ok[:, None], context[n] * part[:, None], 0)
        square += tl.sum(c * c, 1)
        c = c.to(output.dtype.element_ty)
        tl.store(output + columns[None, :], c, mask=held[:, None] & (columns < WIDTH)[None, :])
        written = written + (c,)  # noqa: RUF005
    tl.store(at + _OF_SUMS * plane, tl.sqrt(square), mask=held)
    if write is not None:
        norm = norms_of_writes(written, write, write_rest, h, WIDTH, PART_WIDTH, PARTS)
        tl.store(at + (_OF_SUMS + 1) * plane, norm, mask=held)


@triton.jit(do_not_specialize=["batch", "heads", "tokens"])
def along_rows(
    query, key, value, output, bounds, start, length, slab, unmeasured, sinks, write, write_rest, allowed, bias,
    query_batch, query_head, query_row,
    key_batch, key_head, key_row,
    value_batch, value_head, value_row,
    bounds_batch, bounds_head, bounds_plane,
    allowed_batch, allowed_head, allowed_row, allowed_key,
    bias_batch, bias_head, bias_row, bias_key,
    spans,  # where they begin in the slab
    batch, heads, tokens,
    unit,  # of products, in powers of two
    scale, softcap,
    PER_KEY_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PART_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head: its output and row quantities, and the spans of keys that its rows see.

    Spans are of the tiles of the pass along columns, TILE rows each.
    """
    lines = tl.cdiv(tokens, ROWS)
    bh = tl.program_id(0) // lines
    line = lines - 1 - tl.program_id(0) % lines  # with a causal mask the last rows take longest, so they start first
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    query += b * query_batch + h * query_head
    key += b * key_batch + (h // PER_KEY_HEAD) * key_head
    value += b * value_batch + (h // PER_KEY_HEAD) * value_head
    bounds += b * bounds_batch + h * bounds_head
    if allowed is not None:
        allowed += b * allowed_batch + h * allowed_head
    if bias is not None:
        bias += b * bias_batch + h * bias_head
    rows = line * ROWS + tl.arange(0, ROWS)
    held = rows < tokens
    first, last = load_bounds(bounds, bounds_plane, rows, tokens)
    sees = last > first
    high = tl.max(tl.where(sees, last, 0), 0)
    low = tl.minimum(tl.min(tl.where(sees, first, tokens), 0), high)
    whole_low, whole_high = tl.max(tl.where(sees, first, 0), 0), tl.min(tl.where(sees, last, tokens), 0)

    q = None
    if CHUNK >= WIDTH:
        q = load_rows(query, rows, query_row, 0, tokens, WIDTH, CHUNK)
    zero = tl.zeros([ROWS], tl.float32)
    sums = (zero - float("inf"), zero, zero, zero, zero, zero, zero, zero, zero, zero)
    context = ()
    for _ in tl.static_range(PARTS):
        context = context + (tl.zeros([ROWS, PART_WIDTH], tl.float32),)  # noqa: RUF005

    # keys in five ranges: what some rows see; what all see, before the rows, beside them, and after them; what some see
    edge_0 = low // KEYS * KEYS
    edge_1, edge_4 = tl.cdiv(whole_low, KEYS) * KEYS, tl.minimum(whole_high, high) // KEYS * KEYS
    if (allowed is not None) or (bias is not None):
        edge_4 = edge_1
    if edge_4 <= edge_1:
        edge_1 = high
        edge_4 = high
    edge_2 = tl.minimum(tl.maximum(line * ROWS // KEYS * KEYS, edge_1), edge_4)
    edge_3 = tl.minimum(tl.maximum(tl.cdiv(line * ROWS + ROWS, KEYS) * KEYS, edge_1), edge_4)
    for n in range(5):
        begin = tl.where(
            n == 0, edge_0, tl.where(n == 1, edge_1, tl.where(n == 2, edge_2, tl.where(n == 3, edge_3, edge_4)))
        )
        end = tl.where(
            n == 0, edge_1, tl.where(n == 1, edge_2, tl.where(n == 2, edge_3, tl.where(n == 3, edge_4, high)))
        )
        if n % 2 == 1:
            for at in range(begin, end, KEYS):
                keys = at + tl.arange(0, KEYS)
                scores = products(query, query_row, key, key_row, rows, keys, tokens, q, None, WIDTH, CHUNK)
                if softcap is not None:
                    scores = soft_capped(scores, scale, softcap)
                sums, e, fade = _add_tile(sums, scores, None, KEYS, rows, at, unit, KEYS, True)
                context = _with_values(
                    context, e, fade, value, value_row, keys, low, high, VALUE_WIDTH, PART_WIDTH, True
                )
        else:
            for at in range(begin, end, KEYS):
                keys = at + tl.arange(0, KEYS)
                scores, seen = masked_scores(
                    query, query_row, key, key_row, allowed, (allowed_row, allowed_key), bias, (bias_row, bias_key),
                    rows, keys, first, last, tokens, q, None, scale, softcap, WIDTH, CHUNK,
                )  # fmt: skip
                if allowed is None:
                    keys_seen = tl.maximum(tl.minimum(last, at + KEYS) - tl.maximum(first, at), 0).to(tl.float32)
                else:
                    keys_seen = tl.sum(seen.to(tl.float32), 1)
                sums, e, fade = _add_tile(sums, scores, seen, keys_seen, rows, at, unit, KEYS, False)
                context = _with_values(
                    context, e, fade, value, value_row, keys, low, high, VALUE_WIDTH, PART_WIDTH, False
                )

    # the sum of differences is finite only if all scores are
    ok = sees & (sums[1] > 0) & (tl.abs(sums[2]) < float("inf"))
    sink_logit = None
    if sinks is not None:
        sink_logit = tl.load(sinks + h).to(tl.float32)
    last_tile = tl.maximum(high - 1, 0) // KEYS * KEYS
    row, top, part = row_quantities(sums, ok, sink_logit, rows, last_tile, unit)
    plane = batch.to(tl.int64) * heads * tokens
    at = slab + bh.to(tl.int64) * tokens + rows
    store_rows(at, plane, row, top, part, ok, held)
    begins = tl.load(start + b)
    real = (rows >= begins) & (rows < begins + tl.load(length + b))
    if tl.max((real & (ok == 0)).to(tl.int32), 0) > 0:
        tl.store(unmeasured, 1)
    store_output(
        at, plane, output + ((b * tokens + rows) * heads + h)[:, None] * VALUE_WIDTH, context, part, ok, held,
        write, write_rest, h, VALUE_WIDTH, PART_WIDTH, PARTS,
    )  # fmt: skip

    # one row that is not measured makes its tile one to be masked
    tile = tl.arange(0, ROWS // TILE)
    ends = tl.max(tl.reshape(tl.where(sees, last, 0), (ROWS // TILE, TILE)), 1)
    starts = tl.minimum(tl.min(tl.reshape(tl.where(sees, first, tokens), (ROWS // TILE, TILE)), 1), ends)
    all_from = tl.max(tl.reshape(tl.where(ok, first, tokens), (ROWS // TILE, TILE)), 1)
    all_to = tl.min(tl.reshape(tl.where(ok, last, 0), (ROWS // TILE, TILE)), 1)
    if (allowed is not None) or (bias is not None):
        all_from = all_from * 0 + tokens
    tiles = tl.cdiv(tokens, TILE)
    number = line * (ROWS // TILE) + tile
    at = (slab + spans).to(tl.pointer_type(tl.int32)) + (bh * tiles + number) * SPAN
    tl.store(at, starts, mask=number < tiles)
    tl.store(at + 1, ends, mask=number < tiles)
    tl.store(at + 2, all_from, mask=number < tiles)
    tl.store(at + 3, all_to, mask=number < tiles)


@triton.jit
def norms_of_writes(vectors, factor, rest, h, WIDTH: tl.constexpr, PART_WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """‖c R‖ of rows c, given in parts of their width. R is the head's `factor`, plus `rest` where its type has few digits."""
    factor += h * (WIDTH * WIDTH)
    square = tl.zeros([vectors[0].shape[0]], tl.float32)
    for m in tl.static_range(PARTS):
        product = tl.zeros([vectors[0].shape[0], PART_WIDTH], tl.float32)
        for n in tl.static_range(PARTS):
            rows = tl.arange(0, PART_WIDTH) + n * PART_WIDTH
            r = load_rows(factor, rows, WIDTH, m * PART_WIDTH, WIDTH, WIDTH, PART_WIDTH)
            product = tl.dot(vectors[n], r, product, input_precision="ieee")
            if rest is not None:
                r = load_rows(rest + h * (WIDTH * WIDTH), rows, WIDTH, m * PART_WIDTH, WIDTH, WIDTH, PART_WIDTH)
                product = tl.dot(vectors[n], r, product, input_precision="ieee")
        square += tl.sum(product * product, 1)
    return tl.sqrt(square)
