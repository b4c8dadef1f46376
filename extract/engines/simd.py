"""Vector code for the cpu engine: loops that a compiler does not vectorise by itself, as numba intrinsics.

Each builds LLVM instructions on vectors of `LANES` float32, which LLVM lowers to whatever the processor has. Addresses
are in bytes, strides and counts in floats. Nothing here may be reassociated: a non-finite score must stay one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Concatenate

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.base import BaseContext
from numba.core.registry import cpu_target
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

_target: Any = cpu_target.target_context  # created at first use
_FEATURES = (
    _target.codegen().magic_tuple()[2].split(",")
)  # features of the processor, or those that numba is configured for
# floats in a vector register, rows of a tile and vectors of a row: accumulators fill most of the registers there are.
# No more rows than lanes: `_reduce_vectors` leaves a number for each row in one vector.
LANES = 16 if "+avx512f" in _FEATURES else 8 if "+avx" in _FEATURES else 4
ROWS = {16: 8, 8: 6, 4: 4}[LANES]
TILE = 2 * LANES
# sums that `softmax_row` leaves for each row, in base 2 and relative to the row's largest score and to the query
TOTAL, SURPRISE, SQUARES, AHEAD, AHEAD_SQUARED, APART, BELOW, BELOW_SQUARED = range(8)
SUMS = 8

_FLOAT, _INT, _WORD = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_LANES = ir.VectorType(_FLOAT, LANES)
_INT_LANES = ir.VectorType(_INT, LANES)
# operands of instructions; `ir.Value`, their base class, does not declare a type
_Value = ir.Constant | ir.NamedValue
# 2ᵗ on [−½, ½], exactly 1 at 0, elsewhere within 1e-7 of it (minimax, degree 5)
_EXP2 = (
    1.0,
    0.6931469775856788,
    0.24022242067372143,
    0.055507337576382314,
    0.009671513825825843,
    0.0013264725683280788,
)
_ROUND = 12582912.0  # 1.5·2²³: adding it leaves the nearest integer in the low bits
_LOWEST = -126.0  # smaller powers of two are not normal


class _Vectors:
    """The vector instructions that are used, on one builder."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        # type checkers ignore the decorators of its methods and think they return None
        self.builder: Any = builder

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(_LANES, [value] * LANES)

    def splat(self, scalar: _Value) -> _Value:
        kind = _LANES if scalar.type == _FLOAT else _INT_LANES
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _INT(0))
        return self.builder.shuffle_vector(one, one, ir.Constant(_INT_LANES, [0] * LANES))

    def pointer(self, address: _Value, floats: _Value | int = 0, kind: ir.Type = _LANES) -> _Value:
        if not isinstance(floats, int) or floats:
            offset = _WORD(4 * floats) if isinstance(floats, int) else self.builder.mul(floats, _WORD(4))
            address = self.builder.add(address, offset)
        return self.builder.inttoptr(address, kind.as_pointer())

    def load(self, address: _Value, floats: _Value | int = 0) -> _Value:
        return self.builder.load(self.pointer(address, floats), align=4)

    def load_float(self, address: _Value, floats: _Value | int = 0) -> _Value:
        return self.builder.load(self.pointer(address, floats, _FLOAT), align=4)

    def store(self, value: _Value, address: _Value, floats: _Value | int = 0) -> None:
        self.builder.store(value, self.pointer(address, floats), align=4)

    def shuffle_lanes(self, a: _Value, b: _Value, lanes: Sequence[int]) -> _Value:
        """A selection of the lanes of two vectors."""
        return self.builder.shuffle_vector(a, b, ir.Constant(_INT_LANES, list(lanes)))

    def fma(self, a: _Value, b: _Value, c: _Value) -> _Value:
        kind = ir.FunctionType(_LANES, [_LANES] * 3)
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fma.v{LANES}f32"), (a, b, c)
        )

    def larger(self, a: _Value, b: _Value) -> _Value:
        """The larger of two values; the second if one is NaN, as in the processor's instruction."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def absolute(self, a: _Value) -> _Value:
        bits = self.builder.bitcast(a, _INT_LANES)
        kept = self.builder.and_(bits, ir.Constant(_INT_LANES, [0x7FFFFFFF] * LANES))
        return self.builder.bitcast(kept, _LANES)

    def exp2(self, x: _Value) -> _Value:
        """2ˣ for x ≤ 0; 2⁻¹²⁶ below."""
        b = self.builder
        x = self.larger(x, self.constant(_LOWEST))
        shifted = b.fadd(x, self.constant(_ROUND))
        t = b.fsub(x, b.fsub(shifted, self.constant(_ROUND)))
        power = self.constant(_EXP2[-1])
        for coefficient in reversed(_EXP2[:-1]):
            power = self.fma(power, t, self.constant(coefficient))
        exponent = b.shl(b.bitcast(shifted, _INT_LANES), ir.Constant(_INT_LANES, [23] * LANES))
        return b.bitcast(b.add(b.bitcast(power, _INT_LANES), exponent), _LANES)

    def variable(self, value: _Value) -> _Value:
        """A variable that loops change; LLVM keeps it in a register."""
        place = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, place)
        return place


def _intrinsic(
    arguments: int,
    build: Callable[Concatenate[_Vectors, ...], None],
    *,
    floats: int = 0,
) -> Callable[..., None]:
    """A numba function of so many integers, then floats, from a function that builds its instructions."""
    kinds = (types.intp,) * arguments + (types.float32,) * floats

    def generate(
        context: BaseContext, builder: ir.IRBuilder, _signature: Signature, values: Sequence[_Value]
    ) -> ir.Constant:
        build(_Vectors(builder), *values)
        return context.get_dummy_value()

    # numba reads a function's arguments from its signature
    names = ", ".join(f"a{n}" for n in range(len(kinds)))
    scope: dict[str, Any] = {"signature": types.void(*kinds), "generate": generate}
    exec(f"def {build.__name__}(context, {names}): return signature, generate", scope)
    return intrinsic(scope[build.__name__])


def _tile(v: _Vectors, a: _Value, a_stride: _Value, b: _Value, c: _Value, c_stride: _Value, depth: _Value) -> None:
    zero = v.constant(0.0)
    sums = [[v.variable(zero), v.variable(zero)] for _ in range(ROWS)]
    rows = [v.builder.add(a, v.builder.mul(a_stride, _WORD(4 * r))) for r in range(ROWS)]
    with cgutils.for_range(v.builder, depth) as loop:
        row = v.builder.mul(loop.index, _WORD(TILE))
        columns = [v.load(b, row), v.load(v.builder.add(b, _WORD(4 * LANES)), row)]
        for r in range(ROWS):
            factor = v.splat(v.load_float(rows[r], loop.index))
            for column, place in zip(columns, sums[r], strict=True):
                v.builder.store(v.fma(factor, column, v.builder.load(place)), place)
    for r in range(ROWS):
        out = v.builder.add(c, v.builder.mul(c_stride, _WORD(4 * r)))
        for n, place in enumerate(sums[r]):
            v.store(v.builder.load(place), out, LANES * n)


def _transpose(v: _Vectors, source: _Value, stride: _Value, target: _Value, target_stride: _Value) -> None:
    rows = [v.load(source, v.builder.mul(stride, _WORD(r))) for r in range(LANES)]
    step = 1
    while step < LANES:
        # lanes of b are numbered behind those of a; lanes whose number lacks the step's bit stay, the others change rows
        upper = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        lower = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        for r in range(LANES):
            if not r & step:
                a, b = rows[r], rows[r + step]
                rows[r], rows[r + step] = v.shuffle_lanes(a, b, upper), v.shuffle_lanes(a, b, lower)
        step *= 2
    for r, row in enumerate(rows):
        v.store(row, target, v.builder.mul(target_stride, _WORD(r)))


def _copy(v: _Vectors, source: _Value, target: _Value, count: _Value, scale: _Value) -> None:
    b = v.builder
    scales = v.splat(scale)
    whole = b.and_(count, _WORD(-LANES))
    with cgutils.for_range_slice(b, _WORD(0), whole, _WORD(LANES), intp=_WORD) as (j, _count):
        v.store(b.fmul(v.load(source, j), scales), target, j)
    with cgutils.for_range_slice(b, whole, count, _WORD(1), intp=_WORD) as (j, _count):
        b.store(b.fmul(v.load_float(source, j), scale), v.pointer(target, j, _FLOAT), align=4)


def _over_row(v: _Vectors, low: _Value, high: _Value, visit: Callable[[_Value, _Value | None], None]) -> None:
    """Visit a row's places from low to high, LANES at a time, with a mask of valid lanes in the last visit."""
    b = v.builder
    whole = b.add(low, b.and_(b.sub(high, low), _WORD(-LANES)))
    with cgutils.for_range_slice(b, low, whole, _WORD(LANES), intp=_WORD) as (j, _count):
        visit(j, None)
    with b.if_then(b.icmp_signed("<", whole, high)):
        left = v.splat(b.trunc(b.sub(high, whole), _INT))
        visit(whole, b.icmp_signed("<", ir.Constant(_INT_LANES, list(range(LANES))), left))


