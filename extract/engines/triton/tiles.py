"""Parts that the kernels share: tiles of queries and keys, what a row sees of them, and scores."""

# kernels are Triton's language, which only looks like Python to a type checker
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_rows(at, rows, stride, column, count, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS columns of rows of one head, whose last dimension is contiguous; zero beyond `count` rows and the width."""
    columns = column + tl.arange(0, COLUMNS)
    place = at + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if WIDTH % COLUMNS == 0:
        return tl.load(place, mask=(rows < count)[:, None], other=0)
    return tl.load(place, mask=(rows < count)[:, None] & (columns < WIDTH)[None, :], other=0)


@triton.jit
def load_bounds(bounds, plane, rows, tokens):
    """First visible key of each row and the end of its keys; 0 and 0 beyond the tokens."""
    first = tl.load(bounds + rows, mask=rows < tokens, other=0)
    return first, tl.load(bounds + plane + rows, mask=rows < tokens, other=0)


@triton.jit
def products(query, query_stride, key, key_stride, rows, keys, tokens, q, k, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Queries times keys, CHUNK of the width at a time; `q` and `k` are tiles that are already loaded, or None."""
    total = tl.zeros([rows.shape[0], keys.shape[0]], tl.float32)
    for at in tl.static_range(0, WIDTH, CHUNK):
        left = load_rows(query, rows, query_stride, at, tokens, WIDTH, CHUNK) if q is None else q
        right = load_rows(key, keys, key_stride, at, tokens, WIDTH, CHUNK) if k is None else k
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return total


@triton.jit
def seen_pairs(allowed, allowed_strides, rows, keys, first, last):
    """Which pairs of a tile are visible. `allowed` is None, or points to the pairs of this head."""
    seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
    if allowed is not None:
        seen &= load_pairs(allowed, allowed_strides, rows, keys, seen) != 0
    return seen


@triton.jit
def load_pairs(at, strides, rows, keys, seen):
    """The visible pairs of a tile from a tensor over pairs; 0 for the others."""
    at += rows.to(tl.int64)[:, None] * strides[0] + keys.to(tl.int64)[None, :] * strides[1]
    return tl.load(at, mask=seen, other=0)


@triton.jit
def _tanh(x):
    """tanh, by its series near zero, where 1 − exp(−2x) would lose digits."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    s = x * x
    near = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def soft_capped(scores, scale, softcap):
    """Scores after the soft-cap, if there is one, in their natural unit."""
    if softcap is not None:
        return _tanh(scores * (scale / softcap)) * softcap
    return scores * scale


@triton.jit
def masked_scores(
    query, query_row, key, key_row, allowed, allowed_steps, bias, bias_steps, rows, keys, first, last, tokens, q, k,
    scale, softcap, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores of a tile in which rows do not see every key, and which pairs are visible; those of the others are arbitrary.

    Scores are products still to be scaled, unless there is a soft-cap or a bias; then they are in their natural unit.
    """
    seen = seen_pairs(allowed, allowed_steps, rows, keys, first, last)
    scores = products(query, query_row, key, key_row, rows, keys, tokens, q, k, WIDTH, CHUNK)
    if (softcap is not None) or (bias is not None):
        scores = soft_capped(scores, scale, softcap)
    if bias is not None:
        scores += load_pairs(bias, bias_steps, rows, keys, seen).to(tl.float32)
    return scores, seen


@triton.jit
def masked_weights(
    query, query_row, key, key_row, bounds, bounds_plane, allowed, allowed_steps, bias, bias_steps, top_of, part_of,
    rows, keys, tokens, k, unit, scale, softcap, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """e and part of such a tile, of rows whose top and part are known; rows of `tokens` and beyond, and unmeasured ones, have zeros.

    p = e · part is the pattern.
    """
    top = tl.load(top_of + rows, mask=rows < tokens, other=0)
    part = tl.load(part_of + rows, mask=rows < tokens, other=0)
    first, last = load_bounds(bounds, bounds_plane, rows, tokens)
    # rows that are not measured add nothing
    last = tl.where(part > 0, last, first)
    scores, seen = masked_scores(
        query, query_row, key, key_row, allowed, allowed_steps, bias, bias_steps, rows, keys, first, last, tokens,
        None, k, scale, softcap, WIDTH, CHUNK,
    )  # fmt: skip
    return tl.where(seen, tl.exp2(tl.fma(scores, unit, -top[:, None])), 0), part
