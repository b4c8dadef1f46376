"""Compiled columns of `residual`: the results of the functions in `tables/residual.py`, reading each state once.

Where the stream's norm is torch's own, the same pass makes the norm's output, since all that it needs is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64
from numba import boolean, float32, float64, int64, njit, prange, types
from torch import Tensor

from attlas.extract.engines.compiled import FAST, kernel, places
from attlas.extract.engines.observations import NormObservation
from attlas.extract.engines.stream_profiles import TOKEN_NORM
from attlas.extract.engines.visibility import Axis

# tokens per piece of a sequence; sums are added up by pieces, so that they do not depend on the number of threads
_PIECE = 64
# means over tokens, then quantities of the whole sequence
_OF_TOKENS = ("stream_norm", "update_norm", "update_ratio", "update_cosine", "step_cosine", "stream_gain", "outlier_ratio", "kurtosis")  # fmt: skip
_OF_STREAM = (*_OF_TOKENS, "anisotropy", "max_abs", "outlier_dim")
_OF_NORM = ("norm_mean", "norm_scale", "norm_output_gain")
_OF_LAYERS = ("block_influence", "block_angle", "block_gain")
OF_HEADS = ("heads_concat_norm", "heads_mean_norm", "heads_cosine")
MAKES_OF_LAYERS = frozenset(_OF_LAYERS)
MAKES = frozenset({*_OF_STREAM, *_OF_NORM, *OF_HEADS})
_STREAM, _HEADS, _LAYERS = places(_OF_STREAM), places(OF_HEADS), places(_OF_LAYERS)
_NORM_BINS, _LEAST_NORM_BIN = len(TOKEN_NORM.numbers), TOKEN_NORM.numbers[0]
_TOKEN = places((*_OF_TOKENS, *_OF_NORM))  # quantities that are averaged over tokens
# sums over the entries of one token, from which its quantities are computed
_SUMS = ("mean", "squares", "largest", "fourths", "stream_squares", "update_squares", "stream_update", "stream_after", "centred", "written")  # fmt: skip
_RAW = places(_SUMS)
_TOKENS, _NORMS, _TOKEN_SUMS, _COMPARED = len(_OF_TOKENS), len(_OF_NORM), len(_SUMS), len(OF_HEADS)
_ALWAYS = np.array([getattr(_TOKEN, name) for name in ("stream_norm", "outlier_ratio", "kurtosis")])
_WITH_UPDATE = np.array([getattr(_TOKEN, name) for name in _OF_TOKENS if name not in ("outlier_ratio", "kurtosis")])
_WITH_NORM = np.array([getattr(_TOKEN, name) for name in _OF_NORM])
_NOTHING = np.zeros((0, 0), np.float32)  # placeholder for absent states

Columns = Mapping[str, Float64[np.ndarray, " batch"]]


@dataclass(frozen=True)
class StatePass:
    """Results of one pass over a state of the stream: columns of the state, and of the norm that reads it.

    `norm_counts` are the tokens in each bin of `TOKEN_NORM`.
    """

    stream: Columns
    norm: Columns
    norm_counts: Float64[np.ndarray, " bin"]
    off: float  # ‖x' − x − F‖ over all real tokens, 0 without x and F
    size: float  # ‖x'‖ + ‖x‖


def read_state(
    axis: Axis,
    after: Float[Tensor, "batch token width"],
    stream: Float[Tensor, "batch token width"] | None = None,
    update: Float[Tensor, "batch token width"] | None = None,
    *,
    norm: NormObservation | None = None,
    output: Float[Tensor, "batch token width"] | None = None,
    weight: Float[Tensor, " width"] | None = None,
    bias: Float[Tensor, " width"] | None = None,
) -> StatePass:
    """The quantities of a state and of the norm that reads it, float32 and contiguous.

    With `output` the norm (LayerNorm with this weight and bias) is computed into it; without, its `wrote` is read.
    """
    batch, tokens, width = axis.start.shape[0], axis.tokens, after.shape[-1]
    pieces = -(-tokens // _PIECE)
    of_stream, of_norm = np.empty((len(_OF_STREAM), batch)), np.empty((_NORMS, batch))
    identity = np.empty((3, batch))
    norm_counts = np.zeros((batch, pieces, _NORM_BINS))
    wrote = output if output is not None else None if norm is None else norm.wrote
    _pass(
        _flat(after),
        _flat(stream),
        _flat(update),
        _flat(wrote),
        np.ones(width, np.float32) if weight is None else weight.detach().numpy(),
        np.zeros(width, np.float32) if bias is None else bias.detach().numpy(),
        np.float32(0 if norm is None else norm.epsilon),
        norm is not None and norm.kind == "layer",
        output is not None,
        axis.start.numpy(),
        axis.length.numpy(),
        tokens,
        np.empty((batch, pieces, _TOKENS + _NORMS, 2)),
        np.empty((batch, pieces, 2, width), np.float32),
        np.empty((batch, pieces, 3)),
        norm_counts,
        of_stream,
        of_norm,
        identity,
    )
    off, total, x = np.sqrt(identity.sum(1)).tolist()
    norm_columns: dict[str, np.ndarray] = dict(zip(_OF_NORM, of_norm, strict=True))
    if norm is not None and norm.kind == "rms":
        norm_columns["norm_mean"] = np.full(batch, math.nan)
    of_state: dict[str, np.ndarray] = dict(zip(_OF_STREAM, of_stream, strict=True))
    return StatePass(of_state, norm_columns, norm_counts.sum((0, 1)), off, total + x)


def compare_heads(axis: Axis, contexts: Float[Tensor, "batch head token head_width"]) -> Columns:
    """The columns that compare the contexts of an attention call's heads."""
    by_token = contexts.transpose(1, 2)
    values = np.empty((_COMPARED, contexts.shape[0]))
    pieces = -(-axis.tokens // _PIECE)
    _compare_heads(
        (by_token if by_token.is_contiguous() else by_token.contiguous()).numpy(),
        axis.start.numpy(),
        axis.length.numpy(),
        np.empty((contexts.shape[0], pieces, _COMPARED, 2)),
        values,
    )
    return dict(zip(OF_HEADS, values, strict=True))


def compare_states(
    axis: Axis, before: Float[Tensor, "batch token width"], after: Float[Tensor, "batch token width"]
) -> Columns:
    """The columns of `layers`, of the stream before and after a layer, in float32."""
    values, pieces = np.empty((len(_OF_LAYERS), len(before))), -(-axis.tokens // _PIECE)
    sums = np.empty((len(before), pieces, len(_OF_LAYERS), 2))
    _compare_states(_flat(before), _flat(after), axis.start.numpy(), axis.length.numpy(), axis.tokens, sums, values)
    return dict(zip(_OF_LAYERS, values, strict=True))


def _flat(x: Float[Tensor, "*batch width"] | None) -> Float32[np.ndarray, "row width"]:
    return _NOTHING if x is None else x.reshape(-1, x.shape[-1]).contiguous().numpy()


@njit(error_model="numpy", fastmath=FAST)
def _keep_largest(a: Float32[np.ndarray, " width"], largest: Float32[np.ndarray, " width"]) -> np.float32:
    """The token's largest |entry|, updating the largest of each dimension.

    Positive floats are in the order of their bits, NaN above all: LLVM makes a vector of that maximum, not of floats'.
    """
    for k in range(a.shape[0]):
        size, held = abs(a[k]), largest[k]
        largest[k] = size if size > held else held
    top = np.int32(0)
    for k in range(a.shape[0]):
        top = max(top, np.float32(abs(a[k])).view(np.int32))
    return np.int32(top).view(np.float32)


@njit(error_model="numpy", fastmath=FAST)
def _sum_state(
    a: Float32[np.ndarray, " width"],
    raw: Float32[np.ndarray, "sum token"],
    t: int,
    units: Float32[np.ndarray, " width"],
    largest: Float32[np.ndarray, " width"],
) -> None:
    """Sums of one token's state."""
    total, squares = float32(0), float32(0)
    for k in range(a.shape[0]):
        total += a[k]
        squares += a[k] * a[k]
    per = float32(1) / np.sqrt(squares)
    fourths = float32(0)
    for k in range(a.shape[0]):
        u = a[k] * per
        fourths += u * u * (u * u)
        units[k] += u
    raw[_RAW.mean, t], raw[_RAW.squares, t], raw[_RAW.fourths, t] = total / float32(a.shape[0]), squares, fourths
    raw[_RAW.largest, t] = _keep_largest(a, largest)
    if not math.isfinite(squares):
        largest[:] = np.nan


@njit(error_model="numpy", fastmath=FAST)
def _sum_update(
    a: Float32[np.ndarray, " width"],
    x: Float32[np.ndarray, " width"],
    f: Float32[np.ndarray, " width"],
    raw: Float32[np.ndarray, "sum token"],
    t: int,
) -> np.float32:
    """Sums of one token's step from x to a; returns ‖a − x − f‖²."""
    xx, ff, xf, xa, off = float32(0), float32(0), float32(0), float32(0), float32(0)
    for k in range(a.shape[0]):
        xx += x[k] * x[k]
        ff += f[k] * f[k]
        xf += x[k] * f[k]
        xa += x[k] * a[k]
        wrong = a[k] - x[k] - f[k]
        off += wrong * wrong
    raw[_RAW.stream_squares, t], raw[_RAW.update_squares, t], raw[_RAW.stream_update, t], raw[_RAW.stream_after, t] = (
        xx,
        ff,
        xf,
        xa,
    )
    return off


@njit(error_model="numpy", fastmath=FAST)
def _sum_norm(
    a: Float32[np.ndarray, " width"],
    mean: np.float32,
    epsilon: np.float32,
    wrote: Float32[np.ndarray, " width"],
    weight: Float32[np.ndarray, " width"],
    bias: Float32[np.ndarray, " width"],
    makes_output: bool,
    raw: Float32[np.ndarray, "sum token"],
    t: int,
) -> None:
    """Sums of one token's norm and, if wanted, of its output."""
    squares = float32(0)
    for k in range(a.shape[0]):
        squares += (a[k] - mean) * (a[k] - mean)
    if makes_output:
        per = float32(1) / np.sqrt(squares / float32(a.shape[0]) + epsilon)
        for k in range(a.shape[0]):
            wrote[k] = (a[k] - mean) * per * weight[k] + bias[k]
    written = float32(0)
    for k in range(a.shape[0]):
        written += wrote[k] * wrote[k]
    raw[_RAW.centred, t], raw[_RAW.written, t] = squares, written


@njit(error_model="numpy", fastmath=FAST)
def _add(
    values: Float32[np.ndarray, " token"], first: int, last: int, sums: Float64[np.ndarray, "quantity 2"], quantity: int
) -> None:
    """Add the tokens' values where they are defined."""
    total, count = 0.0, 0
    for t in range(first, last):
        # from its bits, which also works in vector code
        defined = (np.float32(values[t]).view(np.int32) & np.int32(0x7F800000)) != np.int32(0x7F800000)
        total += values[t] if defined else float32(0)
        count += 1 if defined else 0
    sums[quantity, 0] += total
    sums[quantity, 1] += count


@njit(error_model="numpy", fastmath=FAST)
def _finish(
    raw: Float32[np.ndarray, "sum token"],
    first: int,
    last: int,
    width: int,
    epsilon: np.float32,
    has_stream: bool,
    has_norm: bool,
    values: Float32[np.ndarray, "quantity token"],
    sums: Float64[np.ndarray, "quantity 2"],
) -> None:
    """Quantities of some tokens from their sums, added up."""
    d = float32(width)
    for t in range(first, last):
        values[_TOKEN.stream_norm, t] = norm = np.sqrt(raw[_RAW.squares, t])
        values[_TOKEN.outlier_ratio, t] = raw[_RAW.largest, t] * np.sqrt(d) / norm
        values[_TOKEN.kurtosis, t] = raw[_RAW.fourths, t] * d
    for quantity in _ALWAYS:
        _add(values[quantity], first, last, sums, quantity)
    if has_stream:
        sums[_TOKEN.stream_norm] = 0.0
        for t in range(first, last):
            norm = values[_TOKEN.stream_norm, t]
            stream, update = np.sqrt(raw[_RAW.stream_squares, t]), np.sqrt(raw[_RAW.update_squares, t])
            values[_TOKEN.stream_gain, t] = norm / stream
            values[_TOKEN.step_cosine, t] = _within_one(raw[_RAW.stream_after, t] / (stream * norm))
            values[_TOKEN.update_cosine, t] = _within_one(raw[_RAW.stream_update, t] / (stream * update))
            values[_TOKEN.update_ratio, t] = update / stream
            values[_TOKEN.update_norm, t] = update
            values[_TOKEN.stream_norm, t] = stream
        for quantity in _WITH_UPDATE:
            _add(values[quantity], first, last, sums, quantity)
    if has_norm:
        for t in range(first, last):
            scale = np.sqrt(raw[_RAW.centred, t] / d + epsilon)
            values[_TOKEN.norm_mean, t] = raw[_RAW.mean, t]
            values[_TOKEN.norm_scale, t] = scale
            values[_TOKEN.norm_output_gain, t] = np.sqrt(raw[_RAW.written, t]) * scale / np.sqrt(raw[_RAW.centred, t])
        for quantity in _WITH_NORM:
            _add(values[quantity], first, last, sums, quantity)


@njit(error_model="numpy", inline="always")
def _within_one(cosine: np.float32) -> np.float32:
    """Clip rounding errors beyond ±1; NaN is kept."""
    return float32(1) if cosine > float32(1) else float32(-1) if cosine < float32(-1) else cosine


@njit(error_model="numpy")
def _mean_over_pieces(
    sums: Float64[np.ndarray, "batch piece quantity 2"], values: Float64[np.ndarray, "column batch"]
) -> None:
    """Means over the tokens where a quantity is defined, from the sums of pieces."""
    for b in range(sums.shape[0]):
        for quantity in range(values.shape[0]):
            total, count = 0.0, 0.0
            for piece in range(sums.shape[1]):
                total += sums[b, piece, quantity, 0]
                count += sums[b, piece, quantity, 1]
            values[quantity, b] = total / count if count > 0 else np.nan


@njit(error_model="numpy")
def _count_norm(squares: np.float32, counts: Float64[np.ndarray, " bin"]) -> None:
    """Count a token in the bin of its norm."""
    if math.isfinite(squares) and squares > 0:
        number = math.floor(2 * math.log2(float64(squares)))
        counts[min(max(number - _LEAST_NORM_BIN, 0), _NORM_BINS - 1)] += 1


_states = types.Array(float32, 2, "C")
_vector = types.Array(float32, 1, "C")


@kernel(
    types.Array(float32, 2, "C", readonly=False),
    _states,
    _states,
    _states,
    _vector,
    _vector,
    float32,
    boolean,
    boolean,
    types.Array(int64, 1, "A"),
    types.Array(int64, 1, "A"),
    int64,
    types.Array(float64, 4, "C"),
    types.Array(float32, 4, "C"),
    types.Array(float64, 3, "C"),
    types.Array(float64, 3, "C"),
    types.Array(float64, 2, "C"),
    types.Array(float64, 2, "C"),
    types.Array(float64, 2, "C"),
)
def _pass(
    after: Float32[np.ndarray, "row width"],
    stream: Float32[np.ndarray, "row width"],
    update: Float32[np.ndarray, "row width"],
    wrote: Float32[np.ndarray, "row width"],
    weight: Float32[np.ndarray, " width"],
    bias: Float32[np.ndarray, " width"],
    epsilon: np.float32,
    centred: bool,
    makes_output: bool,
    start: Int64[np.ndarray, " batch"],
    length: Int64[np.ndarray, " batch"],
    tokens: int,
    sums: Float64[np.ndarray, "batch piece quantity 2"],
    vectors: Float32[np.ndarray, "batch piece 2 width"],
    identities: Float64[np.ndarray, "batch piece 3"],
    norm_counts: Float64[np.ndarray, "batch piece bin"],
    of_stream: Float64[np.ndarray, "stream_column batch"],
    of_norm: Float64[np.ndarray, "norm_column batch"],
    identity: Float64[np.ndarray, "3 batch"],
) -> None:
    batch, pieces = sums.shape[0], sums.shape[1]
    has_stream, has_norm = stream.shape[0] > 0 and update.shape[0] > 0, wrote.shape[0] > 0
    for item in prange(batch * pieces):
        b, piece = item // pieces, item % pieces
        of_piece, off = sums[b, piece], identities[b, piece]
        units, largest = vectors[b, piece, 0], vectors[b, piece, 1]
        of_piece[:] = 0.0
        off[:] = 0.0
        vectors[b, piece] = float32(0)
        raw = np.zeros((_TOKEN_SUMS, _PIECE), np.float32)
        values = np.empty((_TOKENS + _NORMS, _PIECE), np.float32)
        begin, end = piece * _PIECE, min((piece + 1) * _PIECE, tokens)
        low, high = max(begin, start[b]), max(begin, min(end, start[b] + length[b]))
        for t in range(begin, end):
            row = b * tokens + t
            real = low <= t < high
            if real:
                _sum_state(after[row], raw, t - begin, units, largest)
                off[1] += raw[_RAW.squares, t - begin]
                _count_norm(np.float32(raw[_RAW.squares, t - begin]), norm_counts[b, piece])
                if has_stream:
                    off[0] += _sum_update(after[row], stream[row], update[row], raw, t - begin)
                    off[2] += raw[_RAW.stream_squares, t - begin]
            elif makes_output and centred:
                raw[_RAW.mean, t - begin] = after[row].sum() / float32(after.shape[1])
            if has_norm and (real or makes_output):
                mean = np.float32(raw[_RAW.mean, t - begin]) if centred else np.float32(0)
                _sum_norm(after[row], mean, epsilon, wrote[row], weight, bias, makes_output, raw, t - begin)
        _finish(raw, low - begin, high - begin, after.shape[1], epsilon, has_stream, has_norm, values, of_piece)
    for b in prange(batch):
        total = np.zeros((_TOKENS + _NORMS, 2))
        whole = np.zeros(3)
        units, largest = np.zeros(after.shape[1]), np.zeros(after.shape[1], np.float32)
        for piece in range(pieces):
            total += sums[b, piece]
            whole += identities[b, piece]
            units += vectors[b, piece, 0]
            largest = np.maximum(largest, vectors[b, piece, 1])
        for quantity in range(_TOKENS):
            of_stream[quantity, b] = total[quantity, 0] / total[quantity, 1]
        for quantity in range(_NORMS):
            of_norm[quantity, b] = total[_TOKENS + quantity, 0] / total[_TOKENS + quantity, 1]
        n = np.float64(length[b])
        of_stream[_STREAM.anisotropy, b] = ((units * units).sum() - n) / (n * (n - 1)) if n > 1 else np.nan
        of_stream[_STREAM.max_abs, b] = largest.max()
        of_stream[_STREAM.outlier_dim, b] = largest.argmax()
        identity[:, b] = whole


@kernel(
    types.Array(float32, 4, "C"),
    types.Array(int64, 1, "A"),
    types.Array(int64, 1, "A"),
    types.Array(float64, 4, "C"),
    types.Array(float64, 2, "C"),
    fast=True,
)
def _compare_heads(
    contexts: Float32[np.ndarray, "batch token head head_width"],
    start: Int64[np.ndarray, " batch"],
    length: Int64[np.ndarray, " batch"],
    sums: Float64[np.ndarray, "batch piece quantity 2"],
    values: Float64[np.ndarray, "column batch"],
) -> None:
    batch, _, heads, width = contexts.shape
    pieces = sums.shape[1]
    for item in prange(batch * pieces):
        b, piece = item // pieces, item % pieces
        of_piece = sums[b, piece]
        of_piece[:] = 0.0
        of_token = np.empty((_COMPARED, _PIECE), np.float32)
        added, units = np.empty(width, np.float32), np.empty(width, np.float32)
        begin = piece * _PIECE
        low, high = max(begin, start[b]), max(begin, min(begin + _PIECE, start[b] + length[b]))
        for t in range(low, high):
            added[:] = float32(0)
            units[:] = float32(0)
            concat = float32(0)
            for h in range(heads):
                c = contexts[b, t, h]
                squares = float32(0)
                for k in range(width):
                    squares += c[k] * c[k]
                per = float32(1) / np.sqrt(squares)
                concat += squares
                for k in range(width):
                    added[k] += c[k]
                    units[k] += c[k] * per
            mean, similarity = float32(0), float32(0)
            for k in range(width):
                mean += added[k] * added[k]
                similarity += units[k] * units[k]
            of_token[_HEADS.heads_concat_norm, t - begin] = np.sqrt(concat)
            of_token[_HEADS.heads_mean_norm, t - begin] = np.sqrt(mean) / float32(heads)
            of_token[_HEADS.heads_cosine, t - begin] = (
                (similarity - heads) / (heads * (heads - 1)) if heads > 1 else np.nan
            )
        for quantity in range(_COMPARED):
            _add(of_token[quantity], low - begin, high - begin, of_piece, quantity)
    _mean_over_pieces(sums, values)


@kernel(
    _states,
    _states,
    types.Array(int64, 1, "A"),
    types.Array(int64, 1, "A"),
    int64,
    types.Array(float64, 4, "C"),
    types.Array(float64, 2, "C"),
    fast=True,
)
def _compare_states(
    before: Float32[np.ndarray, "row width"],
    after: Float32[np.ndarray, "row width"],
    start: Int64[np.ndarray, " batch"],
    length: Int64[np.ndarray, " batch"],
    tokens: int,
    sums: Float64[np.ndarray, "batch piece quantity 2"],
    values: Float64[np.ndarray, "column batch"],
) -> None:
    batch, pieces = sums.shape[0], sums.shape[1]
    for item in prange(batch * pieces):
        b, piece = item // pieces, item % pieces
        of_piece = sums[b, piece]
        of_piece[:] = 0.0
        of_token = np.empty((values.shape[0], _PIECE), np.float32)
        begin = piece * _PIECE
        low, high = max(begin, start[b]), max(begin, min(begin + _PIECE, start[b] + length[b]))
        for t in range(low, high):
            x, y = before[b * tokens + t], after[b * tokens + t]
            xx, yy = float32(0), float32(0)
            for k in range(x.shape[0]):
                xx += x[k] * x[k]
                yy += y[k] * y[k]
            per_x, per_y = float32(1) / np.sqrt(xx), float32(1) / np.sqrt(yy)
            # chords of the directions: a cosine near 1 would have lost its digits
            apart, together = float32(0), float32(0)
            for k in range(x.shape[0]):
                u, v = x[k] * per_x, y[k] * per_y
                apart += (u - v) * (u - v)
                together += (u + v) * (u + v)
            of_token[_LAYERS.block_influence, t - begin] = apart / float32(2)
            of_token[_LAYERS.block_angle, t - begin] = float32(2 / math.pi) * math.atan2(
                np.sqrt(apart), np.sqrt(together)
            )
            of_token[_LAYERS.block_gain, t - begin] = np.sqrt(yy / xx)
        for quantity in range(values.shape[0]):
            _add(of_token[quantity], low - begin, high - begin, of_piece, quantity)
    _mean_over_pieces(sums, values)
