"""How much of what earlier heads write is read by later heads, for all pairs of heads of a stack."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.compiled import compilation_disabled
from attlas.extract.capture.head_maps import Factor, HeadMaps, head_maps, signatures
from attlas.extract.capture.layout import Attention
from attlas.extract.capture.linear_map import same_signatures

READS = ("query", "key", "value")


class LayerPair(NamedTuple):
    """‖W_A W_B‖ / (‖W_A‖ ‖W_B‖) for every head A of a layer and every head B of a later one, and the mean for random ones.

    `scores` are those of reading by queries, keys and values; NaN where there is no map.
    """

    layer: int
    later_layer: int
    scores: Float[np.ndarray, "read head later_head"]
    random: float


class _Write(NamedTuple):
    """A layer's heads as writers: a factor with the same ‖W_OV Z‖ for every Z, over ‖W_OV‖."""

    layer: int
    factor: Float[Tensor, "head head_width stream"]


@dataclass(frozen=True)
class _CachedPairs:
    """The pairs of a stack, and the signatures of its maps when they were made."""

    attentions: tuple[Attention, ...]
    signatures: list[Tensor | None]
    pairs: list[LayerPair]


_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[str, _CachedPairs]] = weakref.WeakKeyDictionary()


def layer_pairs(model: nn.Module, stack: str, attentions: tuple[Attention, ...]) -> list[LayerPair]:
    """Return all pairs of layers of a stack for which a score is defined, in order of the later layer.

    They take as long as a forward pass over some thousand tokens, and are kept until a signature of the maps has changed.
    """
    with compilation_disabled():
        now = signatures(model, attentions)
    of_model = _CACHE.setdefault(model, {})
    cached = of_model.get(stack)
    if cached is None or cached.attentions != attentions or not same_signatures(cached.signatures, now):
        cached = of_model[stack] = _CachedPairs(attentions, now, list(_pairs(model, attentions)))
    return cached.pairs


def _pairs(model: nn.Module, attentions: Sequence[Attention]) -> Iterator[LayerPair]:
    writes: list[_Write] = []
    for attention in attentions:
        maps = head_maps(model, attention)
        if not maps.is_self:
            continue
        reads = _reads(maps)
        for write in writes:
            pair = _pair(write, attention.layer, reads)
            if pair is not None:
                yield pair
        writes += _write(attention.layer, maps)


def random_composition(width: int, ranks: tuple[int, int]) -> float:
    """The mean of ‖W_A W_B‖ / (‖W_A‖ ‖W_B‖) over products W of two Gaussian factors of these ranks, in this dimension.

    Its square has the mean 1/d exactly, whatever the ranks: W_A is as likely as W_A U for every rotation U. The mean is lower
    by about an eighth of the relative variance of the square, which follows from E tr(P²) of P = WᵀW / ‖W‖², at most 1.
    """
    d = width
    traces = [min(1.0, (1 + 1 / d) * (d + r + 1) / (r * d) + (1 + 2 / (r * d)) / d) for r in ranks]
    excess = [trace - 1 / d for trace in traces]
    variance = 2 * d**2 / ((d - 1) * (d + 2)) * excess[0] * excess[1] if d > 1 else 0.0
    return (1 - variance / 8) / d**0.5


def _pair(write: _Write, later_layer: int, reads: Sequence[Factor | None]) -> LayerPair | None:
    heads, rank, width = write.factor.shape
    scores = [None if read is None or read.shape[1] != width else _scores(write.factor, read) for read in reads]
    defined = next((s for s in scores if s is not None), None)
    if defined is None:
        return None
    later_rank = next(
        read.shape[2] for read, s in zip(reads, scores, strict=True) if read is not None and s is not None
    )
    filled = [np.full((heads, defined.shape[1]), np.nan) if s is None else s for s in scores]
    return LayerPair(write.layer, later_layer, np.stack(filled), random_composition(width, (rank, later_rank)))


def _scores(
    write: Float[Tensor, "head head_width stream"], read: Float[Tensor, "later_head stream later_width"]
) -> Float[np.ndarray, "head later_head"]:
    heads, later_heads = len(write), len(read)
    product = write.flatten(0, 1) @ read.transpose(0, 1).flatten(1)
    squares = product.square_().view(heads, write.shape[1], later_heads, -1).sum((1, 3))
    return squares.sqrt().double().cpu().numpy()


def _reads(maps: HeadMaps) -> tuple[Factor | None, ...]:
    """Factors with the same ‖Z W‖ for every Z as W_QKᵀ, W_QK and W_OV, over their norms: what queries, keys, values read."""
    return (
        _shortened(maps.query, maps.key),
        _shortened(maps.key, maps.query),
        _shortened(maps.value, maps.output),
    )


def _write(layer: int, maps: HeadMaps) -> Iterable[_Write]:
    factor = _shortened(maps.output, maps.value)
    return () if factor is None else (_Write(layer, factor.mT.contiguous()),)


def _shortened(factor: Factor | None, other: Factor | None) -> Factor | None:
    """A R / ‖A Bᵀ‖ with R Rᵀ = BᵀB: as many columns as A, and ‖Z A R‖ = ‖Z A Bᵀ‖ for every Z; NaN if A Bᵀ is zero or not finite.

    In float32: scores are sums of squares, so their errors are those of the roundings of a few large terms.
    """
    if factor is None or other is None:
        return None
    grams = other.mT @ other
    # what is not finite has no root; as zero it becomes NaN below
    root = _square_root(torch.where(grams.isfinite().flatten(1).all(1)[:, None, None], grams, 0.0))
    shortened = factor @ root
    return (shortened / shortened.flatten(1).norm(dim=1)[:, None, None]).float()


def _square_root(grams: Float[Tensor, "head n n"]) -> Float[Tensor, "head n n"]:
    """R with R Rᵀ = G for every G; by eigenvectors, which take much longer, if one is singular."""
    root, failed = torch.linalg.cholesky_ex(grams)
    if not bool(failed.any()):
        return root
    values, vectors = torch.linalg.eigh(grams)
    return vectors * values.clamp_min(0).sqrt()[:, None]
