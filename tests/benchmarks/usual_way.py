"""The statistics of `heads`, `residual` and `profiles` in torch, as a careful notebook would compute them.

Written from the formulas, without using `extract`, which makes it both a competitor and an independent check. For sequences
of equal length without padding. Where two implementations are natural, this is the faster one on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Columns = Mapping[str, Tensor]
    Pairs = tuple[Tensor, ...]  # numbers of sequence, query, key

TOKEN_CLASSES = ("bos", "separator", "special", "whitespace", "punctuation", "number", "word_start", "subword")
HISTOGRAM_BINS = 64
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Call:
    """One attention layer by head: what cannot be derived from its pattern."""

    query: Float[Tensor, "batch head token width"]
    key: Float[Tensor, "batch head token width"]
    value: Float[Tensor, "batch head token width"]
    contexts: Float[Tensor, "batch head token width"]
    gram: Float[Tensor, "head width width"]  # W_O^h W_O^hᵀ: ‖c W_O^h‖² = c W_O^h W_O^hᵀ cᵀ


def repetitions(ids: Int[Tensor, "batch token"]) -> tuple[Pairs, Pairs]:
    """Pairs in which the key is another copy of the query, and pairs in which it follows an earlier copy."""
    same = (ids[:, :, None] == ids[:, None, :]) & ~torch.eye(ids.shape[1], dtype=torch.bool)
    follows = same.roll(1, dims=-1).tril()
    follows[..., 0] = False
    return same.nonzero(as_tuple=True), follows.nonzero(as_tuple=True)


def pattern_quantities(p: Float[Tensor, "batch head query key"], same: Pairs, follows: Pairs) -> dict[str, Tensor]:
    """Quantities of the rows, keys and diagonals of a pattern."""
    n = p.shape[-1]
    place = torch.arange(n, dtype=p.dtype)
    d = place - place[:, None]
    offset = torch.einsum("bhqk,qk->bhq", p, d)
    return {
        # where p is zero the product is zero, whatever the logarithm
        "entropy": -p.clamp_min(_TINY).log_().mul_(p).sum(-1),
        "collision": torch.linalg.vector_norm(p, dim=-1).square(),
        "max_weight": p.amax(-1),
        "distance": torch.einsum("bhqk,qk->bhq", p, d.abs()),
        "offset": offset,
        "offset_std": (d - offset[..., None]).square_().mul_(p).sum(-1).sqrt(),
        "received": p.sum(-2),
        "diagonals": diagonal_sums(p),
        "same_token": _mass_of(p, same),
        "induction": _mass_of(p, follows),
    }


def _mass_of(p: Tensor, pairs: Pairs) -> Float[Tensor, "batch head"]:
    """Σ p over a few pairs, in float64: adding them one by one in float32 would lose four of seven digits."""
    sequence, query, key = pairs
    total = p.new_zeros(p.shape[:2], dtype=torch.float64)
    return total.index_add_(0, sequence, p[sequence, :, query, key].double()).to(p.dtype)


def diagonal_sums(p: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head distance"]:
    """Σ_i p[i, i + d] at index d + n − 1: rows of length 2n, viewed as rows of length 2n + 1, are aligned by distance."""
    n = p.shape[-1]
    padded_rows = p.new_zeros(*p.shape[:2], n * (2 * n + 1))
    padded_rows[..., : 2 * n * n].unflatten(-1, (n, 2 * n))[..., n:] = p
    return padded_rows.unflatten(-1, (n, 2 * n + 1)).sum(-2)[..., 1:-1]


def score_quantities(call: Call) -> dict[str, Float[Tensor, "batch head"]]:
    """Statistics of the scores, which the model does not return."""
    scores = call.query / math.sqrt(call.query.shape[-1]) @ call.key.mT
    mean = scores.mean((-1, -2))
    square = torch.linalg.vector_norm(scores, dim=(-1, -2)).square() / scores[0, 0].numel()
    return {
        "score_max": scores.amax((-1, -2)),
        "score_mean": mean,
        "score_std": (square - mean.square()).clamp_min(0).sqrt(),
    }


def norm_quantities(call: Call) -> dict[str, Float[Tensor, "batch head token"]]:
    def written(vectors: Tensor) -> Tensor:
        return (vectors @ call.gram * vectors).sum(-1).clamp_min(0).sqrt()

    return {
        "context_norm": call.contexts.norm(dim=-1),
        "output_norm": written(call.contexts),
        "value_norm": written(call.value),
    }


def head_columns(of: Columns, classes: Int[Tensor, "batch token"]) -> dict[str, Float[Tensor, "layer batch head"]]:
    """The columns of `heads`, from the quantities of all layers."""
    n = classes.shape[-1]
    entropy, distance = of["entropy"].mean(-1), of["distance"].mean(-1)
    place = torch.arange(n, dtype=entropy.dtype)
    means = ("collision", "max_weight", "offset", "offset_std", "context_norm", "output_norm")
    mean = {name: of[name].mean(-1) for name in means}
    received = of["received"] / n
    return {
        "entropy_nats": entropy,
        "entropy_std_nats": of["entropy"].std(-1, correction=0),
        "entropy_normalized": entropy / math.log(n),
        "attended_keys": of["entropy"].exp().mean(-1),
        "collision_probability": mean["collision"],
        "max_weight": mean["max_weight"],
        "distance_tokens": distance,
        "offset_tokens": mean["offset"],
        "offset_std_tokens": mean["offset_std"],
        "distance_vs_uniform": distance / (place - place[:, None]).abs().mean(),
        **_masses(of["diagonals"] / n, received, classes),
        "mass_same_token": of["same_token"] / n,
        "mass_induction": of["induction"] / n,
        **_received_columns(received, entropy),
        **{name: of[name] for name in ("score_max", "score_mean", "score_std")},
        "context_norm": mean["context_norm"],
        "output_norm": mean["output_norm"],
        "value_weighted_first": _share_of_first(received * of["value_norm"]),
    }


def _masses(diagonals: Tensor, received: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Mean mass by distance and by the class of the key."""
    n = received.shape[-1]
    one_hot = nn.functional.one_hot(classes, len(TOKEN_CLASSES)).to(received.dtype)
    by_class = received @ one_hot
    return {
        "mass_self": diagonals[..., n - 1],
        "mass_previous": diagonals[..., n - 2],
        "mass_next": diagonals[..., n],
        "mass_backward": diagonals[..., : n - 1].sum(-1),
        "mass_forward": diagonals[..., n:].sum(-1),
        "mass_first": received[..., 0],
        **{f"mass_{name}": by_class[..., number] for number, name in enumerate(TOKEN_CLASSES)},
    }