def _largest_of_row(v: _Vectors, row: _Value, low: _Value, high: _Value, out: _Value) -> None:
    lowest = v.constant(float("-inf"))
    held = v.variable(lowest)

    def visit(j: _Value, within: _Value | None) -> None:
        s = v.load(row, j)
        s = s if within is None else v.builder.select(within, s, lowest)
        v.builder.store(v.larger(s, v.builder.load(held)), held)

    _over_row(v, low, high, visit)
    v.store(v.builder.load(held), out)


def _softmax_row(
    v: _Vectors, row: _Value, low: _Value, high: _Value, query: _Value, out: _Value, largest: _Value
) -> None:
    b = v.builder
    zero = v.constant(0.0)
    sums = [v.variable(zero) for _ in range(SUMS)]
    top = v.splat(largest)
    lanes = ir.Constant(_LANES, [float(lane) for lane in range(LANES)])
    from_query = v.variable(b.fadd(v.splat(b.sitofp(b.sub(low, query), _FLOAT)), lanes))

    def add(place: int, change: Callable[[_Value], _Value]) -> None:
        b.store(change(b.load(sums[place])), sums[place])

    def visit(j: _Value, within: _Value | None) -> None:
        x = b.fsub(v.load(row, j), top)
        e = v.exp2(x)
        if within is not None:
            x, e = b.select(within, x, zero), b.select(within, e, zero)
        v.store(e, row, j)
        d = b.load(from_query)
        e_d = b.fmul(e, d)
        add(TOTAL, lambda held: b.fadd(held, e))
        add(SURPRISE, lambda held: v.fma(e, x, held))
        add(SQUARES, lambda held: v.fma(e, e, held))
        add(AHEAD, lambda held: b.fadd(held, e_d))
        add(AHEAD_SQUARED, lambda held: v.fma(e_d, d, held))
        add(APART, lambda held: b.fadd(held, v.absolute(e_d)))
        add(BELOW, lambda held: b.fadd(held, x))
        add(BELOW_SQUARED, lambda held: v.fma(x, x, held))
        b.store(b.fadd(d, v.constant(float(LANES))), from_query)

    _over_row(v, low, high, visit)
    for number, place in enumerate(sums):
        v.store(b.load(place), out, number * ROWS * LANES)


