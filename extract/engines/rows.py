"""What goes into an engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from extract.engines.patches import Grid, PatchSums
from extract.engines.visibility import Visibility

# the fields of `Rows` that follow from a row's scores and places, in the order in which engines hold them
ROW_QUANTITIES = (
    "entropy",
    "collision",
    "max_weight",
    "distance",
    "offset",
    "offset_std",
    "score_max",
    "score_mean",
    "score_variance",
)


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of the model, as the model made it, and what is known besides.

    Grouped heads: `key` has fewer heads than `query`, each serving query heads in a row. `sinks` are logits of a
    learned sink. Scores are (query · key)·scale, soft-capped, plus the visibility's bias. `write` is R of each head,
    lower triangular, with ‖c R‖ = ‖c W_O^h‖.
    """

    query: Float[Tensor, "batch head query width"]
    key: Float[Tensor, "batch key_head key width"]
    value: Float[Tensor, "batch key_head key value_width"]
    visibility: Visibility
    scale: float
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    write: Float[Tensor, "head value_width value_width"] | None = None
    token_ids: Int[Tensor, "batch token"] | None = None
    grid: Grid | None = None


@dataclass(frozen=True)
class ScoredCall:
    """An attention call whose scores the model made itself, masked, biased and scaled, and put through its own softmax."""

    scores: Float[Tensor, "batch head query key"]  # or the weights alone, where no more is known
    value: Float[Tensor, "batch key_head key value_width"] | None  # None where a key's is not the same for all queries
    visibility: Visibility
    sinks: Float[Tensor, "batch head query"] | None = None
    write: Float[Tensor, "head value_width value_width"] | None = None
    token_ids: Int[Tensor, "batch token"] | None = None
    grid: Grid | None = None


@dataclass(frozen=True)
class Rows:
    """Row quantities of one attention call, and its sums over rows, in float32 or better.

    Where queries and keys are different tokens, what is about distance holds places' distances and means nothing.

    A row that is not measured (padding, fully masked, non-finite scores) holds zero everywhere and adds to no sum.
    """

    measured: Bool[Tensor, "batch head query"]
    entropy: Float[Tensor, "batch head query"]  # nats, the sink included
    collision: Float[Tensor, "batch head query"]  # Σ p²
    max_weight: Float[Tensor, "batch head query"]
    distance: Float[Tensor, "batch head query"]  # Σ p·|d|
    offset: Float[Tensor, "batch head query"]  # Σ p·d
    offset_std: Float[Tensor, "batch head query"]
    score_max: Float[Tensor, "batch head query"]  # over visible keys
    score_mean: Float[Tensor, "batch head query"]
    score_variance: Float[Tensor, "batch head query"]  # population
    context_norm: Float[Tensor, "batch head query"]  # ‖c_i‖
    received: Float[Tensor, "batch head key"]  # Σ_i p[i, key]
    offsets: Float[Tensor, "batch head distance"]  # Σ_i p[i, i+d] at index d + queries − 1
    update_norm: Float[Tensor, "batch head query"] | None = None  # ‖c_i W_O^h‖
    value_norm: Float[Tensor, "batch head key"] | None = None  # ‖v_j W_O^h‖ at real keys
    sink: Float[Tensor, "batch head query"] | None = None
    same_token: Float[Tensor, "batch head"] | None = None  # Σ_i Σ_j≠i p, equal ids
    induction: Float[Tensor, "batch head"] | None = None  # Σ_i Σ_j≤i p, id j−1 = id i, j−1 ≠ i
    patches: PatchSums | None = None
