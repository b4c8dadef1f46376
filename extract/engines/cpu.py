"""The CPU engine: one compiled pass per (sequence, head) that makes the output and every primitive.

It replaces the attention call. Four query rows at a time go against transposed keys and values; nothing larger than
four rows of scores is held, and keys that causality or padding hides are not touched. What it does not do itself (dense
masks, biases, soft-caps, sinks, other types than float32) it leaves to the reference engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from numba import float32 as f32
from numba import njit, prange

from extract.engines import reference
from extract.engines.rows import AttentionCall, Rows
from extract.engines.visibility import see

if TYPE_CHECKING:
    from torch import Tensor

_LOG2_E = 1.4426950408889634
_LN_2 = np.float32(0.6931471805599453)
# sums may be reordered and contracted, but infinities and NaN keep their meaning: they mark rows to leave out
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_KEYS_PER_SCAN = 32
# places of the row quantities in the kernel's array
_ENTROPY, _COLLISION, _MAX, _DISTANCE, _OFFSET, _SPREAD, _SCORE_MAX, _SCORE_MEAN, _SCORE_VARIANCE = range(9)


def attend(call: AttentionCall, plain: Callable[[], Tensor]) -> tuple[Tensor, Rows]:
    """Output and primitives of one attention call. Rows with non-finite scores take the model's own output."""
    seen = call.visibility
    if call.query.dtype != torch.float32 or call.softcap is not None or call.sinks is not None:
        return reference.attend(call, plain)
    if seen.allowed is not None or seen.bias is not None or seen.first.shape[1] != 1:
        return reference.attend(call, plain)
    causal = bool((seen.last <= seen.place + 1).all())
    simple = see(None, causal=causal, start=seen.start, length=seen.length, tokens=seen.tokens)
    pairs = ((seen.first, simple.first), (seen.last, simple.last))
    same_ends = all(torch.equal(a.where(seen.keys > 0, 0), b.where(simple.keys > 0, 0)) for a, b in pairs)
    if not same_ends:
        return reference.attend(call, plain)
    batch, heads, tokens, _ = call.query.shape
    width = call.value.shape[-1]
    output = torch.zeros(batch, tokens, heads, width).transpose(1, 2)
    quantities = np.zeros((9, batch, heads, tokens), np.float32)
    measured = np.zeros((batch, heads, tokens), np.bool_)
    received = np.zeros((batch, heads, tokens), np.float32)
    offsets = np.zeros((batch, heads, 2 * tokens - 1), np.float32)
    looked_up = np.zeros((2, batch, heads), np.float32)
    ids = np.zeros((batch, tokens), np.int64) if call.token_ids is None else call.token_ids.numpy()
    start, length = seen.start.numpy(), seen.length.numpy()
    threads = numba.config.NUMBA_NUM_THREADS  # pyright: ignore
    numba.set_num_threads(min(torch.get_num_threads(), threads))
    _attend(
        call.query.numpy(),
        call.key.numpy(),
        call.value.numpy(),
        np.float32(call.scale * _LOG2_E),
        causal,
        start,
        length,
        _same_token_groups(ids, start, length),
        call.token_ids is not None,
        output.numpy(),
        quantities,
        measured,
        received,
        offsets,
        looked_up,
    )
    entropy, collision, largest, distance, offset, spread, *scores = torch.from_numpy(quantities).unbind()
    same, induction = torch.from_numpy(looked_up).unbind()
    whole = measured.sum() == heads * int(length.sum())
    output = output if whole else plain()
    rows = Rows(
        **reference.norms(call, output, torch.from_numpy(measured)),
        measured=torch.from_numpy(measured),
        entropy=entropy,
        collision=collision,
        max_weight=largest,
        distance=distance,
        offset=offset,
        offset_std=spread,
        score_max=scores[0],
        score_mean=scores[1],
        score_variance=scores[2],
        received=torch.from_numpy(received),
        offsets=torch.from_numpy(offsets),
        same_token=None if call.token_ids is None else same,
        induction=None if call.token_ids is None else induction,
    )
    return output, rows


