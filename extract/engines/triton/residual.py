"""Triton kernels for the columns of `residual`: the results of the functions in `tables/residual.py`, on a GPU.

Each site is one launch of `_read_site`, which reads the site's tensors in the model's own type, x' twice and the others once. A
program takes a block of one sequence's tokens. Along the width it first adds up what each token needs (norms, products, moments
of the norm's input), then what needs the norm of x' (fourth powers, and the block's sums over tokens for each dimension). It
writes values of tokens, and two vectors for each block. At the end of a pass, `_reduce` turns them into columns for all sites
at once, in float64. Every sum has one owner and one order: without atomics, the same input gives the same bytes.
"""

# kernels are Triton's language, which only looks like Python to a type checker
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportOptionalOperand=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from attlas.extract.engines.triton.launch import launch
from attlas.extract.engines.visibility import Axis

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = (
    "anisotropy",
    "heads_concat_norm",
    "heads_cosine",
    "heads_mean_norm",
    "kurtosis",
    "max_abs",
    "norm_mean",
    "norm_output_gain",
    "norm_scale",
    "outlier_dim",
    "outlier_ratio",
    "step_cosine",
    "stream_gain",
    "stream_norm",
    "update_cosine",
    "update_norm",
    "update_ratio",
)
MAKES = frozenset(COLUMNS)
# sums over tokens from which the identity x' = x + F is checked: of ‖x' − x − F‖², ‖x'‖², ‖x‖²
IDENTITY = slice(len(COLUMNS), len(COLUMNS) + 3)
(_ANISOTROPY, _HEADS_CONCAT_NORM, _HEADS_COSINE, _HEADS_MEAN_NORM, _KURTOSIS, _MAX_ABS, _NORM_MEAN, _NORM_OUTPUT_GAIN,
 _NORM_SCALE, _OUTLIER_DIM, _OUTLIER_RATIO, _STEP_COSINE, _STREAM_GAIN, _STREAM_NORM, _UPDATE_COSINE, _UPDATE_NORM,
 _UPDATE_RATIO, _OFF, _AFTER, _BEFORE) = (tl.constexpr(row) for row in range(IDENTITY.stop))  # fmt: skip
_ROWS = tl.constexpr(IDENTITY.stop)
# which tensor a norm reads
_NO_NORM, _READS_AFTER, _READS_BEFORE, _READS_OTHER = (tl.constexpr(source) for source in range(4))
_INFINITY_BITS = tl.constexpr(0x7F800000)  # of float32; larger ones are NaN
_NO_DIMENSION = tl.constexpr(2**31 - 1)

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_WIDTH = 256
_TOKENS, _CHUNK = 16, 128  # of a block: tokens, and dimensions read at a time; 64 registers a thread for four tensors
_MEAN_TOKENS, _VECTORS, _DIMENSIONS = 256, 8, 256  # read at a time at the end of a pass: tokens; vectors × dimensions
_WARPS = 4
MAX_BYTES = 64 << 20  # of results that wait for the end of the pass


class SiteTensors(NamedTuple):
    """The tensors of a site, [batch, token, width] unless stated, in the model's own type.

    x' (None if the model does not compute it), x, another update that x includes, F; the norm's input and output; what scales F
    [width]; the contexts [batch, head, token, head_width].
    """

    after: Tensor | None = None
    before: Tensor | None = None
    beside: Tensor | None = None
    update: Tensor | None = None
    read: Tensor | None = None
    wrote: Tensor | None = None
    gain: Tensor | None = None
    contexts: Tensor | None = None