def _reduce_vectors(v: _Vectors, vectors: list[_Value], combine: Callable[[_Value, _Value], _Value]) -> _Value:
    """Combine all lanes of vector r into lane r, folding halves of two vectors together at each step."""
    vectors = vectors + [vectors[-1]] * (8 - len(vectors) if len(vectors) > 4 else 0)
    groups, width = 1, LANES
    while width > 1:
        width //= 2
        if len(vectors) == 1:
            folded = [lane ^ width for lane in range(LANES)]
            vectors = [combine(vectors[0], v.shuffle_lanes(vectors[0], vectors[0], folded))]
            continue
        low = [2 * width * group + lane for group in range(2 * groups) for lane in range(width)]
        high = [lane + width for lane in low]
        groups *= 2
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [combine(v.shuffle_lanes(a, b, low), v.shuffle_lanes(a, b, high)) for a, b in pairs]
    every = LANES // groups
    spread = [lane * every if lane < groups else 0 for lane in range(LANES)]
    return v.shuffle_lanes(vectors[0], vectors[0], spread)


def _sums_of_rows(v: _Vectors, lanes: _Value, out: _Value) -> None:
    rows = [v.load(lanes, r * LANES) for r in range(ROWS)]
    v.store(_reduce_vectors(v, rows, v.builder.fadd), out)