@njit(cache=True, parallel=True)
def _same_token_groups(ids: Any, start: Any, length: Any) -> Any:
    """Positions sorted by token, and for each position where its token's group begins and ends: [3, batch, token]."""
    groups = np.zeros((3, ids.shape[0], ids.shape[1]), np.int32)
    for b in prange(ids.shape[0]):
        n = length[b]
        real = ids[b, start[b] : start[b] + n]
        order = np.argsort(real, kind="mergesort")
        first = 0
        for place in range(1, n + 1):
            if place == n or real[order[place]] != real[order[first]]:
                for member in range(first, place):
                    groups[0, b, member] = order[member]
                    groups[1, b, order[member]] = first
                    groups[2, b, order[member]] = place
                first = place
    return groups


@njit(fastmath=_FAST, inline="always")
def _exp2(x: Any) -> Any:
    """2ˣ for x ≤ 0 by a polynomial of degree 6 on [−½, ½], 1e-7 relative."""
    x = max(x, f32(-126.0))
    whole = np.floor(x + f32(0.5))
    t = x - whole
    p = f32(1.535336188319500e-4)
    p = p * t + f32(1.339887440266574e-3)
    p = p * t + f32(9.618437357674640e-3)
    p = p * t + f32(5.550332471162809e-2)
    p = p * t + f32(2.402264791363012e-1)
    p = p * t + f32(6.931472028550421e-1)
    p = p * t + f32(1.0)
    bits = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return p * np.int32(bits).view(np.float32)


@njit(fastmath=_FAST)
def _scores_of_four(keys: Any, q: Any, s0: Any, s1: Any, s2: Any, s3: Any, n: int) -> None:
    """Scores of four queries [4, width] against keys [width, token], eight dimensions at a time."""
    for k in range(0, q.shape[1], 8):
        c0, c1, c2, c3 = keys[k], keys[k + 1], keys[k + 2], keys[k + 3]
        c4, c5, c6, c7 = keys[k + 4], keys[k + 5], keys[k + 6], keys[k + 7]
        a0, a1, a2, a3, a4, a5, a6, a7 = q[0, k], q[0, k + 1], q[0, k + 2], q[0, k + 3], q[0, k + 4], q[0, k + 5], q[0, k + 6], q[0, k + 7]  # fmt: skip
        b0, b1, b2, b3, b4, b5, b6, b7 = q[1, k], q[1, k + 1], q[1, k + 2], q[1, k + 3], q[1, k + 4], q[1, k + 5], q[1, k + 6], q[1, k + 7]  # fmt: skip
        d0, d1, d2, d3, d4, d5, d6, d7 = q[2, k], q[2, k + 1], q[2, k + 2], q[2, k + 3], q[2, k + 4], q[2, k + 5], q[2, k + 6], q[2, k + 7]  # fmt: skip
        e0, e1, e2, e3, e4, e5, e6, e7 = q[3, k], q[3, k + 1], q[3, k + 2], q[3, k + 3], q[3, k + 4], q[3, k + 5], q[3, k + 6], q[3, k + 7]  # fmt: skip
        if k == 0:
            for j in range(n):
                x0, x1, x2, x3, x4, x5, x6, x7 = c0[j], c1[j], c2[j], c3[j], c4[j], c5[j], c6[j], c7[j]
                s0[j] = a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3 + a4 * x4 + a5 * x5 + a6 * x6 + a7 * x7
                s1[j] = b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3 + b4 * x4 + b5 * x5 + b6 * x6 + b7 * x7
                s2[j] = d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3 + d4 * x4 + d5 * x5 + d6 * x6 + d7 * x7
                s3[j] = e0 * x0 + e1 * x1 + e2 * x2 + e3 * x3 + e4 * x4 + e5 * x5 + e6 * x6 + e7 * x7
        else:
            for j in range(n):
                x0, x1, x2, x3, x4, x5, x6, x7 = c0[j], c1[j], c2[j], c3[j], c4[j], c5[j], c6[j], c7[j]
                s0[j] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3 + a4 * x4 + a5 * x5 + a6 * x6 + a7 * x7
                s1[j] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3 + b4 * x4 + b5 * x5 + b6 * x6 + b7 * x7
                s2[j] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3 + d4 * x4 + d5 * x5 + d6 * x6 + d7 * x7
                s3[j] += e0 * x0 + e1 * x1 + e2 * x2 + e3 * x3 + e4 * x4 + e5 * x5 + e6 * x6 + e7 * x7


