"""The columns of `heads`: what one attention head did on one sequence.

Every function takes a `HeadObservation` and gives a tensor [batch, head], NaN where undefined, or None where the whole
column is. Unless its formula says otherwise a column is the mean of a row quantity over the sequence's measured rows.
p[i,j] is the pattern, s[i,j] the masked and scaled score, d = j − i, V_i the keys that row i may see, m_i = |V_i|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from extract.statistics.registry import column

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from extract.engines.rows import Rows
    from extract.engines.visibility import Visibility

TOKEN_CLASSES = ("bos", "separator", "special", "punctuation", "number", "word_start", "subword")
CLASS_MASSES = tuple(f"mass_{name}" for name in TOKEN_CLASSES)  # their columns


@dataclass(frozen=True)
class HeadObservation:
    """What one attention call showed: row quantities, sums over rows, and what is known of tokens and weights."""

    rows: Rows
    visibility: Visibility
    classes: Int[Tensor, "batch key"] | None = None  # index into TOKEN_CLASSES, −1 at padding
    context_norms: Float[Tensor, "batch head query"] | None = None
    update_norms: Float[Tensor, "batch head query"] | None = None
    value_norms: Float[Tensor, "batch head key"] | None = None

    @cached_property
    def count(self) -> Float[Tensor, "batch head"]:
        """Measured rows."""
        return self.rows.measured.sum(-1).to(self.rows.entropy.dtype)

    def mean(self, row_quantity: Float[Tensor, "batch head query"]) -> Float[Tensor, "batch head"]:
        """Mean over measured rows; unmeasured rows hold zero. 0/0 gives NaN: undefined."""
        return row_quantity.sum(-1) / self.count

    @cached_property
    def mean_row(self) -> Float[Tensor, "batch head key"]:
        """p̄_j, the mean over measured rows of p[i,j]."""
        return self.rows.received / self.count[..., None]

    @cached_property
    def visible(self) -> Float[Tensor, "batch head query"]:
        """m_i at measured rows, 0 elsewhere."""
        return self.visibility.keys.to(self.count.dtype) * self.rows.measured

    @cached_property
    def several(self) -> Bool[Tensor, "batch head query"]:
        """Measured rows that see two keys or more."""
        return self.visible >= 2

    @cached_property
    def entropy_share(self) -> Float[Tensor, "batch head query"]:
        """H_i / ln m_i where a row sees several keys, else 0; a learned sink counts as one more outcome."""
        outcomes = self.visible + (0 if self.rows.sink is None else 1)
        return self.rows.entropy * self.several / outcomes.clamp_min(2).log()

    @cached_property
    def received_entropy(self) -> Float[Tensor, "batch head"]:
        """Entropy of the mean row, the sink's mean mass being one outcome."""
        entropy = -self.mean_row.xlogy(self.mean_row).sum(-1)
        if self.rows.sink is not None:
            sink = self.mean(self.rows.sink)
            entropy = entropy - sink.xlogy(sink)
        return entropy.clamp_min(0)

    def offset_mass(self, offset: int) -> Float[Tensor, "batch head"]:
        """Mean of p at d = offset; 0 where the sequence is too short to have it."""
        middle = self.rows.offsets.shape[-1] // 2
        if abs(offset) > middle:
            return self.count * 0
        return self.rows.offsets[..., middle + offset] / self.count

    def class_mass(self, name: str) -> Float[Tensor, "batch head"] | None:
        """Mean over rows of the mass on the keys of a token class."""
        if self.classes is None:
            return None
        chosen = self.classes == TOKEN_CLASSES.index(name)
        return (self.mean_row * chosen[:, None, :]).sum(-1)


@column(formula="mean of H_i = −Σ_j p ln p", unit="nats", bounds=(0, "ln n"), nullable=True)
def entropy_nats(o: HeadObservation) -> Tensor:
    """How spread the attention of a row is: 0 on one key, ln n evenly on n."""
    return o.mean(o.rows.entropy)


