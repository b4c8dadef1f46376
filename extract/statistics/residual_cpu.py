"""The columns of `residual`, compiled: what `residual.column_values` works out, reading each state of the stream once.

Where the stream's norm is torch's own, the same pass makes the norm's output, since all that it needs is at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int64
from numba import boolean, float32, float64, int64, njit, prange, types
from torch import Tensor

from extract.engines.compiled import FAST, kernel
from extract.statistics.residual import COLUMNS, NormObservation

PLACE = {column.name: place for place, column in enumerate(COLUMNS)}
# tokens of a sequence that one thread takes at a time: sums are added up in the same pieces on any number of threads
_PIECE = 64
# per-token quantities, in the order of their columns; the others are of the whole sequence
_OF_STREAM = ("stream_norm", "update_norm", "update_ratio", "update_cosine", "step_cosine", "norm_gain", "outlier_ratio", "kurtosis")  # fmt: skip
_OF_SEQUENCE = ("anisotropy", "max_abs", "outlier_dim")
_OF_NORM = ("layer_norm_mean", "layer_norm_std", "layer_norm_gain")
_OF_HEADS = ("heads_concat_norm", "heads_mean_norm", "heads_cosine")
_STREAM, _NORM = len(_OF_STREAM), len(_OF_NORM)
_NOTHING = np.zeros((0, 0), np.float32)  # stands for states that are not given
_COLUMNS_OF = {
    kind: [PLACE[name] for name in names]
    for kind, names in (("stream", _OF_STREAM + _OF_SEQUENCE), ("norm", _OF_NORM), ("heads", _OF_HEADS))
}


@dataclass(frozen=True)
class Segments:
    """Where each sequence's real tokens stand in its row of the batch."""

    start: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"]
    tokens: int


@dataclass(frozen=True)
class Passed:
    """What one pass over a state of the stream gave."""

    stream: Float[np.ndarray, "column batch"]
    norm: Float[np.ndarray, "column batch"]
    off: float  # ‖x' − x − F‖ over all real tokens, 0 without x and F
    size: float  # ‖x'‖ + ‖x‖


def passed(
    segments: Segments,
    after: Float[Tensor, "batch token width"],
    stream: Float[Tensor, "batch token width"] | None = None,
    update: Float[Tensor, "batch token width"] | None = None,
    *,
    norm: NormObservation | None = None,
    output: Float[Tensor, "batch token width"] | None = None,
    weight: Float[Tensor, " width"] | None = None,
    bias: Float[Tensor, " width"] | None = None,
) -> Passed:
    """The quantities of a state and of the norm that reads it, float32 and contiguous.

    With `output` the norm (LayerNorm with this weight and bias) is computed into it; without, its `wrote` is read.
    """
    batch, tokens, width = segments.start.shape[0], segments.tokens, after.shape[-1]
    pieces = -(-tokens // _PIECE)
    of_stream, of_norm = np.empty((len(_OF_STREAM + _OF_SEQUENCE), batch)), np.empty((_NORM, batch))
    identity = np.empty((3, batch))
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
        segments.start.numpy(),
        segments.length.numpy(),
        tokens,
        np.empty((batch, pieces, _STREAM + _NORM, 2)),
        np.empty((batch, pieces, 2, width), np.float32),
        np.empty((batch, pieces, 3)),
        of_stream,
        of_norm,
        identity,
    )
    off, total, x = np.sqrt(identity.sum(1)).tolist()
    if norm is not None and norm.kind == "rms":
        of_norm[0] = math.nan
    return Passed(of_stream, of_norm, off, total + x)


def assembled(
    stream: Float[np.ndarray, "stream_column batch"],
    norm: Float[np.ndarray, "norm_column batch"] | None,
    heads: Float[np.ndarray, "head_column batch"] | None,
) -> Float[Tensor, "column batch"]:
    """The columns of a site from its parts."""
    values = np.full((len(COLUMNS), stream.shape[1]), math.nan)
    for kind, part in (("stream", stream), ("norm", norm), ("heads", heads)):
        if part is not None:
            values[_COLUMNS_OF[kind]] = part
    return torch.from_numpy(values)