@njit(fastmath=_FAST)
def _largest(s: Any, n: int) -> tuple[Any, int]:
    """The largest score and a key that has it: found within its block, so that the scan stays vectorised."""
    largest, block = s[0], 0
    for first in range(0, n, _KEYS_PER_SCAN):
        of_block = s[first]
        for j in range(first, min(first + _KEYS_PER_SCAN, n)):
            of_block = max(of_block, s[j])
        if of_block > largest:
            largest, block = of_block, first
    for j in range(block, min(block + _KEYS_PER_SCAN, n)):
        if s[j] == largest:
            return largest, j
    return largest, block


@njit(fastmath=_FAST)
def _row(s: Any, n: int, reach: int, i: int, out: Any, h: int) -> bool:
    """Turn the scores (base 2) of query i over its `reach` visible keys into its pattern; keys up to n hold zero.

    Distances are summed about the largest key: about the query, a narrow pattern far away would lose its spread.
    """
    largest, peak = _largest(s, reach)
    total = f32(0)
    surprise = f32(0)
    squares = f32(0)
    ahead = f32(0)
    ahead2 = f32(0)
    apart = f32(0)
    below = f32(0)
    below2 = f32(0)
    for j in range(reach):
        x = s[j] - largest
        e = _exp2(x)
        d = f32(np.int32(j) - np.int32(peak))
        s[j] = e
        total += e
        surprise += e * x
        squares += e * e
        ahead += e * d
        ahead2 += e * d * d
        apart += e * abs(f32(np.int32(j) - np.int32(i)))
        below += x
        below2 += x * x
    # by its bits: a comparison of floats may be folded away under the flags above
    if (np.float32(below).view(np.int32) & np.int32(0x7F800000)) == np.int32(0x7F800000):
        for j in range(n):
            s[j] = f32(0)
        return False
    part = f32(1) / total
    for j in range(reach):
        s[j] *= part
    for j in range(reach, n):
        s[j] = f32(0)
    mean_ahead = ahead * part
    mean_below = below / f32(reach)
    out[_ENTROPY, h, i] = max(np.log(total) - surprise * part * _LN_2, f32(0))
    out[_COLLISION, h, i] = squares * part * part
    out[_MAX, h, i] = part
    out[_DISTANCE, h, i] = apart * part
    out[_OFFSET, h, i] = mean_ahead + f32(peak - i)
    out[_SPREAD, h, i] = np.sqrt(max(ahead2 * part - mean_ahead * mean_ahead, f32(0)))
    out[_SCORE_MAX, h, i] = largest * _LN_2
    out[_SCORE_MEAN, h, i] = (largest + mean_below) * _LN_2
    out[_SCORE_VARIANCE, h, i] = max(below2 / f32(reach) - mean_below * mean_below, f32(0)) * _LN_2 * _LN_2
    return True


@njit(fastmath=_FAST)
def _add_four(s0: Any, s1: Any, s2: Any, s3: Any, n: int, offsets: Any, received: Any, zero: int) -> None:
    """Add four rows of a pattern to the sums by key and by distance; `zero` is where key 0 is for the first of them."""
    for j in range(n):
        received[j] += (s0[j] + s1[j]) + (s2[j] + s3[j])
    of0, of1, of2, of3 = offsets[zero:], offsets[zero - 1 :], offsets[zero - 2 :], offsets[zero - 3 :]
    for j in range(n):
        of0[j] += s0[j]
    for j in range(n):
        of1[j] += s1[j]
    for j in range(n):
        of2[j] += s2[j]
    for j in range(n):
        of3[j] += s3[j]


@njit(fastmath=_FAST)
def _contexts_of_four(values: Any, s0: Any, s1: Any, s2: Any, s3: Any, n: int, contexts: Any) -> None:
    """Four rows of a pattern times values [width, token], four dimensions at a time, into contexts [4, width]."""
    for k in range(0, values.shape[0], 4):
        a, b, c, d = values[k], values[k + 1], values[k + 2], values[k + 3]
        o00 = o01 = o02 = o03 = o10 = o11 = o12 = o13 = f32(0)
        o20 = o21 = o22 = o23 = o30 = o31 = o32 = o33 = f32(0)
        for j in range(n):
            x, y, z, w = a[j], b[j], c[j], d[j]
            p = s0[j]
            o00 += p * x
            o01 += p * y
            o02 += p * z
            o03 += p * w
            p = s1[j]
            o10 += p * x
            o11 += p * y
            o12 += p * z
            o13 += p * w
            p = s2[j]
            o20 += p * x
            o21 += p * y
            o22 += p * z
            o23 += p * w
            p = s3[j]
            o30 += p * x
            o31 += p * y
            o32 += p * z
            o33 += p * w
        contexts[0, k], contexts[0, k + 1], contexts[0, k + 2], contexts[0, k + 3] = o00, o01, o02, o03
        contexts[1, k], contexts[1, k + 1], contexts[1, k + 2], contexts[1, k + 3] = o10, o11, o12, o13
        contexts[2, k], contexts[2, k + 1], contexts[2, k + 2], contexts[2, k + 3] = o20, o21, o22, o23
        contexts[3, k], contexts[3, k + 1], contexts[3, k + 2], contexts[3, k + 3] = o30, o31, o32, o33