@column(formula="population deviation of H_i over rows", unit="nats", bounds=(0, None), nullable=True)
def entropy_std_nats(o: HeadObservation) -> Tensor:
    """How differently sharp the rows of one sequence are."""
    deviation = (o.rows.entropy - o.mean(o.rows.entropy)[..., None]) * o.rows.measured
    return o.mean(deviation.square()).sqrt()


@column(formula="mean of H_i / ln m_i over rows with m_i ≥ 2; null if none", bounds=(0, 1), nullable=True)
def entropy_normalized(o: HeadObservation) -> Tensor:
    """Entropy as a share of what the visible keys permit; a learned sink counts as one more outcome."""
    return o.entropy_share.clamp_max(1).sum(-1) / o.several.sum(-1)


@column(formula="mean of exp H_i", unit="keys", bounds=(1, "n"), nullable=True)
def attended_keys(o: HeadObservation) -> Tensor:
    """The number of evenly attended keys that would have this entropy (perplexity of the row)."""
    return o.mean(o.rows.entropy.exp() * o.rows.measured)


@column(formula="mean of Σ_j p²", bounds=("1/n", 1), nullable=True)
def collision_probability(o: HeadObservation) -> Tensor:
    """The chance that two draws from the row fall on the same key."""
    return o.mean(o.rows.collision)


@column(formula="mean of max_j p", bounds=("1/n", 1), nullable=True)
def max_weight(o: HeadObservation) -> Tensor:
    """The largest weight of a row."""
    return o.mean(o.rows.max_weight)


@column(formula="mean of Σ_j p·|d|", unit="tokens", bounds=(0, "n−1"), nullable=True)
def distance_tokens(o: HeadObservation) -> Tensor:
    """How far the head looks."""
    return o.mean(o.rows.distance)


@column(formula="mean of Σ_j p·d", unit="tokens", bounds=("−(n−1)", "n−1"), nullable=True)
def offset_tokens(o: HeadObservation) -> Tensor:
    """Where the head looks from the query: negative is backward."""
    return o.mean(o.rows.offset)


@column(formula="mean of √(Σ_j p d² − (Σ_j p d)²)", unit="tokens", bounds=(0, None), nullable=True)
def offset_std_tokens(o: HeadObservation) -> Tensor:
    """How wide a row's attention is around its own centre."""
    return o.mean(o.rows.offset_std)


@column(formula="Σ_i Σ_j p·|d| / Σ_i (mean of |d| over V_i); null if n = 1", bounds=(0, None), nullable=True)
def distance_vs_uniform(o: HeadObservation) -> Tensor:
    """Distance against that of a head which looks evenly at all it may see: a ratio of sums."""
    opportunity = (o.visibility.uniform_distance * o.rows.measured).sum(-1)
    return o.rows.distance.sum(-1) / opportunity.where(opportunity > 0, math.nan)


@column(formula="mean of p[i,i]", bounds=(0, 1), nullable=True)
def mass_self(o: HeadObservation) -> Tensor:
    """Weight of the token itself."""
    return o.offset_mass(0)


@column(formula="mean of p[i,i−1]", bounds=(0, 1), nullable=True)
def mass_previous(o: HeadObservation) -> Tensor:
    """Weight of the token before."""
    return o.offset_mass(-1)


@column(formula="mean of p[i,i+1]", bounds=(0, 1), nullable=True)
def mass_next(o: HeadObservation) -> Tensor:
    """Weight of the token after."""
    return o.offset_mass(1)