def _largest_of_rows(v: _Vectors, lanes: _Value, out: _Value) -> None:
    rows = [v.load(lanes, r * LANES) for r in range(ROWS)]
    v.store(_reduce_vectors(v, rows, v.larger), out)


def _squares_of_rows(v: _Vectors, rows: _Value, stride: _Value, width: _Value, out: _Value) -> None:
    sums = [v.variable(v.constant(0.0)) for _ in range(ROWS)]
    starts = [v.builder.add(rows, v.builder.mul(stride, _WORD(4 * r))) for r in range(ROWS)]
    with cgutils.for_range_slice(v.builder, _WORD(0), width, _WORD(LANES), intp=_WORD) as (j, _count):
        for start, place in zip(starts, sums, strict=True):
            value = v.load(start, j)
            v.builder.store(v.fma(value, value, v.builder.load(place)), place)
    v.store(_reduce_vectors(v, [v.builder.load(place) for place in sums], v.builder.fadd), out)


def _spread(
    v: _Vectors,
    rows: _Value,
    stride: _Value,
    weights: _Value,
    low: _Value,
    high: _Value,
    received: _Value,
    offsets: _Value,
) -> None:
    b = v.builder
    starts = [b.add(rows, b.mul(stride, _WORD(4 * r))) for r in range(ROWS)]
    shares = [v.splat(v.load_float(weights, r)) for r in range(ROWS)]

    def add_up(first: _Value, out: _Value, skew: int) -> None:
        with cgutils.for_range_slice(b, first, high, _WORD(LANES), intp=_WORD) as (j, _count):
            total = v.load(out, j)
            for r, (start, share) in enumerate(zip(starts, shares, strict=True)):
                total = v.fma(v.load(b.add(start, _WORD(4 * r * skew)), j), share, total)
            v.store(total, out, j)

    add_up(low, received, 0)
    add_up(b.sub(low, _WORD(ROWS - 1)), offsets, 1)


# tile(a, a_stride, b, c, c_stride, depth): ROWS rows of a [·, depth] times packed b [depth, TILE], into c [·, TILE]
tile = _intrinsic(6, _tile)
# transpose(source, stride, target, target_stride): LANES rows of LANES floats, turned
transpose = _intrinsic(4, _transpose)
# largest_of_row(row, low, high, lanes): the largest of row[low:high], lane by lane
largest_of_row = _intrinsic(4, _largest_of_row)
# copy(source, target, count, scale): floats side by side, multiplied
copy = _intrinsic(3, _copy, floats=1)
# softmax_row(row, low, high, query, lanes, largest): row[low:high] to 2^(s − largest), zeros behind it up to a
# vector, and the SUMS of them lane by lane, each ROWS vectors after the one before
softmax_row = _intrinsic(5, _softmax_row, floats=1)
# sums_of_rows(lanes, out), largest_of_rows(lanes, out): ROWS vectors, each to one number
sums_of_rows = _intrinsic(2, _sums_of_rows)
largest_of_rows = _intrinsic(2, _largest_of_rows)
# squares_of_rows(rows, stride, width, out): Σ x² of ROWS rows
squares_of_rows = _intrinsic(4, _squares_of_rows)
# spread(rows, stride, weights, low, high, received, offsets): add ROWS weighted rows to received[key], and to offsets
# along their diagonals: place j of row r to offsets[j − r]; rows hold zeros ROWS before low, LANES + ROWS from high on
spread = _intrinsic(7, _spread)