@njit(fastmath=_FAST)
def _transposed(x: Any, first: int, n: int, multiple: int) -> Any:
    """[token, width] from a token on, as [width, token], the width filled up with zeros to a multiple."""
    width = x.shape[1]
    out = np.zeros(((width + multiple - 1) // multiple * multiple, n), np.float32)
    for j in range(n):
        for k in range(width):
            out[k, j] = x[first + j, k]
    return out


@njit(fastmath=_FAST)
def _look_up(p: Any, i: int, reach: int, groups: Any) -> tuple[Any, Any]:
    """Mass of row i on other keys with its token, and on keys up to i that follow one of them.

    Positions within a group are in order, so the search ends at the row's reach.
    """
    same, induction = f32(0), f32(0)
    for member in range(groups[1, i], groups[2, i]):
        j = groups[0, member]
        if j >= reach:
            break
        if j != i:
            same += p[j]
        if j + 1 <= i:
            induction += p[j + 1]
    return same, induction


@njit(fastmath=_FAST, parallel=True, nogil=True, cache=True)
def _attend(
    query: Any,
    key: Any,
    value: Any,
    scale: Any,
    causal: bool,
    start: Any,
    length: Any,
    groups: Any,
    has_ids: bool,
    output: Any,
    quantities: Any,
    measured: Any,
    received: Any,
    offsets: Any,
    looked_up: Any,
) -> None:
    batch, heads, tokens, width = query.shape
    per_key_head = heads // key.shape[1]
    for bh in prange(batch * heads):
        b, h = bh // heads, bh % heads
        first, n = start[b], length[b]
        keys = _transposed(key[b, h // per_key_head], first, n, 8)
        values = _transposed(value[b, h // per_key_head], first, n, 4)
        q = np.zeros((4, keys.shape[0]), np.float32)
        contexts = np.empty((4, values.shape[0]), np.float32)
        s = np.empty((4, n), np.float32)
        # three places of room on the left, where rows beyond the last would begin; their mass is zero
        by_distance = np.zeros(2 * n + 3, np.float32)
        by_key = np.zeros(n, np.float32)
        out = quantities[:, b, :, first : first + n]
        same, induction = 0.0, 0.0
        for i in range(0, n, 4):
            rows = min(4, n - i)
            for r in range(rows):
                for k in range(width):
                    q[r, k] = query[b, h, first + i + r, k] * scale
            seen = min(n, i + 4) if causal else n
            _scores_of_four(keys, q, s[0], s[1], s[2], s[3], seen)
            for r in range(4):
                if r < rows:
                    reach = i + r + 1 if causal else n
                    ok = _row(s[r], seen, reach, i + r, out, h)
                    measured[b, h, first + i + r] = ok
                    if has_ids and ok:
                        mass = _look_up(s[r], i + r, reach, groups[:, b])
                        same += mass[0]
                        induction += mass[1]
                else:
                    s[r, :seen] = f32(0)
            _add_four(s[0], s[1], s[2], s[3], seen, by_distance, by_key, n + 2 - i)
            _contexts_of_four(values, s[0], s[1], s[2], s[3], seen, contexts)
            for r in range(rows):
                for k in range(value.shape[3]):
                    output[b, h, first + i + r, k] = contexts[r, k]
        for j in range(n):
            received[b, h, first + j] = by_key[j]
        for d in range(2 * n - 1):
            offsets[b, h, tokens - n + d] = by_distance[d + 3]
        looked_up[0, b, h] = same
        looked_up[1, b, h] = induction