@column(formula="mean of Σ_{j<i} p", bounds=(0, 1), nullable=True)
def mass_backward(o: HeadObservation) -> Tensor:
    """Weight of all tokens before."""
    return o.rows.offsets[..., : o.rows.offsets.shape[-1] // 2].sum(-1) / o.count


@column(formula="mean of Σ_{j>i} p", bounds=(0, 1), nullable=True)
def mass_forward(o: HeadObservation) -> Tensor:
    """Weight of all tokens after."""
    return o.rows.offsets[..., o.rows.offsets.shape[-1] // 2 + 1 :].sum(-1) / o.count


@column(formula="mean of p[i,0]", bounds=(0, 1), nullable=True)
def mass_first(o: HeadObservation) -> Tensor:
    """Weight of the sequence's first token."""
    start = o.visibility.start.view(-1, 1, 1).expand(*o.count.shape, 1)
    return o.mean_row.gather(-1, start).squeeze(-1)


@column(formula="mean mass of the learned sink; null where the model has none", bounds=(0, 1), nullable=True)
def mass_sink(o: HeadObservation) -> Tensor | None:
    """Weight of an extra softmax outcome that is no key."""
    return None if o.rows.sink is None else o.mean(o.rows.sink)


@column(formula="mean of Σ p over the first special token ([CLS], <s>)", bounds=(0, 1), nullable=True)
def mass_bos(o: HeadObservation) -> Tensor | None:
    """Weight of tokens that begin a sequence; the seven token classes are disjoint and sum to 1 (with mass_sink)."""
    return o.class_mass("bos")


@column(formula="mean of Σ p over separator tokens ([SEP], </s>)", bounds=(0, 1), nullable=True)
def mass_separator(o: HeadObservation) -> Tensor | None:
    """Weight of tokens that end or part sequences."""
    return o.class_mass("separator")


@column(formula="mean of Σ p over other special tokens", bounds=(0, 1), nullable=True)
def mass_special(o: HeadObservation) -> Tensor | None:
    """Weight of special tokens that are neither bos nor separator ([MASK], [UNK])."""
    return o.class_mass("special")


@column(formula="mean of Σ p over tokens all of whose characters are Unicode P or S", bounds=(0, 1), nullable=True)
def mass_punctuation(o: HeadObservation) -> Tensor | None:
    """Weight of punctuation and symbols."""
    return o.class_mass("punctuation")


@column(formula="mean of Σ p over tokens with a digit", bounds=(0, 1), nullable=True)
def mass_number(o: HeadObservation) -> Tensor | None:
    """Weight of numbers."""
    return o.class_mass("number")


@column(formula="mean of Σ p over tokens that begin a word for this tokenizer", bounds=(0, 1), nullable=True)
def mass_word_start(o: HeadObservation) -> Tensor | None:
    """Weight of words, or of their first pieces."""
    return o.class_mass("word_start")


@column(formula="mean of Σ p over tokens that continue a word", bounds=(0, 1), nullable=True)
def mass_subword(o: HeadObservation) -> Tensor | None:
    """Weight of the later pieces of words."""
    return o.class_mass("subword")


@column(formula="mean of Σ p over j ≠ i with the same token id; null without ids", bounds=(0, 1), nullable=True)
def mass_same_token(o: HeadObservation) -> Tensor | None:
    """Weight of other occurrences of the query's token."""
    return None if o.rows.same_token is None else o.rows.same_token / o.count


@column(
    formula="mean of Σ p over j ≤ i with token j−1 = token i, j−1 ≠ i; null without ids",
    bounds=(0, 1),
    reference="Olsson 2022",
    nullable=True,
)
def mass_induction(o: HeadObservation) -> Tensor | None:
    """Weight of the token after an earlier copy of the query's token, on the text as it is."""
    return None if o.rows.induction is None else o.rows.induction / o.count


@column(formula="−Σ_j p̄_j ln p̄_j, p̄_j = mean_i p[i,j]", unit="nats", bounds=(0, "ln n"), nullable=True)
def received_entropy_nats(o: HeadObservation) -> Tensor:
    """How evenly the keys of a sequence are attended when all its queries are taken together."""
    return o.received_entropy


@column(formula="received_entropy_nats − entropy_nats", unit="nats", bounds=(0, "ln n"), nullable=True)
def mutual_information_nats(o: HeadObservation) -> Tensor:
    """How much *which query* changes *where it looks*; rounding below its lower bound is cut off."""
    return (o.received_entropy - o.mean(o.rows.entropy)).clamp_min(0)


@column(formula="max_j p̄_j", bounds=("1/n", 1), nullable=True)
def received_max(o: HeadObservation) -> Tensor:
    """The largest mean weight that any key receives: the sink, wherever it is."""
    return o.mean_row.amax(-1)


@column(
    formula="the j of received_max (lowest on ties)", unit="position", dtype="int32", bounds=(0, "n−1"), nullable=True
)
def received_max_key(o: HeadObservation) -> Tensor:
    """Where the sink is."""
    positions = o.visibility.positions[:, None, :].expand_as(o.mean_row)
    is_max = o.mean_row == o.mean_row.amax(-1, keepdim=True)
    beyond = positions.shape[-1]
    found = positions.where(is_max & (positions >= 0), beyond).amin(-1)
    return found.to(o.count.dtype).where(found < beyond, math.nan)


@column(formula="max of s over visible keys of measured rows", nullable=True)
def score_max(o: HeadObservation) -> Tensor:
    """The largest attention logit: growing logits show here before anything breaks."""
    largest = o.rows.score_max.where(o.rows.measured, -math.inf).amax(-1)
    return largest.where(largest > -math.inf, math.nan)


@column(formula="mean of s over all visible (query, key) pairs", nullable=True)
def score_mean(o: HeadObservation) -> Tensor:
    """The mean attention logit."""
    return (o.rows.score_mean * o.visible).sum(-1) / o.visible.sum(-1)


@column(formula="population deviation of s over all visible (query, key) pairs", bounds=(0, None), nullable=True)
def score_std(o: HeadObservation) -> Tensor:
    """How far apart the attention logits are; rows' variances are pooled about the common mean."""
    total = o.visible.sum(-1)
    mean = (o.rows.score_mean * o.visible).sum(-1) / total
    about = o.rows.score_variance + (o.rows.score_mean - mean[..., None]).square()
    return ((about * o.visible).sum(-1) / total).sqrt()


@column(formula="mean of ‖c_i‖, c_i = Σ_j p v_j before W_O", bounds=(0, None), nullable=True)
def context_norm(o: HeadObservation) -> Tensor | None:
    """How much the head carries before the output projection."""
    return None if o.context_norms is None else o.mean(o.context_norms)


@column(formula="mean of ‖c_i W_O^h‖", bounds=(0, None), nullable=True)
def update_norm(o: HeadObservation) -> Tensor | None:
    """The size of the head's own write into the residual stream; null where no output projection was found."""
    return None if o.update_norms is None else o.mean(o.update_norms)


@column(
    formula="Σ_i p[i,0]·‖v_0 W_O^h‖ / Σ_i Σ_j p·‖v_j W_O^h‖",
    bounds=(0, 1),
    reference="Kobayashi 2020",
    nullable=True,
)
def value_weighted_first(o: HeadObservation) -> Tensor | None:
    """The first token's share of what is written: a sink that writes nothing is far below mass_first."""
    if o.value_norms is None:
        return None
    written = o.rows.received * o.value_norms
    start = o.visibility.start.view(-1, 1, 1).expand(*o.count.shape, 1)
    total = written.sum(-1)
    return written.gather(-1, start).squeeze(-1) / total.where(total > 0, math.nan)


@column(formula="rows measured", unit="rows", dtype="int32", bounds=(0, "n"))
def query_rows(o: HeadObservation) -> Tensor:
    """How many rows the means are over: the weight of this row in any mean over sequences."""
    return o.count


@column(formula="rows with m_i = 0", unit="rows", dtype="int32", bounds=(0, "n"))
def masked_rows(o: HeadObservation) -> Tensor:
    """Rows that may see nothing, left out of every mean."""
    return _rows(o.visibility.real[:, None, :] & (o.visibility.keys == 0), o)


@column(formula="rows with a non-finite score among visible keys", unit="rows", dtype="int32", bounds=(0, "n"))
def nonfinite_rows(o: HeadObservation) -> Tensor:
    """Rows whose scores overflowed or are NaN, left out of every mean."""
    return _rows((o.visibility.keys > 0) & ~o.rows.measured, o)


def _rows(chosen: Bool[Tensor, "batch _ query"], o: HeadObservation) -> Float[Tensor, "batch head"]:
    return chosen.sum(-1).to(o.count.dtype).expand_as(o.count)