def of_heads(
    segments: Segments, contexts: Float[Tensor, "batch head token head_width"]
) -> Float[np.ndarray, "column batch"]:
    """The columns that compare the contexts of an attention call's heads."""
    by_token = contexts.transpose(1, 2)
    values = np.empty((len(_OF_HEADS), contexts.shape[0]))
    pieces = -(-segments.tokens // _PIECE)
    _compare_heads(
        (by_token if by_token.is_contiguous() else by_token.contiguous()).numpy(),
        segments.start.numpy(),
        segments.length.numpy(),
        np.empty((contexts.shape[0], pieces, len(_OF_HEADS), 2)),
        values,
    )
    return values


def _flat(x: Float[Tensor, "*batch width"] | None) -> Float32[np.ndarray, "row width"]:
    return _NOTHING if x is None else x.reshape(-1, x.shape[-1]).contiguous().numpy()


# what is summed over the entries of one token, from which its quantities follow
_MEAN, _SQUARES, _LARGEST, _FOURTHS, _STREAM_SQUARES, _UPDATE_SQUARES, _STREAM_UPDATE, _STREAM_AFTER, _CENTRED, _WRITTEN = range(10)  # fmt: skip
_RAW = 10


@njit(error_model="numpy", fastmath=FAST)
def _keep_largest(a: Float32[np.ndarray, " width"], largest: Float32[np.ndarray, " width"]) -> np.float32:
    """The token's largest |entry|, and of each dimension the largest so far.

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
    """One token's state."""
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
    raw[_MEAN, t], raw[_SQUARES, t], raw[_FOURTHS, t] = total / float32(a.shape[0]), squares, fourths
    raw[_LARGEST, t] = _keep_largest(a, largest)
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
    """One token's step from x to a; gives ‖a − x − f‖²."""
    xx, ff, xf, xa, off = float32(0), float32(0), float32(0), float32(0), float32(0)
    for k in range(a.shape[0]):
        xx += x[k] * x[k]
        ff += f[k] * f[k]
        xf += x[k] * f[k]
        xa += x[k] * a[k]
        wrong = a[k] - x[k] - f[k]
        off += wrong * wrong
    raw[_STREAM_SQUARES, t], raw[_UPDATE_SQUARES, t], raw[_STREAM_UPDATE, t], raw[_STREAM_AFTER, t] = xx, ff, xf, xa
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
    """One token's norm and, if asked for, its output."""
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
    raw[_CENTRED, t], raw[_WRITTEN, t] = squares, written


@njit(error_model="numpy", fastmath=FAST)
def _add(
    values: Float32[np.ndarray, " token"], first: int, last: int, sums: Float64[np.ndarray, "quantity 2"], quantity: int
) -> None:
    """Add the tokens' values where they are defined."""
    total, count = 0.0, 0
    for t in range(first, last):
        # by its bits, which a vector compares as well
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
        values[0, t] = norm = np.sqrt(raw[_SQUARES, t])
        values[6, t] = raw[_LARGEST, t] * np.sqrt(d) / norm
        values[7, t] = raw[_FOURTHS, t] * d
    for quantity in (0, 6, 7):
        _add(values[quantity], first, last, sums, quantity)
    if has_stream:
        sums[0] = 0.0
        for t in range(first, last):
            norm, stream, update = values[0, t], np.sqrt(raw[_STREAM_SQUARES, t]), np.sqrt(raw[_UPDATE_SQUARES, t])
            values[5, t] = norm / stream
            values[4, t] = _within_one(raw[_STREAM_AFTER, t] / (stream * norm))
            values[3, t] = _within_one(raw[_STREAM_UPDATE, t] / (stream * update))
            values[2, t] = update / stream
            values[1, t] = update
            values[0, t] = stream
        for quantity in range(6):
            _add(values[quantity], first, last, sums, quantity)
    if has_norm:
        for t in range(first, last):
            std = np.sqrt(raw[_CENTRED, t] / d + epsilon)
            values[8, t] = raw[_MEAN, t]
            values[9, t] = std
            values[10, t] = np.sqrt(raw[_WRITTEN, t]) * std / np.sqrt(raw[_CENTRED, t])
        for quantity in range(8, 11):
            _add(values[quantity], first, last, sums, quantity)


@njit(error_model="numpy", inline="always")
def _within_one(cosine: np.float32) -> np.float32:
    """Rounding beyond ±1 cut off; NaN stays."""
    return float32(1) if cosine > float32(1) else float32(-1) if cosine < float32(-1) else cosine


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
        raw, values = np.zeros((_RAW, _PIECE), np.float32), np.empty((_STREAM + _NORM, _PIECE), np.float32)
        begin, end = piece * _PIECE, min((piece + 1) * _PIECE, tokens)
        low, high = max(begin, start[b]), max(begin, min(end, start[b] + length[b]))
        for t in range(begin, end):
            row = b * tokens + t
            real = low <= t < high
            if real:
                _sum_state(after[row], raw, t - begin, units, largest)
                off[1] += raw[_SQUARES, t - begin]
                if has_stream:
                    off[0] += _sum_update(after[row], stream[row], update[row], raw, t - begin)
                    off[2] += raw[_STREAM_SQUARES, t - begin]
            elif makes_output and centred:
                raw[_MEAN, t - begin] = after[row].sum() / float32(after.shape[1])
            if has_norm and (real or makes_output):
                mean = raw[_MEAN, t - begin] if centred else float32(0)
                _sum_norm(after[row], mean, epsilon, wrote[row], weight, bias, makes_output, raw, t - begin)
        _finish(raw, low - begin, high - begin, after.shape[1], epsilon, has_stream, has_norm, values, of_piece)
    for b in prange(batch):
        total = np.zeros((_STREAM + _NORM, 2))
        whole = np.zeros(3)
        units, largest = np.zeros(after.shape[1]), np.zeros(after.shape[1], np.float32)
        for piece in range(pieces):
            total += sums[b, piece]
            whole += identities[b, piece]
            units += vectors[b, piece, 0]
            largest = np.maximum(largest, vectors[b, piece, 1])
        for quantity in range(_STREAM):
            of_stream[quantity, b] = total[quantity, 0] / total[quantity, 1]
        for quantity in range(_NORM):
            of_norm[quantity, b] = total[_STREAM + quantity, 0] / total[_STREAM + quantity, 1]
        n = np.float64(length[b])
        of_stream[_STREAM, b] = ((units * units).sum() - n) / (n * (n - 1)) if n > 1 else np.nan
        of_stream[_STREAM + 1, b] = largest.max()
        of_stream[_STREAM + 2, b] = largest.argmax()
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
        of_token = np.empty((3, _PIECE), np.float32)
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
            mean, alike = float32(0), float32(0)
            for k in range(width):
                mean += added[k] * added[k]
                alike += units[k] * units[k]
            of_token[0, t - begin] = np.sqrt(concat)
            of_token[1, t - begin] = np.sqrt(mean) / float32(heads)
            of_token[2, t - begin] = (alike - heads) / (heads * (heads - 1)) if heads > 1 else np.nan
        for quantity in range(3):
            _add(of_token[quantity], low - begin, high - begin, of_piece, quantity)
    for b in range(batch):
        for quantity in range(values.shape[0]):
            total, count = 0.0, 0.0
            for piece in range(pieces):
                total += sums[b, piece, quantity, 0]
                count += sums[b, piece, quantity, 1]
            values[quantity, b] = total / count if count > 0 else np.nan