def _received_columns(received: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    received_entropy = torch.special.entr(received).sum(-1)
    largest, key = received.max(-1)
    return {
        "received_entropy_nats": received_entropy,
        "mutual_information_nats": (received_entropy - entropy).clamp_min(0),
        "received_max": largest,
        "received_max_key": key,
    }


def _share_of_first(written: Tensor) -> Tensor:
    return written[..., 0] / written.sum(-1)


def site_columns(
    norms: Sequence[tuple[Tensor, Tensor]], attentions: Sequence[tuple[Tensor, Tensor]], *, epsilon: float
) -> list[dict[str, Float[Tensor, " batch"]]]:
    """The columns of `residual` by site, from inputs and outputs of the norms, and from contexts and their norms.

    The first norm follows the embeddings; every other reads x' = x + F(x), where x is the output of the previous norm.
    """
    sizes = [wrote.norm(dim=-1) for _, wrote in norms]
    columns = []
    for site, (after, _) in enumerate(norms):
        after_size = after.norm(dim=-1)
        before = norms[site - 1][1], sizes[site - 1]
        columns.append(
            (_step_columns(*before, after, after_size) if site else {"stream_norm": after_size.mean(-1)})
            | _state_columns(after, after_size)
            | _norm_columns(after, sizes[site], epsilon)
            | (_combined_heads(*attentions[site // 2]) if site % 2 else {})
        )
    return columns


def _step_columns(x: Tensor, size: Tensor, after: Tensor, after_size: Tensor) -> dict[str, Tensor]:
    update = after - x
    update_size = update.norm(dim=-1)
    return {
        "stream_norm": size.mean(-1),
        "update_norm": update_size.mean(-1),
        "update_ratio": (update_size / size).mean(-1),
        "update_cosine": ((x * update).sum(-1) / (size * update_size)).mean(-1),
        "step_cosine": ((x * after).sum(-1) / (size * after_size)).mean(-1),
        "stream_gain": (after_size / size).mean(-1),
    }


def _state_columns(after: Tensor, after_size: Tensor) -> dict[str, Tensor]:
    n, width = after.shape[-2:]
    units = after / after_size[..., None]
    entries = after.abs()
    largest, dimension = entries.amax(-2).max(-1)
    return {
        "anisotropy": (units.sum(-2).square().sum(-1) - n) / (n * (n - 1)),
        "max_abs": largest,
        "outlier_dim": dimension,
        "outlier_ratio": (entries.amax(-1) / after_size).mean(-1) * math.sqrt(width),
        "kurtosis": units.square().square().sum(-1).mean(-1) * width,
    }


def _norm_columns(read: Tensor, wrote_size: Tensor, epsilon: float) -> dict[str, Tensor]:
    mean = read.mean(-1)
    centred_size = (read - mean[..., None]).norm(dim=-1)
    divisor = (centred_size.square() / read.shape[-1] + epsilon).sqrt()
    return {
        "norm_mean": mean.mean(-1),
        "norm_scale": divisor.mean(-1),
        "norm_output_gain": (wrote_size * divisor / centred_size).mean(-1),
    }


def _combined_heads(
    contexts: Float[Tensor, "batch head token width"], size: Float[Tensor, "batch head token"]
) -> dict[str, Tensor]:
    heads = contexts.shape[1]
    units = contexts / size[..., None]
    return {
        "heads_concat_norm": size.norm(dim=1).mean(-1),
        "heads_mean_norm": contexts.mean(1).norm(dim=-1).mean(-1),
        "heads_cosine": ((units.sum(1).square().sum(-1) - heads) / (heads * (heads - 1))).mean(-1),
    }


@dataclass(frozen=True)
class Profile:
    """Sum and count of the bins of every head; counts shared by all heads are stored once."""

    bins: Int[Tensor, " bin"]
    sums: Float[Tensor, "layer head bin"]
    counts: Float[Tensor, "... bin"]


def profiles(of: Columns) -> dict[str, Profile]:
    """The profiles over all sequences, from the quantities of all layers."""
    batch, n = of["entropy"].shape[1], of["entropy"].shape[-1]
    distance, place = torch.arange(1 - n, n), torch.arange(n)
    pairs, rows = (n - distance.abs()) * batch, torch.full((n,), batch)
    return {
        "offset": _by_bin(of["diagonals"], doubling_bins(distance), pairs),
        "entropy": _histogram(of["entropy"] / math.log(n)),
        "max_weight": _histogram(of["max_weight"]),
        "entropy_by_position": _by_bin(of["entropy"], doubling_bins(place), rows),
        "distance_by_position": _by_bin(of["distance"], doubling_bins(place), rows),
        "received_by_position": _by_bin(of["received"], doubling_bins(place), rows),
    }


def doubling_bins(values: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """0, ±1, ±2, ±3 for 3–4, ±4 for 5–8, …"""
    size = values.abs().clamp_min(1).double().log2().ceil() + 1
    return values.sign() * size.long()


def _by_bin(values: Float[Tensor, "layer batch head n"], bins: Int[Tensor, " n"], counts: Int[Tensor, " n"]) -> Profile:
    numbers, place = bins.unique(return_inverse=True)
    total = values.double().sum(1)
    sums = total.new_zeros(*total.shape[:2], len(numbers)).index_add_(-1, place, total)
    return Profile(numbers, sums, total.new_zeros(len(numbers)).index_add_(0, place, counts.double()))


def _histogram(values: Float[Tensor, "layer batch head row"]) -> Profile:
    """Rows in 64 equal bins of [0, 1]."""
    layers, _, heads, _ = values.shape
    head = torch.arange(layers * heads).view(layers, 1, heads, 1)
    bins = (values * HISTOGRAM_BINS).long().clamp_max(HISTOGRAM_BINS - 1)
    flat = (head * HISTOGRAM_BINS + bins).flatten()
    counts = flat.bincount(minlength=layers * heads * HISTOGRAM_BINS).view(layers, heads, HISTOGRAM_BINS).double()
    return Profile(torch.arange(HISTOGRAM_BINS), counts, counts)
