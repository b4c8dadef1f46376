"""Triton kernels for the columns of `residual`: the results of the functions in `tables/residual.py`, on a GPU.

Each site is one launch of `_read_site`, which reads the site's tensors in the model's own type, x' twice and the others once. A
program takes a block of one sequence's tokens. Along the width it first adds up what each token needs (norms, products, moments
of the norm's input), then what needs the norm of x' (the block's sum of unit vectors). Threads add up their own elements; what
crosses threads is reduced after a loop. It writes values of tokens, and one vector for each block. At the end of a pass,
`_reduce` turns them into columns for all sites at once, in float64. Every sum has one owner and one order: without atomics, the
same input gives the same bytes.
"""

# kernels are Triton's language, which only looks like Python to a type checker
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportOptionalOperand=false, reportAttributeAccessIssue=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from attlas.extract.engines.stream_profiles import count_squares
from attlas.extract.engines.triton.launch import launch, power_of_2_from
from attlas.extract.engines.triton.states import ELEMENTS, TYPES, grouped, tile
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
_GROUP = tl.constexpr(8)  # rows that are stored side by side for each token, one by each of its threads
_GROUPS = tl.constexpr(-(-IDENTITY.stop // 8))
# which tensor a norm reads
_NO_NORM, _READS_AFTER, _READS_BEFORE, _READS_OTHER = (tl.constexpr(source) for source in range(4))
_INFINITY_BITS = tl.constexpr(0x7F800000)  # of float32; larger ones are NaN
_NO_DIMENSION = tl.constexpr(2**31 - 1)
_LARGEST_SCALE = tl.constexpr(2.0**60)  # of squares, before they are squared

_MAX_HEAD_WIDTH = 256
_TOKENS, _WARPS = 32, 8  # of a block
_CHUNK = 64  # dimensions of the block's tokens read at a time: as many elements as its threads read
_UNIT_COLUMNS = 2048  # dimensions of unit vectors added up at a time, at most
# read at a time at the end of a pass, of short sequences and of long ones: tokens; vectors × dimensions; warps
_SHORT, _LONG = (128, 8, 256, 4), (512, 32, 64, 8)
_LONG_SEQUENCE = 1024  # tokens
MAX_BYTES = 72 << 20  # of results that wait for the end of the pass


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

    About `sites` of them are expected: memory is allocated once for all, or for as many as fit in MAX_BYTES. With
    `counts_norms`, tokens are counted by the norms of their states.
    """

    def __init__(self, axis: Axis, width: int, device: torch.device, *, sites: int, counts_norms: bool = False) -> None:
        batch, tokens = len(axis.start), axis.tokens
        self.shape = torch.Size((batch, tokens, width))
        self.axis = axis
        self.measured = 0
        blocks = batch * -(-tokens // _TOKENS)
        self._grid = (blocks, 1, 1)
        self._tiles = _tiles(width)
        self._ends = tuple(ends.to(device).contiguous() for ends in (axis.start, axis.length))
        # of a site: Σu [batch, block, width]; max|x'| and its dimension [2, batch, block]; 1/‖x'‖ [batch, block, token],
        # only used by `_read_site`; values [group, batch, token, row]. Aligned
        values = _GROUPS.value * _GROUP.value * batch * tokens
        self._size = -(-(blocks * (width + 2 + _TOKENS) + values) // 32) * 32
        places = max(1, min(sites, MAX_BYTES // (4 * self._size)))
        places = -(-sites // -(-sites // places))  # as few for the same number of reductions
        self._waiting = torch.empty(places, self._size, dtype=torch.float32, device=device)
        self._places = self._waiting.unbind()
        self._device = self._waiting.get_device()
        self._used = 0
        self._tables: list[Tensor] = []
        self._counts: list[Tensor] | None = [] if counts_norms else None

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
        is_plain = after is not None and beside is None and gain is None and read is None
        heads, head_width, head_strides = 0, 1, (0, 0, 0)
        if contexts is not None:
            contexts = contexts if contexts.stride(3) == 1 else contexts.contiguous()
            _, heads, _, head_width = contexts.shape
            head_strides = contexts.stride()[:3]
        launch(
            _read_site,
            self._grid,
            (after, before, beside, update, read, wrote, gain, contexts, *self._ends, self._places[self._used]),
            (*strides, *head_strides, batch, tokens, None if factor == 1 else float(factor), float(epsilon)),
            (
                width,
                heads,
                head_width,
                power_of_2_from(head_width),
                reads,
                kind == "layer",
                _TOKENS,
                *self._tiles,
            ),
            num_warps=_WARPS,
            maxnreg=_registers((after, before, update, wrote, contexts), head_width, width, is_plain=is_plain),
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

    def norm_counts(self) -> Tensor:
        """How many tokens are in each bin of `TOKEN_NORM` [site, bin], once `columns` was called."""
        assert self._counts is not None, "they were asked for"
        return self._counts[0] if len(self._counts) == 1 else torch.cat(self._counts)

    def _count_norms(self) -> Tensor:
        """The same of the sites that wait; without waiting for the device."""
        batch, tokens, width = self.shape
        begin = self._grid[0] * (width + 2 + _TOKENS)
        values = self._waiting[: self._used, begin : begin + _GROUPS.value * batch * tokens * _GROUP.value]
        of_groups = values.view(self._used, _GROUPS.value, batch * tokens, _GROUP.value)
        group, row = divmod(_AFTER.value, _GROUP.value)
        squares = of_groups[:, group, :, row].double().where(self.axis.real.flatten().to(self._waiting.device), 0)
        return count_squares(squares)

    def _common_strides(self, states: Sequence[Tensor | None]) -> tuple[int, ...] | None:
        """Strides of batch and token, empty if the states differ in them; None if the kernels do not support the states."""
        common: tuple[int, ...] | None = None
        for state in states:
            if state is None:
                continue
            if state.shape != self.shape or state.dtype not in TYPES or state.get_device() != self._device:
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
        mean_tokens, vectors, dimensions, warps = _LONG if tokens > _LONG_SEQUENCE else _SHORT
        parts = -(-width // dimensions)
        squares = table.new_empty(self._used * batch, parts)
        launch(
            _reduce_sites,
            (self._used * batch, _GROUPS.value + 1 + parts, 1),
            (self._waiting, *self._ends, table, squares),
            (self._size, batch, tokens),
            (width, _TOKENS, mean_tokens, vectors, dimensions),
            num_warps=warps,
        )
        launch(
            _compare_tokens,
            (self._used * batch, 1, 1),
            (squares, self._ends[1], table),
            (batch,),
            (parts, power_of_2_from(parts)),
            num_warps=1,
        )
        self._tables.append(table)
        if self._counts is not None:
            self._counts.append(self._count_norms())
        self._used = 0


def _registers(tensors: Sequence[Tensor | None], head_width: int, width: int, *, is_plain: bool) -> int:
    """Registers of a thread, so that four blocks fit on a multiprocessor, two or one, and none keeps values in memory."""
    if width % ELEMENTS.value or head_width > 128:
        return 255
    is_half = all(tensor is None or tensor.element_size() == 2 for tensor in tensors)
    return 64 if is_half and is_plain and width % _CHUNK == 0 and head_width <= 64 else 128


def _tiles(width: int) -> tuple[int, int, int]:
    """Dimensions that all tokens of a block are read in; tokens and dimensions in which unit vectors are added up.

    Powers of two that divide the width, where one does, so that nothing is masked.
    """
    fits = max(16, power_of_2_from(width))
    divides = width & -width
    columns = min(_UNIT_COLUMNS, divides if divides >= _CHUNK else fits)
    elements = ELEMENTS.value if columns >= 1024 else ELEMENTS.value // 2  # wide loads, or fewer sums across threads
    return min(_CHUNK, fits), min(_TOKENS, max(1, 32 * _WARPS * elements // columns)), columns


def _are_supported(contexts: Tensor | None) -> bool:
    if contexts is None:
        return True
    return contexts.dtype in TYPES and contexts.shape[3] <= _MAX_HEAD_WIDTH


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
def _step(after, before, beside, update, gain, factor, rows, columns, WIDTH: tl.constexpr):
    """x', x, F and what was loaded for x; all x' where a site adds nothing, because a kernel's function can't return None."""
    if before is None:
        y = tile(after, rows, columns, WIDTH)
        x, f, loaded = y, y, y
    else:
        loaded = tile(before, rows, columns, WIDTH)
        x = loaded
        if beside is not None:
            x += tile(beside, rows, columns, WIDTH)
        f = tile(update, rows, columns, WIDTH)
        if factor is not None:
            f *= factor
        if gain is not None:
            f *= tl.load(gain + columns, mask=columns < WIDTH, other=0).to(tl.float32)[None, :]
        y = tile(after, rows, columns, WIDTH) if after is not None else x + f
    return y, x, f, loaded


@triton.jit
def _norm_input(read, y, loaded, rows, columns, WIDTH: tl.constexpr, READS: tl.constexpr):
    """What the norm reads."""
    if READS == _READS_AFTER:
        r = y
    elif READS == _READS_BEFORE:
        r = loaded
    else:
        r = tile(read, rows, columns, WIDTH)
    return r


@triton.jit
def _within(values, columns, WIDTH: tl.constexpr):
    """Values where there are columns; 0 beyond the width."""
    if ((columns.shape[0] - 1) & WIDTH) == 0:
        return values
    return tl.where((columns < WIDTH)[None, :], values, 0)


@triton.jit
def _magnitude_bits(x):
    """|x| as an integer: in the order of the numbers, NaN above all, which a maximum of floats would drop."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _larger(largest, x):
    """The larger magnitude, or NaN."""
    return tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _within_one(cosine):
    """Clip rounding errors beyond ±1; NaN is kept."""
    return tl.where(cosine > 1, 1.0, tl.where(cosine < -1, -1.0, cosine))


@triton.jit
def _with_row(group, row, values):
    """A group of rows [token, row] with one of them set."""
    rows = tl.arange(0, _GROUP)
    return tl.where((rows == row % _GROUP)[None, :], values[:, None], group)


@triton.jit(do_not_specialize=["batch", "tokens"])
def _read_site(
    after, before, beside, update, read, wrote, gain, contexts, start, length, out,
    batch_stride, token_stride, context_batch, context_head, context_token, batch, tokens, factor, epsilon,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr, HEAD_COLUMNS: tl.constexpr,
    READS: tl.constexpr, CENTRED: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    UNIT_TOKENS: tl.constexpr, UNIT_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Values of one block of tokens, and its sums over tokens for each dimension."""
    blocks = tl.cdiv(tokens, TOKENS)
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first = tl.load(start + b).to(tl.int32)
    last = first + tl.load(length + b).to(tl.int32)
    first = tl.maximum(first, block * TOKENS)
    last = tl.minimum(last, (block + 1) * TOKENS)
    if first >= last:
        return
    t = block * TOKENS + tl.arange(0, TOKENS)
    real = (t >= first) & (t < last)
    # in place of padding, a real token of the block is read, and nothing of it is kept
    near = tl.minimum(tl.maximum(t, first), last - 1).to(tl.int64)
    rows = b.to(tl.int64) * batch_stride + near * token_stride
    number_of_vectors = batch.to(tl.int64) * blocks

    # the first dimensions tell about where the norm's input lies, and how large x' is
    columns = tl.arange(0, CHUNK)
    y, x, f, loaded = _step(after, before, beside, update, gain, factor, rows, columns, WIDTH)
    inside: tl.constexpr = CHUNK if CHUNK < WIDTH else WIDTH
    size = tl.sum(y * y, 1) / inside
    scale = tl.where(size > 0, tl.minimum(1 / size, _LARGEST_SCALE), 1.0)
    scale = tl.where(size == size, scale, size)
    near_mean = tl.zeros([TOKENS], tl.float32)
    if (READS != _NO_NORM) & CENTRED:
        near_mean = tl.sum(_norm_input(read, y, loaded, rows, columns, WIDTH, READS), 1) / inside

    squares = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    fourths = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    xx = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    ff = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    xf = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    xy = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    off = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    moved = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)  # Σ (r − near_mean), r what the norm reads
    spread = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)  # Σ (r − near_mean)²
    written = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    largest = tl.zeros([TOKENS, CHUNK], tl.float32)
    for at in range(0, WIDTH, CHUNK):
        columns = at + tl.arange(0, CHUNK)
        y, x, f, loaded = _step(after, before, beside, update, gain, factor, rows, columns, WIDTH)
        square = y * y
        scaled = square * scale[:, None]
        squares += grouped(square)
        fourths += grouped(scaled * scaled)
        largest = _larger(largest, y)
        if before is not None:
            xx += grouped(x * x)
            ff += grouped(f * f)
            xf += grouped(x * f)
            xy += grouped(x * y)
            wrong = y - x - f
            off += grouped(wrong * wrong)
        if READS != _NO_NORM:
            r = _norm_input(read, y, loaded, rows, columns, WIDTH, READS)
            w = tile(wrote, rows, columns, WIDTH)
            written += grouped(w * w)
            if CENTRED:
                r = _within(r - near_mean[:, None], columns, WIDTH)
                moved += grouped(r)
            spread += grouped(r * r)

    length_squared = tl.sum(squares, 1)
    norm = tl.sqrt(length_squared)
    # rows that stay NaN are undefined, or do not come from here; each must be in the group of its number
    group_0 = tl.full([TOKENS, _GROUP], float("nan"), tl.float32)
    group_1, group_2 = group_0, group_0
    group_2 = _with_row(group_2, _AFTER, length_squared)
    if before is not None:
        stream_squared = tl.sum(xx, 1)
        stream, change = tl.sqrt(stream_squared), tl.sqrt(tl.sum(ff, 1))
        group_1 = _with_row(group_1, _STREAM_NORM, stream)
        group_1 = _with_row(group_1, _UPDATE_NORM, change)
        group_2 = _with_row(group_2, _UPDATE_RATIO, change / stream)
        group_1 = _with_row(group_1, _UPDATE_COSINE, _within_one(tl.sum(xf, 1) / (stream * change)))
        group_1 = _with_row(group_1, _STEP_COSINE, _within_one(tl.sum(xy, 1) / (stream * norm)))
        group_1 = _with_row(group_1, _STREAM_GAIN, norm / stream)
        group_2 = _with_row(group_2, _OFF, tl.sum(off, 1))
        group_2 = _with_row(group_2, _BEFORE, stream_squared)
    else:
        group_1 = _with_row(group_1, _STREAM_NORM, norm)
    if READS != _NO_NORM:
        centred = tl.sum(spread, 1)
        if CENTRED:
            step = tl.sum(moved, 1)
            # no loss of digits: the first dimensions alone spread by their distance from the mean
            centred -= step * (step / WIDTH)
            centred = tl.where(centred < 0, 0.0, centred)
            group_0 = _with_row(group_0, _NORM_MEAN, near_mean + step / WIDTH)
        divisor = tl.sqrt(centred / WIDTH + epsilon)
        group_1 = _with_row(group_1, _NORM_SCALE, divisor)
        gained = tl.sqrt(tl.sum(written, 1)) * divisor / tl.sqrt(centred)
        group_0 = _with_row(group_0, _NORM_OUTPUT_GAIN, gained)
    top = tl.max(_magnitude_bits(largest), 1).to(tl.float32, bitcast=True)
    group_1 = _with_row(group_1, _OUTLIER_RATIO, top * tl.sqrt(WIDTH * 1.0) / norm)
    scaled_squared = length_squared * scale
    group_0 = _with_row(group_0, _KURTOSIS, tl.sum(fourths, 1) / scaled_squared / scaled_squared * WIDTH)
    if contexts is not None:
        of_token = b.to(tl.int64) * context_batch + near * context_token
        concat, average, alike = _compare_heads(contexts, of_token, context_head, HEADS, HEAD_WIDTH, HEAD_COLUMNS)
        group_0 = _with_row(group_0, _HEADS_CONCAT_NORM, concat)
        group_0 = _with_row(group_0, _HEADS_MEAN_NORM, average)
        group_0 = _with_row(group_0, _HEADS_COSINE, alike)
    group_size = batch.to(tl.int64) * tokens * _GROUP
    of_tokens = b.to(tl.int64) * tokens + t
    places = of_tokens[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    places += number_of_vectors * (WIDTH + 2 + TOKENS)
    tl.store(out + places, group_0, mask=real[:, None])
    tl.store(out + group_size + places, group_1, mask=real[:, None])
    tl.store(out + 2 * group_size + places, group_2, mask=real[:, None])

    # what needs the norm of x', which is read again; by other threads than those that have the norms
    vector = b.to(tl.int64) * blocks + block
    weights = out + number_of_vectors * (WIDTH + 2) + vector * TOKENS
    tl.store(weights + tl.arange(0, TOKENS), tl.where(real, 1 / norm, 0))
    tl.debug_barrier()
    top_bits = tl.zeros([UNIT_TOKENS, UNIT_COLUMNS], tl.int32)
    dimension = tl.zeros([UNIT_TOKENS, UNIT_COLUMNS], tl.int32)
    for at in range(0, WIDTH, UNIT_COLUMNS):
        unit_columns = at + tl.arange(0, UNIT_COLUMNS)
        units = tl.zeros([UNIT_TOKENS, UNIT_COLUMNS], tl.float32)
        tops = tl.zeros([UNIT_TOKENS, UNIT_COLUMNS], tl.float32)
        for begin in tl.range(0, TOKENS, UNIT_TOKENS, loop_unroll_factor=4):
            place = begin + tl.arange(0, UNIT_TOKENS)
            unit_near = tl.minimum(tl.maximum(block * TOKENS + place, first), last - 1).to(tl.int64)
            unit_rows = b.to(tl.int64) * batch_stride + unit_near * token_stride
            z, _, _, _ = _step(after, before, beside, update, gain, factor, unit_rows, unit_columns, WIDTH)
            units += z * tl.load(weights + place)[:, None]
            tops = _larger(tops, z)
        sums = out + vector * WIDTH + unit_columns
        if ((UNIT_COLUMNS - 1) & WIDTH) == 0:
            tl.store(sums, tl.sum(units, 0))
        else:
            tl.store(sums, tl.sum(units, 0), mask=unit_columns < WIDTH)
        bits = _magnitude_bits(tops)
        dimension = tl.where(bits > top_bits, unit_columns[None, :], dimension)
        top_bits = tl.maximum(top_bits, bits)
    # lanes hold the first dimension of their maximum, of which the lowest counts
    highest, lowest = _first_maximum(tl.ravel(top_bits), tl.ravel(dimension))
    tl.store(out + number_of_vectors * WIDTH + vector, highest.to(tl.float32, bitcast=True))
    tl.store(out + number_of_vectors * (WIDTH + 1) + vector, lowest.to(tl.float32, bitcast=True))


@triton.jit
def _first_maximum(tops, dimensions):
    """The maximum of magnitudes as bits, and the lowest of the dimensions that have it."""
    highest = tl.max(tops, 0)
    return highest, tl.min(tl.where(tops == highest, dimensions, _NO_DIMENSION), 0)


@triton.jit
def _compare_heads(
    contexts, of_token, head_stride, HEADS: tl.constexpr, HEAD_WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """How large the heads' contexts are side by side and on average, and how alike."""
    columns = tl.arange(0, COLUMNS)
    concat = tl.zeros([of_token.shape[0]], tl.float32)
    added = tl.zeros([of_token.shape[0], COLUMNS], tl.float32)
    units = tl.zeros([of_token.shape[0], COLUMNS], tl.float32)
    at_once: tl.constexpr = 4 if COLUMNS <= 64 else 1
    for h in tl.range(0, HEADS, loop_unroll_factor=at_once):
        c = tile(contexts, of_token + h * head_stride, columns, HEAD_WIDTH)
        squares = tl.sum(c * c, 1)
        concat += squares
        added += c
        units += _within(c * (1 / tl.sqrt(squares))[:, None], columns, HEAD_WIDTH)
    number = HEADS * 1.0
    average = tl.sqrt(tl.sum(added * added, 1)) / number
    if HEADS > 1:
        alike = (tl.sum(units * units, 1) - number) / (number * (number - 1))
    else:
        alike = tl.full([of_token.shape[0]], float("nan"), tl.float32)
    return tl.sqrt(concat), average, alike


@triton.jit(do_not_specialize=["batch", "tokens"])
def _reduce_sites(
    waiting, start, length, table, squares, size, batch, tokens,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, MEAN_TOKENS: tl.constexpr, VECTORS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
):  # fmt: skip
    """Of one sequence at one site: a group of rows of the columns, or the largest |x'|, or ‖Σu‖² over some dimensions."""
    item, task = tl.program_id(0), tl.program_id(1)
    site, b = item // batch, item % batch
    first = tl.load(start + b).to(tl.int32)
    last = first + tl.load(length + b).to(tl.int32)
    begin = first // TOKENS
    end = tl.where(first < last, tl.cdiv(last, TOKENS), begin)
    blocks = tl.cdiv(tokens, TOKENS)
    number_of_vectors = batch.to(tl.int64) * blocks
    vector = b.to(tl.int64) * blocks
    of_site = waiting + site.to(tl.int64) * size
    result = table + (site * _ROWS) * batch + b
    if task < _GROUPS:
        of_sequence = (task.to(tl.int64) * batch + b) * tokens * _GROUP
        values = of_site + number_of_vectors * (WIDTH + 2 + TOKENS) + of_sequence
        _reduce_tokens(values, first, last, task * _GROUP, result, batch, MEAN_TOKENS)
    elif task == _GROUPS:
        tops = of_site + number_of_vectors * WIDTH + vector
        _reduce_largest(tops, number_of_vectors, begin, end, result, batch, MEAN_TOKENS)
    else:
        part = task - _GROUPS - 1
        total = _reduce_vectors(of_site + vector * WIDTH, begin, end, part, WIDTH, VECTORS, DIMENSIONS)
        tl.store(squares + item * tl.cdiv(WIDTH, DIMENSIONS) + part, total)


@triton.jit
def _reduce_tokens(values, first, last, first_row, result, batch, TOKENS: tl.constexpr):
    """Means over the tokens where a value is defined, or sums over all, of a group of rows."""
    rows = tl.arange(0, _GROUP)
    row = first_row + rows
    is_sum = row >= _OFF
    total = tl.zeros([TOKENS, _GROUP], tl.float64)
    count = tl.zeros([TOKENS, _GROUP], tl.int32)
    for at in range(first, last, TOKENS):
        t = at + tl.arange(0, TOKENS)
        real = (t < last)[:, None]
        value = tl.load(values + t[:, None] * _GROUP + rows[None, :], mask=real, other=float("nan"))
        defined = _magnitude_bits(value) < _INFINITY_BITS
        total += tl.where(real & (defined | is_sum[None, :]), value, 0).to(tl.float64)
        count += defined.to(tl.int32)
    sums = tl.sum(total, 0)
    reduced = tl.where(is_sum, sums, sums / tl.sum(count, 0).to(tl.float64))
    made_here = (row < _ROWS) & (row != _ANISOTROPY) & (row != _MAX_ABS) & (row != _OUTLIER_DIM)
    tl.store(result + row * batch, reduced, mask=made_here)


@triton.jit
def _reduce_largest(tops, to_dimensions, begin, end, result, batch, BLOCKS: tl.constexpr):
    """The largest |x'| with its dimension, from those of the blocks."""
    top = tl.zeros([BLOCKS], tl.int32)
    dimension = tl.full([BLOCKS], _NO_DIMENSION, tl.int32)
    for at in range(begin, end, BLOCKS):
        block = at + tl.arange(0, BLOCKS)
        tops_of_blocks = _magnitude_bits(tl.load(tops + block, mask=block < end, other=0))
        dimensions = tl.load(tops + to_dimensions + block, mask=block < end, other=0).to(tl.int32, bitcast=True)
        dimensions = tl.where(block < end, dimensions, _NO_DIMENSION)
        is_first = (tops_of_blocks > top) | ((tops_of_blocks == top) & (dimensions < dimension))
        dimension = tl.where(is_first, dimensions, dimension)
        top = tl.maximum(top, tops_of_blocks)
    highest, lowest = _first_maximum(top, dimension)
    # NaN equals nothing, as in torch
    lowest = tl.where((highest > _INFINITY_BITS) | (begin == end), 0, lowest)
    tl.store(result + _MAX_ABS * batch, highest.to(tl.float32, bitcast=True).to(tl.float64))
    tl.store(result + _OUTLIER_DIM * batch, lowest.to(tl.float64))


@triton.jit
def _reduce_vectors(vectors, begin, end, part, WIDTH: tl.constexpr, VECTORS: tl.constexpr, DIMENSIONS: tl.constexpr):
    """‖Σu‖² over one part of the dimensions."""
    columns = part * DIMENSIONS + tl.arange(0, DIMENSIONS)
    units = tl.zeros([VECTORS, DIMENSIONS], tl.float64)
    for at in range(begin, end, VECTORS):
        block = at + tl.arange(0, VECTORS)
        held = (block < end)[:, None] & (columns < WIDTH)[None, :]
        units += tl.load(vectors + block.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=held, other=0).to(
            tl.float64
        )
    total = tl.sum(units, 0)
    return tl.sum(total * total, 0)


@triton.jit(do_not_specialize=["batch"])
def _compare_tokens(squares, length, table, batch, PARTS: tl.constexpr, PLACES: tl.constexpr):
    """Anisotropy of one sequence at one site, from the parts of ‖Σu‖²."""
    item = tl.program_id(0)
    site, b = item // batch, item % batch
    part = tl.arange(0, PLACES)
    total = tl.sum(tl.load(squares + item * PARTS + part, mask=part < PARTS, other=0), 0)
    n = tl.load(length + b).to(tl.float64)
    pairs = n * (n - 1)
    result = (total - n) / tl.where(pairs > 0, pairs, float("nan"))
    tl.store(table + (site * _ROWS + _ANISOTROPY) * batch + b, result)