class SiteResults:
    """Results of the sites of one pass whose states have the same axis and width, by the order in which they were measured.

    About `sites` of them are expected: memory is allocated once for all, or for as many as fit in MAX_BYTES.
    """

    def __init__(self, axis: Axis, width: int, device: torch.device, *, sites: int) -> None:
        batch, tokens = len(axis.start), axis.tokens
        self.shape = torch.Size((batch, tokens, width))
        self.axis = axis
        self.measured = 0
        blocks = batch * -(-tokens // _TOKENS)
        self._grid = (blocks, 1, 1)
        self._chunk = min(_CHUNK, max(16, triton.next_power_of_2(width)))
        self._ends = tuple(ends.to(device).contiguous() for ends in (axis.start, axis.length))
        # of a site: values [row, batch, token], then the vectors Σu and max|x'| [2, batch, block, width]; aligned
        self._size = -(-(_ROWS.value * batch * tokens + 2 * blocks * width) // 32) * 32
        places = max(1, min(sites, MAX_BYTES // (4 * self._size)))
        self._waiting = torch.empty(places, self._size, dtype=torch.float32, device=device)
        self._places = self._waiting.unbind()
        self._device = self._waiting.get_device()
        self._used = 0
        self._tables: list[Tensor] = []

    def measure(self, tensors: SiteTensors, *, factor: float = 1.0, kind: str = "", epsilon: float = 0.0) -> bool:
        """Measure a site whose update is F × factor × gain, and whose norm, if it has one, is of this kind.

        False if the kernels do not support its tensors.
        """
        *states, gain, contexts = tensors
        strides = self._common_strides(states)
        if strides is None or not _are_supported(contexts):
            return False
        batch, tokens, width = self.shape
        if not strides:
            states = [None if t is None else t.contiguous() for t in states]
            strides = (tokens * width, width)
        after, before, beside, update, read, wrote = states
        reads = _source_of_norm(read, after, before)
        if reads != _READS_OTHER.value:
            read = None
        heads, head_width, head_strides = 0, 1, (0, 0, 0)
        if contexts is not None:
            contexts = contexts if contexts.stride(3) == 1 else contexts.contiguous()
            _, heads, _, head_width = contexts.shape
            head_strides = contexts.stride()[:3]
        launch(
            _read_site,
            self._grid,
            (after, before, beside, update, read, wrote, gain, contexts, *self._ends, self._places[self._used]),
            (*strides, *head_strides, batch, tokens, heads, float(factor), float(epsilon)),
            (width, head_width, 1 << (head_width - 1).bit_length(), reads, kind == "layer", _TOKENS, self._chunk),
            num_warps=_WARPS,
        )
        self.measured += 1
        self._used += 1
        if self._used == len(self._places):
            self._reduce()
        return True

    def columns(self) -> Tensor:
        """All results so far [site, COLUMNS then IDENTITY, batch], in the order in which sites were measured, in float64."""
        if self._used:
            self._reduce()
        return self._tables[0] if len(self._tables) == 1 else torch.cat(self._tables)

    def _common_strides(self, states: Sequence[Tensor | None]) -> tuple[int, ...] | None:
        """Strides of batch and token, empty if the states differ in them; None if the kernels do not support the states."""
        common: tuple[int, ...] | None = None
        for state in states:
            if state is None:
                continue
            if state.shape != self.shape or state.dtype not in _TYPES or state.get_device() != self._device:
                return None
            strides = state.stride()
            if common is None:
                common = strides if strides[2] == 1 else ()
            elif common != strides:
                common = ()
        return None if common is None else common[:2]

    def _reduce(self) -> None:
        """Turn what waits into columns."""
        batch, tokens, width = self.shape
        table = self._waiting.new_empty(self._used, _ROWS.value, batch, dtype=torch.float64)
        launch(
            _reduce_sites,
            (self._used * batch, _ROWS.value, 1),
            (self._waiting, *self._ends, table),
            (self._size, batch, tokens),
            (width, _TOKENS, _MEAN_TOKENS, _VECTORS, _DIMENSIONS),
            num_warps=_WARPS,
        )
        self._tables.append(table)
        self._used = 0


def _are_supported(contexts: Tensor | None) -> bool:
    if contexts is None:
        return True
    return contexts.dtype in _TYPES and contexts.shape[3] <= _MAX_HEAD_WIDTH


def _source_of_norm(read: Tensor | None, after: Tensor | None, before: Tensor | None) -> int:
    """Which tensor the norm reads: x' and x are read anyway."""
    if read is None:
        return _NO_NORM.value
    if _is_same(read, after):
        return _READS_AFTER.value
    return _READS_BEFORE.value if _is_same(read, before) else _READS_OTHER.value


def _is_same(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors of one shape and the same strides are the same memory."""
    return a is b or (b is not None and a.data_ptr() == b.data_ptr() and a.dtype == b.dtype)


@triton.jit
def _tile(tensor, rows, columns, held):
    """Load rows of a state in float32; 0 where not held."""
    return tl.load(tensor + rows[:, None] + columns[None, :], mask=held, other=0).to(tl.float32)


@triton.jit
def _step(after, before, beside, update, gain, factor, rows, columns, held, WIDTH: tl.constexpr):
    """x', x, F and what was loaded for x; all x' where a site adds nothing, because a kernel's function can't return None."""
    if before is None:
        y = _tile(after, rows, columns, held)
        x, f, loaded = y, y, y
    else:
        loaded = _tile(before, rows, columns, held)
        x = loaded
        if beside is not None:
            x += _tile(beside, rows, columns, held)
        f = _tile(update, rows, columns, held) * factor
        if gain is not None:
            f *= tl.load(gain + columns, mask=columns < WIDTH, other=0).to(tl.float32)[None, :]
        y = _tile(after, rows, columns, held) if after is not None else x + f
    return y, x, f, loaded


@triton.jit
def _magnitude_bits(x):
    """|x| as an integer: in the order of the numbers, NaN above all, which a maximum of floats would drop."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _within_one(cosine):
    """Clip rounding errors beyond ±1; NaN is kept."""
    return tl.where(cosine > 1, 1.0, tl.where(cosine < -1, -1.0, cosine))


@triton.jit
def _put(out, row, rows, held, values):
    """Store one value of each token."""
    tl.store(out + row * rows[0] + rows[1], values, mask=held)


@triton.jit(do_not_specialize=["batch", "tokens", "heads"])
def _read_site(
    after, before, beside, update, read, wrote, gain, contexts, start, length, out,
    batch_stride, token_stride, context_batch, context_head, context_token, batch, tokens, heads, factor, epsilon,
    WIDTH: tl.constexpr, HEAD_WIDTH: tl.constexpr, HEAD_COLUMNS: tl.constexpr, READS: tl.constexpr,
    CENTRED: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Values of one block of tokens, and its sums over tokens for each dimension."""
    blocks = tl.cdiv(tokens, TOKENS)
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first = tl.load(start + b).to(tl.int32)
    last = first + tl.load(length + b).to(tl.int32)
    if (last <= block * TOKENS) | (first >= (block + 1) * TOKENS):
        return
    t = block * TOKENS + tl.arange(0, TOKENS)
    real = (t >= first) & (t < last)
    rows = b.to(tl.int64) * batch_stride + t.to(tl.int64) * token_stride
    put = (batch.to(tl.int64) * tokens, b.to(tl.int64) * tokens + t)

    squares = tl.zeros([TOKENS], tl.float32)
    top = tl.zeros([TOKENS], tl.int32)
    xx = tl.zeros([TOKENS], tl.float32)
    ff = tl.zeros([TOKENS], tl.float32)
    xf = tl.zeros([TOKENS], tl.float32)
    xy = tl.zeros([TOKENS], tl.float32)
    off = tl.zeros([TOKENS], tl.float32)
    mean = tl.zeros([TOKENS], tl.float32)
    spread = tl.zeros([TOKENS], tl.float32)  # Σ (r − mean)², r what the norm reads
    written = tl.zeros([TOKENS], tl.float32)
    for at in range(0, WIDTH, CHUNK):
        columns = at + tl.arange(0, CHUNK)
        held = real[:, None] & (columns < WIDTH)[None, :]
        y, x, f, loaded = _step(after, before, beside, update, gain, factor, rows, columns, held, WIDTH)
        squares += tl.sum(y * y, 1)
        top = tl.maximum(top, tl.max(_magnitude_bits(y), 1))
        if before is not None:
            xx += tl.sum(x * x, 1)
            ff += tl.sum(f * f, 1)
            xf += tl.sum(x * f, 1)
            xy += tl.sum(x * y, 1)
            wrong = y - x - f
            off += tl.sum(wrong * wrong, 1)
        if READS != _NO_NORM:
            if READS == _READS_AFTER:
                r = y
            elif READS == _READS_BEFORE:
                r = loaded
            else:
                r = _tile(read, rows, columns, held)
            w = _tile(wrote, rows, columns, held)
            written += tl.sum(w * w, 1)
            if CENTRED:
                # the moments of two parts, merged without cancellation (Chan, Golub, LeVeque 1979)
                inside = tl.minimum(WIDTH - at, CHUNK) * 1.0
                new = tl.sum(r, 1) / inside
                centred = tl.where(held, r - new[:, None], 0)
                step = new - mean
                mean += step * (inside / (at + inside))
                spread += tl.sum(centred * centred, 1) + step * step * (at * (inside / (at + inside)))
            else:
                spread += tl.sum(r * r, 1)

    norm = tl.sqrt(squares)
    undefined = tl.full([TOKENS], float("nan"), tl.float32)
    if before is not None:
        stream, size = tl.sqrt(xx), tl.sqrt(ff)
        _put(out, _STREAM_NORM, put, real, stream)
        _put(out, _UPDATE_NORM, put, real, size)
        _put(out, _UPDATE_RATIO, put, real, size / stream)
        _put(out, _UPDATE_COSINE, put, real, _within_one(xf / (stream * size)))
        _put(out, _STEP_COSINE, put, real, _within_one(xy / (stream * norm)))
        _put(out, _STREAM_GAIN, put, real, norm / stream)
        _put(out, _OFF, put, real, off)
        _put(out, _AFTER, put, real, squares)
        _put(out, _BEFORE, put, real, xx)
    else:
        _put(out, _STREAM_NORM, put, real, norm)
        _put(out, _UPDATE_NORM, put, real, undefined)
        _put(out, _UPDATE_RATIO, put, real, undefined)
        _put(out, _UPDATE_COSINE, put, real, undefined)
        _put(out, _STEP_COSINE, put, real, undefined)
        _put(out, _STREAM_GAIN, put, real, undefined)
        _put(out, _OFF, put, real, undefined)
        _put(out, _AFTER, put, real, undefined)
        _put(out, _BEFORE, put, real, undefined)
    if READS != _NO_NORM:
        scale = tl.sqrt(spread / WIDTH + epsilon)
        _put(out, _NORM_SCALE, put, real, scale)
        _put(out, _NORM_OUTPUT_GAIN, put, real, tl.sqrt(written) * scale / tl.sqrt(spread))
        _put(out, _NORM_MEAN, put, real, mean if CENTRED else undefined)
    else:
        _put(out, _NORM_SCALE, put, real, undefined)
        _put(out, _NORM_OUTPUT_GAIN, put, real, undefined)
        _put(out, _NORM_MEAN, put, real, undefined)
    largest = top.to(tl.float32, bitcast=True)
    _put(out, _OUTLIER_RATIO, put, real, largest * tl.sqrt(WIDTH * 1.0) / norm)
    if contexts is not None:
        of_token = b.to(tl.int64) * context_batch + t.to(tl.int64) * context_token
        _compare_heads(contexts, of_token, context_head, heads, out, put, real, HEAD_WIDTH, HEAD_COLUMNS)
    else:
        _put(out, _HEADS_CONCAT_NORM, put, real, undefined)
        _put(out, _HEADS_MEAN_NORM, put, real, undefined)
        _put(out, _HEADS_COSINE, put, real, undefined)

    # what needs the norm of x', which is read again
    per = 1 / norm
    fourths = tl.zeros([TOKENS], tl.float32)
    vectors = out + _ROWS * put[0] + (b.to(tl.int64) * blocks + block) * WIDTH
    of_largest = batch.to(tl.int64) * blocks * WIDTH
    for at in range(0, WIDTH, CHUNK):
        columns = at + tl.arange(0, CHUNK)
        inside = columns < WIDTH
        held = real[:, None] & inside[None, :]
        y, x, f, loaded = _step(after, before, beside, update, gain, factor, rows, columns, held, WIDTH)
        u = tl.where(held, y * per[:, None], 0)
        fourths += tl.sum(u * u * (u * u), 1)
        tl.store(vectors + columns, tl.sum(u, 0), mask=inside)
        tops = tl.max(_magnitude_bits(y), 0).to(tl.float32, bitcast=True)
        tl.store(vectors + of_largest + columns, tops, mask=inside)
    _put(out, _KURTOSIS, put, real, fourths * WIDTH)


@triton.jit
def _compare_heads(
    contexts, of_token, head_stride, heads, out, put, real, HEAD_WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """How large the heads' contexts are side by side and on average, and how alike."""
    columns = tl.arange(0, COLUMNS)
    held = real[:, None] & (columns < HEAD_WIDTH)[None, :]
    concat = tl.zeros([of_token.shape[0]], tl.float32)
    added = tl.zeros([of_token.shape[0], COLUMNS], tl.float32)
    units = tl.zeros([of_token.shape[0], COLUMNS], tl.float32)
    for h in range(heads):
        c = _tile(contexts, of_token + h * head_stride, columns, held)
        squares = tl.sum(c * c, 1)
        concat += squares
        added += c
        units += tl.where(held, c * (1 / tl.sqrt(squares))[:, None], 0)
    number = heads * 1.0
    alike = (tl.sum(units * units, 1) - number) / (number * (number - 1))
    _put(out, _HEADS_CONCAT_NORM, put, real, tl.sqrt(concat))
    _put(out, _HEADS_MEAN_NORM, put, real, tl.sqrt(tl.sum(added * added, 1)) / number)
    _put(out, _HEADS_COSINE, put, real, tl.where(number > 1, alike, float("nan")))


@triton.jit(do_not_specialize=["batch", "tokens"])
def _reduce_sites(
    waiting, start, length, table, size, batch, tokens,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, MEAN_TOKENS: tl.constexpr, VECTORS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
):  # fmt: skip
    """One row of the columns of one sequence at one site; the first row's program also gives the rows of single dimensions."""
    item, row = tl.program_id(0), tl.program_id(1)
    site, b = item // batch, item % batch
    first = tl.load(start + b).to(tl.int32)
    last = first + tl.load(length + b).to(tl.int32)
    of_site = waiting + site.to(tl.int64) * size
    result = table + (site * _ROWS) * batch + b
    if row == _ANISOTROPY:
        blocks = tl.cdiv(tokens, TOKENS)
        vectors = of_site + (batch.to(tl.int64) * tokens) * _ROWS + b.to(tl.int64) * blocks * WIDTH
        of_largest = batch.to(tl.int64) * blocks * WIDTH
        _reduce_vectors(vectors, of_largest, first, last, result, batch, WIDTH, TOKENS, VECTORS, DIMENSIONS)
    elif (row != _MAX_ABS) & (row != _OUTLIER_DIM):
        values = of_site + (row.to(tl.int64) * batch + b) * tokens
        _reduce_tokens(values, first, last, result + row * batch, row >= _OFF, MEAN_TOKENS)


@triton.jit
def _reduce_tokens(values, first, last, result, is_sum, TOKENS: tl.constexpr):
    """Mean over the tokens where a value is defined, or the sum over all."""
    total = tl.zeros([TOKENS], tl.float64)
    count = tl.zeros([TOKENS], tl.float64)
    for at in range(first, last, TOKENS):
        t = at + tl.arange(0, TOKENS)
        value = tl.load(values + t, mask=t < last, other=float("nan"))
        defined = _magnitude_bits(value) < _INFINITY_BITS
        total += tl.where((t < last) & (defined | is_sum), value, 0).to(tl.float64)
        count += defined.to(tl.float64)
    mean = tl.sum(total, 0) / tl.sum(count, 0)
    tl.store(result, tl.where(is_sum, tl.sum(total, 0), mean))


@triton.jit
def _reduce_vectors(
    vectors, of_largest, first, last, result, batch,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, VECTORS: tl.constexpr, DIMENSIONS: tl.constexpr,
):  # fmt: skip
    """Anisotropy, and the largest |x'| with its dimension."""
    squares = tl.zeros([DIMENSIONS], tl.float64)
    top = tl.zeros([DIMENSIONS], tl.int32)
    dimension = tl.zeros([DIMENSIONS], tl.int32)
    end = tl.cdiv(last, TOKENS)
    for at in range(0, WIDTH, DIMENSIONS):
        columns = at + tl.arange(0, DIMENSIONS)
        units = tl.zeros([VECTORS, DIMENSIONS], tl.float64)
        largest = tl.zeros([VECTORS, DIMENSIONS], tl.int32)
        for begin in range(first // TOKENS, end, VECTORS):
            block = begin + tl.arange(0, VECTORS)
            held = (block < end)[:, None] & (columns < WIDTH)[None, :]
            places = vectors + block.to(tl.int64)[:, None] * WIDTH + columns[None, :]
            units += tl.load(places, mask=held, other=0).to(tl.float64)
            largest = tl.maximum(largest, _magnitude_bits(tl.load(places + of_largest, mask=held, other=0)))
        total = tl.sum(units, 0)
        squares += total * total
        tops = tl.max(largest, 0)
        dimension = tl.where(tops > top, columns, dimension)
        top = tl.maximum(top, tops)
    n = (last - first).to(tl.float64)
    pairs = n * (n - 1)
    tl.store(result + _ANISOTROPY * batch, (tl.sum(squares, 0) - n) / tl.where(pairs > 0, pairs, float("nan")))
    # lanes hold the first dimension of their maximum, of which the lowest counts; NaN equals nothing, as in torch
    highest = tl.max(top, 0)
    lowest = tl.min(tl.where(top == highest, dimension, _NO_DIMENSION), 0)
    lowest = tl.where(highest > _INFINITY_BITS, 0, lowest)
    tl.store(result + _MAX_ABS * batch, highest.to(tl.float32, bitcast=True).to(tl.float64))
    tl.store(result + _OUTLIER_DIM * batch, lowest.to(tl.float64))
