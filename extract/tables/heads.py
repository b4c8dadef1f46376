"""`heads`: what one attention head did on one sequence.

Every column is a function of the `HeadQuantities` of some sequences and gives an array [sequence, head], NaN where
undefined. Unless its formula says otherwise a column is the mean of a row quantity over the sequence's measured rows.
p[i,j] is the pattern, s[i,j] the masked and scaled score, d = j − i, V_i the keys that row i may see, m_i = |V_i|.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from attlas.extract.engines.needs import Needs
from attlas.extract.engines.quantities import TOKEN_CLASSES
from attlas.extract.tables.column import Column, column, columns_of
from attlas.extract.tables.recording import DenseRecorder
from attlas.extract.tables.table import DOCUMENT_ID, HEAD, LAYER, SEQUENCE_ID, STACK, Rule, Table

if TYPE_CHECKING:
    from torch import Tensor

    from attlas.extract.engines.observations import ResidualObservation

Values = Float[np.ndarray, "sequence head"]

CLASS_MASSES = tuple(f"mass_{name}" for name in TOKEN_CLASSES)  # the columns of the token classes


class HeadQuantities:
    """The quantities of one attention layer by name, float64; one that is not known is NaN."""

    def __init__(self, names: Sequence[str], values: Float[np.ndarray, "quantity sequence head"]) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._values = values

    def __getitem__(self, name: str) -> Values:
        return self._values[self._places[name]]

    def mean(self, name: str) -> Values:
        """Mean over measured rows; NaN where there are none."""
        return self.ratio(self[name], self["rows"])

    @staticmethod
    def ratio(part: Values, whole: Values) -> Values:
        """NaN where the whole is zero."""
        return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole != 0)


class _Trace(HeadQuantities):
    """Notes the names of the quantities that a column asks for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Values:
        self.asked.add(name)
        return np.zeros((1, 1))


def quantities_of(columns: Iterable[Column[HeadQuantities, Values]]) -> frozenset[str]:
    """The head quantities that the columns are computed from."""
    trace = _Trace()
    for each in columns:
        assert each.compute is not None, f"{each.name} is computed"
        each.compute(trace)
    return frozenset(trace.asked)


@column(
    formula="mean of H_i = −Σ_j p ln p",
    unit="nats",
    bounds=(0, "ln n"),
    nullable=True,
    group="sharpness",
    known={"U": "ln n", "C": "ln(n!)/n", "I": "0", "P": "0", "F": "0"},
    elsewhere="mean over rows of scipy.stats.entropy(p)",
)
def entropy_nats(o: HeadQuantities) -> Values:
    """How spread the attention of a row is: 0 on one key, ln n evenly on n."""
    return o.mean("entropy")


@column(
    formula="population deviation of H_i over rows",
    unit="nats",
    bounds=(0, None),
    nullable=True,
    group="sharpness",
    known={"U": "0", "I": "0", "P": "0", "F": "0"},
)
def entropy_std_nats(o: HeadQuantities) -> Values:
    """How differently sharp the rows of one sequence are."""
    return np.sqrt(np.maximum(o.mean("entropy_squared") - o.mean("entropy") ** 2, 0))


@column(
    formula="mean of H_i / ln m_i over rows with m_i ≥ 2; null if none",
    bounds=(0, 1),
    nullable=True,
    group="sharpness",
    known={"U": "1", "C": "1", "I": "0", "P": "0", "F": "0"},
)
def entropy_normalized(o: HeadQuantities) -> Values:
    """Entropy as a share of what the visible keys permit; a learned sink counts as one more outcome."""
    return o.ratio(o["entropy_share"], o["several"])


@column(
    formula="mean of exp H_i",
    unit="keys",
    bounds=(1, "n"),
    nullable=True,
    group="sharpness",
    known={"U": "n", "C": "(n+1)/2", "I": "1", "P": "1", "F": "1"},
    elsewhere="mean over rows of exp(scipy.stats.entropy(p))",
)
def attended_keys(o: HeadQuantities) -> Values:
    """The number of evenly attended keys that would have this entropy (perplexity of the row)."""
    return o.mean("attended")


@column(
    formula="mean of Σ_j p²",
    bounds=("1/n", 1),
    nullable=True,
    group="sharpness",
    known={"U": "1/n", "C": "h/n", "I": "1", "P": "1", "F": "1"},
)
def collision_probability(o: HeadQuantities) -> Values:
    """The chance that two draws from the row fall on the same key."""
    return o.mean("collision")


@column(
    formula="mean of max_j p",
    bounds=("1/n", 1),
    nullable=True,
    group="sharpness",
    known={"U": "1/n", "C": "h/n", "I": "1", "P": "1", "F": "1"},
)
def max_weight(o: HeadQuantities) -> Values:
    """The largest weight of a row."""
    return o.mean("max_weight")


@column(
    formula="mean of Σ_j p·|d|",
    unit="tokens",
    bounds=(0, "n−1"),
    nullable=True,
    group="distance",
    known={"U": "(n²−1)/(3n)", "C": "(n−1)/4", "I": "0", "P": "(n−1)/n", "F": "(n−1)/2"},
)
def distance_tokens(o: HeadQuantities) -> Values:
    """How far the head looks."""
    return o.mean("distance")


@column(
    formula="mean of Σ_j p·d",
    unit="tokens",
    bounds=("−(n−1)", "n−1"),
    nullable=True,
    group="distance",
    known={"U": "0", "C": "−(n−1)/4", "I": "0", "P": "−(n−1)/n", "F": "−(n−1)/2"},
)
def offset_tokens(o: HeadQuantities) -> Values:
    """Where the head looks from the query: negative is backward."""
    return o.mean("offset")


@column(
    formula="mean of √(Σ_j p d² − (Σ_j p d)²)",
    unit="tokens",
    bounds=(0, None),
    nullable=True,
    group="distance",
    known={"U": "√((n²−1)/12)", "C": "mean of √((m²−1)/12) over m = 1…n", "I": "0", "P": "0", "F": "0"},
)
def offset_std_tokens(o: HeadQuantities) -> Values:
    """How wide a row's attention is around its own centre."""
    return o.mean("offset_std")


@column(
    formula="Σ_i Σ_j p·|d| / Σ_i (mean of |d| over V_i); null if n = 1",
    bounds=(0, None),
    nullable=True,
    group="distance",
    known={"U": "1", "C": "1", "I": "0", "P": "3/(n+1)", "F": "3n/(2(n+1))"},
)
def distance_vs_uniform(o: HeadQuantities) -> Values:
    """Distance against that of a head which looks evenly at all it may see: a ratio of sums."""
    return o.ratio(o["distance"], o["uniform_distance"])


@column(
    formula="mean of Σ_j p·√(Δrow² + Δcolumn²) / Σ_j p over rows i and keys j that are patches of an image, the class "
    "token and registers left out, so that what falls on patches counts as the whole (mass_patches says how much that is); "
    "null where the grid of patches is not known (text, windows, cross)",
    unit="patches",
    bounds=(0, "n−1"),
    reference="Raghu 2021",
    nullable=True,
    group="distance",
    elsewhere="public code of vision transformers drops the class token and does not renormalise: its mean attention distance is distance_patches · mass_patches",
)
def distance_patches(o: HeadQuantities) -> Values:
    """How far the head looks across the image: times the patch's size, the mean attention distance in pixels."""
    return o.ratio(o["patch_distance"], o["patch_rows"])


@column(
    formula="mean of Σ_j p over rows i and keys j that are patches of an image; null where distance_patches is",
    bounds=(0, 1),
    reference="Raghu 2021",
    nullable=True,
    group="distance",
)
def mass_patches(o: HeadQuantities) -> Values:
    """Weight of patches in the rows of patches: times distance_patches, the distance that is not renormalised."""
    return o.ratio(o["patch_mass"], o["patch_rows"])


@column(
    formula="mean of p[i,i]",
    bounds=(0, 1),
    nullable=True,
    group="what it looks at",
    known={"U": "1/n", "C": "h/n", "I": "1", "P": "1/n", "F": "1/n"},
)
def mass_self(o: HeadQuantities) -> Values:
    """Weight of the token itself."""
    return o.mean("self")


@column(
    formula="mean of p[i,i−1]",
    bounds=(0, 1),
    nullable=True,
    group="what it looks at",
    known={"U": "(n−1)/n²", "C": "(h−1)/n", "I": "0", "P": "(n−1)/n", "F": "1/n"},
    elsewhere='TransformerLens\' head detector (error_measure "mul"): previous_token_head, for causal models',
)
def mass_previous(o: HeadQuantities) -> Values:
    """Weight of the token before."""
    return o.mean("previous")


@column(
    formula="mean of p[i,i+1]",
    bounds=(0, 1),
    nullable=True,
    group="what it looks at",
    known={"U": "(n−1)/n²", "C": "0", "I": "0", "P": "0", "F": "0"},
)
def mass_next(o: HeadQuantities) -> Values:
    """Weight of the token after."""
    return o.mean("next")


@column(
    formula="mean of Σ_{j<i} p",
    bounds=(0, 1),
    nullable=True,
    group="what it looks at",
    known={"U": "(n−1)/(2n)", "C": "1−h/n", "I": "0", "P": "(n−1)/n", "F": "(n−1)/n"},
)
def mass_backward(o: HeadQuantities) -> Values:
    """Weight of all tokens before."""
    return o.mean("backward")


@column(
    formula="mean of Σ_{j>i} p",
    bounds=(0, 1),
    nullable=True,
    group="what it looks at",
    known={"U": "(n−1)/(2n)", "C": "0", "I": "0", "P": "0", "F": "0"},
)
def mass_forward(o: HeadQuantities) -> Values:
    """Weight of all tokens after."""
    return o.mean("forward")


@column(
    formula="mean of p[i,0]",
    bounds=(0, 1),
    nullable=True,
    group="sinks",
    known={"U": "1/n", "C": "h/n", "I": "1/n", "P": "2/n", "F": "1"},
    elsewhere="Gu 2025 (sail-sg/Attention-Sink): its metric for the first position is the share of heads with mass_first > 0.3",
)
def mass_first(o: HeadQuantities) -> Values:
    """Weight of the sequence's first token."""
    return o.mean("first")


@column(
    formula="mean mass of the learned sink; null where the model has none", bounds=(0, 1), nullable=True, group="sinks"
)
def mass_sink(o: HeadQuantities) -> Values:
    """Weight of an extra softmax outcome that is no key."""
    return o.mean("sink")


@column(
    formula="mean of Σ p over the first special token ([CLS], <s>)",
    bounds=(0, 1),
    nullable=True,
    group="what it looks at",
)
def mass_bos(o: HeadQuantities) -> Values:
    """Weight of tokens that begin a sequence; the token classes are disjoint and sum to 1 (with mass_sink)."""
    return o.mean("bos")


@column(
    formula="mean of Σ p over separator tokens ([SEP], </s>)", bounds=(0, 1), nullable=True, group="what it looks at"
)
def mass_separator(o: HeadQuantities) -> Values:
    """Weight of tokens that end or part sequences."""
    return o.mean("separator")


@column(formula="mean of Σ p over other special tokens", bounds=(0, 1), nullable=True, group="what it looks at")
def mass_special(o: HeadQuantities) -> Values:
    """Weight of special tokens that are neither bos nor separator ([MASK], [UNK])."""
    return o.mean("special")


@column(
    formula="mean of Σ p over tokens whose text is white space alone",
    bounds=(0, 1),
    nullable=True,
    group="what it looks at",
)
def mass_whitespace(o: HeadQuantities) -> Values:
    """Weight of line ends, tabs and runs of spaces that are tokens of their own."""
    return o.mean("whitespace")


@column(
    formula="mean of Σ p over tokens all of whose characters are Unicode P or S",
    bounds=(0, 1),
    nullable=True,
    group="what it looks at",
    elsewhere='clarkkev/attention-analysis counts only "." and "," as punctuation',
)
def mass_punctuation(o: HeadQuantities) -> Values:
    """Weight of punctuation and symbols."""
    return o.mean("punctuation")


@column(formula="mean of Σ p over tokens with a digit", bounds=(0, 1), nullable=True, group="what it looks at")
def mass_number(o: HeadQuantities) -> Values:
    """Weight of numbers."""
    return o.mean("number")


@column(
    formula="mean of Σ p over tokens that begin a word for this tokenizer",
    bounds=(0, 1),
    nullable=True,
    group="what it looks at",
)
def mass_word_start(o: HeadQuantities) -> Values:
    """Weight of words, or of their first pieces."""
    return o.mean("word_start")


@column(formula="mean of Σ p over tokens that continue a word", bounds=(0, 1), nullable=True, group="what it looks at")
def mass_subword(o: HeadQuantities) -> Values:
    """Weight of the later pieces of words."""
    return o.mean("subword")


@column(
    formula="mean of Σ p over j ≠ i with the same token id; null without ids",
    bounds=(0, 1),
    nullable=True,
    group="what it looks at",
    elsewhere='TransformerLens\' head detector (error_measure "mul"): duplicate_token_head, for causal models',
)
def mass_same_token(o: HeadQuantities) -> Values:
    """Weight of other occurrences of the query's token."""
    return o.mean("same_token")


@column(
    formula="mean of Σ p over j ≤ i with token j−1 = token i, j−1 ≠ i; null without ids",
    bounds=(0, 1),
    reference="Olsson 2022",
    nullable=True,
    group="what it looks at",
    elsewhere='TransformerLens\' head detector (error_measure "mul"): induction_head, for causal models',
)
def mass_induction(o: HeadQuantities) -> Values:
    """Weight of the token after an earlier copy of the query's token, on the text as it is."""
    return o.mean("induction")


@column(
    formula="−Σ_j p̄_j ln p̄_j, p̄_j = mean_i p[i,j]",
    unit="nats",
    bounds=(0, "ln n"),
    nullable=True,
    group="sinks",
    known={"U": "ln n", "I": "ln n", "F": "0"},
    elsewhere="scipy.stats.entropy of the mean row",
)
def received_entropy_nats(o: HeadQuantities) -> Values:
    """How evenly the keys of a sequence are attended when all its queries are taken together."""
    return o["received_entropy"]


@column(
    formula="received_entropy_nats − entropy_nats",
    unit="nats",
    bounds=(0, "ln n"),
    nullable=True,
    group="sharpness",
    known={"U": "0", "I": "ln n", "P": "ln n − 2·ln 2/n", "F": "0"},
)
def mutual_information_nats(o: HeadQuantities) -> Values:
    """How much *which query* changes *where it looks*; rounding below its lower bound is cut off."""
    return np.maximum(o["received_entropy"] - o.mean("entropy"), 0)


@column(
    formula="max_j p̄_j",
    bounds=("1/n", 1),
    nullable=True,
    group="sinks",
    known={"U": "1/n", "C": "h/n", "I": "1/n", "P": "2/n", "F": "1"},
)
def received_max(o: HeadQuantities) -> Values:
    """The largest mean weight that any key receives: the sink, wherever it is."""
    return o["received_max"]


@column(
    formula="the j of received_max (lowest on ties)",
    unit="position",
    dtype="int32",
    bounds=(0, "n−1"),
    nullable=True,
    group="sinks",
    known={"C": "0", "P": "0", "F": "0"},
)
def received_max_key(o: HeadQuantities) -> Values:
    """Where the sink is."""
    return o["received_max_key"]


@column(
    formula="max of s over visible keys of measured rows; null where only the pattern is seen",
    nullable=True,
    group="scores",
)
def score_max(o: HeadQuantities) -> Values:
    """The largest attention logit: growing logits show here before anything breaks."""
    return o["score_max"]


@column(formula="mean of s over all visible (query, key) pairs; null where score_max is", nullable=True, group="scores")
def score_mean(o: HeadQuantities) -> Values:
    """The mean attention logit."""
    return o.ratio(o["score"], o["pairs"])


@column(
    formula="population deviation of s over all visible (query, key) pairs",
    bounds=(0, None),
    nullable=True,
    group="scores",
)
def score_std(o: HeadQuantities) -> Values:
    """How far apart the attention logits are; rows' variances are pooled about the common mean."""
    return np.sqrt(np.maximum(o.ratio(o["score_squared"], o["pairs"]) - o.ratio(o["score"], o["pairs"]) ** 2, 0))


@column(formula="mean of ‖c_i‖, c_i = Σ_j p v_j before W_O", bounds=(0, None), nullable=True, group="norms")
def context_norm(o: HeadQuantities) -> Values:
    """How much the head carries before the output projection."""
    return o.mean("context_norm")


@column(formula="mean of ‖c_i W_O^h‖", bounds=(0, None), nullable=True, group="norms")
def output_norm(o: HeadQuantities) -> Values:
    """The size of the head's own write into the residual stream; null where no output projection was found."""
    return o.mean("output_norm")


@column(
    formula="Σ_i p[i,0]·‖v_0 W_O^h‖ / Σ_i Σ_j p·‖v_j W_O^h‖",
    bounds=(0, 1),
    reference="Kobayashi 2020",
    nullable=True,
    group="sinks",
)
def value_weighted_first(o: HeadQuantities) -> Values:
    """The first token's share of what is written: a sink that writes nothing is far below mass_first."""
    return o.ratio(o["written_first"], o["written"])


@column(
    formula="mean of Σ p over massive keys: max|x| ≥ 100, and ≥ 1,000 times the median |x| of the sequence, x the stream that the "
    "layer's attention reads; null where no stream is known",
    bounds=(0, 1),
    reference="Sun 2024",
    nullable=True,
    core=False,
    group="sinks",
)
def mass_massive(o: HeadQuantities) -> Values:
    """Weight on tokens with massive activations."""
    return o.ratio(o["massive"], o["rows"])


@column(
    formula="mean of ‖q_i‖, as the attention call receives it, after rotation and normalisation; "
    "null where the call has no queries and keys",
    bounds=(0, None),
    nullable=True,
    core=False,
    group="norms",
)
def query_norm(o: HeadQuantities) -> Values:
    """The size of the queries: with that of the keys, the scale of the scores."""
    return o.mean("query_norm")


@column(
    formula="mean over the sequence's tokens of ‖k_j‖, as query_norm; keys of grouped heads count for each query head",
    bounds=(0, None),
    nullable=True,
    core=False,
    group="norms",
)
def key_norm(o: HeadQuantities) -> Values:
    """The size of the keys."""
    return o.ratio(o["key_norm"], o["keys"])


@column(
    formula="mean over the sequence's tokens of ‖v_j W_O^h‖", bounds=(0, None), nullable=True, core=False, group="norms"
)
def value_norm(o: HeadQuantities) -> Values:
    """How much a token would write if it had all of the attention."""
    return o.ratio(o["value_norm"], o["keys"])


@column(
    formula="‖v_0 W_O^h‖ / mean over j ≥ 1 of ‖v_j W_O^h‖; null if n = 1",
    bounds=(0, None),
    reference="Gu 2025",
    nullable=True,
    core=False,
    group="sinks",
)
def value_ratio_first(o: HeadQuantities) -> Values:
    """Whether the first token would write less than others: far below 1 where a sink writes nothing (value drain)."""
    return o.ratio(o["value_norm_first"] * (o["keys"] - 1), o["value_norm"] - o["value_norm_first"])


@column(
    formula="number of keys j with α_j > 0.3, α_j = Σ_i p[i,j] / (rows that see j), among keys that at least half of the "
    "measured rows see",
    unit="keys",
    dtype="int64",
    bounds=(0, "n"),
    reference="Gu 2025",
    nullable=True,
    averaged=True,
    core=False,
    group="sinks",
    known={"U": "0", "I": "0", "F": "1"},
    elsewhere="Gu 2025 (sail-sg/Attention-Sink): keys with α > 0.3, where α of a later key is divided by the rows that can see it",
)
def sink_keys(o: HeadQuantities) -> Values:
    """How many keys are sinks, wherever they are."""
    return o["sink_keys"]


@column(
    formula="mean of ln p[i,i] over rows with p[i,i] > 0; null where score_max is",
    unit="nats",
    bounds=(None, 0),
    reference="LLM-Check 2024",
    nullable=True,
    core=False,
    group="scores",
    known={"U": "−ln n", "C": "−ln(n!)/n", "I": "0"},
)
def mean_log_self(o: HeadQuantities) -> Values:
    """The log-determinant of a causal pattern, divided by its rows."""
    return o.ratio(o["log_self"], o["log_self_rows"])


_OF_NEEDLE = partial(
    column, bounds=(0, 1), reference="Wu 2024", nullable=True, core=False, corpus="needle", group="what it looks at"
)
_READERS = (
    "the rows that read the answer: of decoders those before the answer's tokens, which predict them; of encoders the rows of the "
    "answer's own tokens"
)


@_OF_NEEDLE(
    formula=f"share of the rows that read the answer whose largest p falls on a token of the needle; {_READERS}"
)
def retrieval_score(o: HeadQuantities) -> Values:
    """Whether the head looks at the needle while the answer is read, the answer being in the input (teacher forcing)."""
    return o.ratio(o["retrieved"], o["reading_rows"])


@_OF_NEEDLE(
    formula="share of the rows that read the answer whose largest p falls on the token of the needle with the id that the row "
    "reads; rows as retrieval_score; null without ids",
    elsewhere="Wu 2024's retrieval score takes the same criterion while the model generates, divided by the tokens of the needle",
)
def retrieval_copy_score(o: HeadQuantities) -> Values:
    """Whether the head looks at the very token that is to be copied: Wu's criterion, as a share of the answer's tokens."""
    return o.ratio(o["copied"], o["reading_rows"])


_sampled = partial(column, nullable=True, core=False, sample=True, group="sample")
_OF_SAMPLE = "; null outside the sample"


@_sampled(formula=f"mean of the fewest keys with half of the row's mass{_OF_SAMPLE}", unit="keys", bounds=(1, "n"))
def keys_for_half_mass(o: HeadQuantities) -> Values:
    """How many keys matter to a row, however long its tail."""
    return o.mean("keys_for_half_mass")


@_sampled(formula=f"mean of the fewest keys with 0.9 of the row's mass{_OF_SAMPLE}", unit="keys", bounds=(1, "n"))
def keys_for_90_mass(o: HeadQuantities) -> Values:
    """How many keys have to be kept to lose a tenth of the attention."""
    return o.mean("keys_for_90_mass")


@_sampled(
    formula=f"mean of Σ_j Σ_k |p_j − p_k| / (2 m_i Σ_j p) over visible keys{_OF_SAMPLE}",
    bounds=(0, 1),
    known={"U": "0", "C": "0", "I": "(n−1)/n", "P": "(n−1)/n", "F": "(n−1)/n"},
)
def gini(o: HeadQuantities) -> Values:
    """How unequal the weights of a row are: 0 if they are equal, (m − 1)/m if one key has all."""
    return o.mean("gini")


@_sampled(formula=f"mean of the sum of the 4 largest p{_OF_SAMPLE}", bounds=(0, 1))
def mass_top_4(o: HeadQuantities) -> Values:
    """Weight of the 4 strongest keys of each row."""
    return o.mean("mass_top_4")


@_sampled(formula=f"mean of the sum of the 16 largest p{_OF_SAMPLE}", bounds=(0, 1))
def mass_top_16(o: HeadQuantities) -> Values:
    """Weight of the 16 strongest keys of each row."""
    return o.mean("mass_top_16")


@_sampled(formula=f"mean of the sum of the 64 largest p{_OF_SAMPLE}", bounds=(0, 1))
def mass_top_64(o: HeadQuantities) -> Values:
    """Weight of the 64 strongest keys of each row."""
    return o.mean("mass_top_64")


@_sampled(formula=f"mean of Σ p over j < 4 or i − 64 < j ≤ i{_OF_SAMPLE}", bounds=(0, 1), reference="Xiao 2024")
def mass_streaming(o: HeadQuantities) -> Values:
    """Weight of the keys that streaming with 4 sinks and a window of 64 would keep."""
    return o.mean("mass_streaming")


_NORM_WEIGHTED = "q_j = p_j·‖v_j W_O^h‖ / Σ_k p_k·‖v_k W_O^h‖"


@_sampled(
    formula=f"mean of −Σ q ln q, {_NORM_WEIGHTED}{_OF_SAMPLE}",
    unit="nats",
    bounds=(0, "ln n"),
    reference="Kobayashi 2020",
)
def norm_entropy_nats(o: HeadQuantities) -> Values:
    """How spread a row's attention is, each key counted by what it writes."""
    return o.ratio(o["norm_entropy"], o["norm_rows"])


@_sampled(
    formula=f"mean of Σ q·|d|, {_NORM_WEIGHTED}{_OF_SAMPLE}",
    unit="tokens",
    bounds=(0, "n−1"),
    reference="Kobayashi 2020",
)
def norm_distance_tokens(o: HeadQuantities) -> Values:
    """From how far the head writes."""
    return o.ratio(o["norm_distance"], o["norm_rows"])


@_sampled(formula=f"mean of max q, {_NORM_WEIGHTED}{_OF_SAMPLE}", bounds=("1/n", 1), reference="Kobayashi 2020")
def norm_max_weight(o: HeadQuantities) -> Values:
    """The largest share of what is written in a row."""
    return o.ratio(o["norm_max_weight"], o["norm_rows"])


@_sampled(
    formula="exp of the entropy of σ²/Σσ², σ the singular values of p over the measured rows and the sequence's tokens; null over "
    f"windows{_OF_SAMPLE}",
    bounds=(1, "n"),
    reference="Roy 2007",
    by_name=True,
    known={"U": "1", "I": "n", "P": "n·4^(−1/n)", "F": "1"},
    elsewhere="from scipy.linalg.svdvals(p)",
)
def pattern_effective_rank(o: HeadQuantities) -> Values:
    """How many directions the pattern has: 1 if all rows look alike, n if each has keys of its own. Costs ten plain passes of
    MiniLM and more for a sequence of 512 tokens.
    """
    return o["pattern_rank"]


@column(
    formula="rows measured",
    unit="rows",
    dtype="int64",
    bounds=(0, "n"),
    group="rows",
    example="SELECT layer, head, SUM(query_rows) AS query_rows FROM heads GROUP BY ALL ORDER BY ALL LIMIT 5",
)
def query_rows(o: HeadQuantities) -> Values:
    """How many rows the means are over: the weight of this row in any mean over sequences."""
    return o["rows"]


@column(
    formula="rows with m_i = 0",
    unit="rows",
    dtype="int64",
    bounds=(0, "n"),
    group="rows",
    example="SELECT layer, head, SUM(masked_rows) AS masked_rows FROM heads GROUP BY ALL ORDER BY ALL LIMIT 5",
)
def masked_rows(o: HeadQuantities) -> Values:
    """Rows that may see nothing, left out of every mean."""
    return o["masked"]


@column(
    formula="rows with a non-finite score among visible keys",
    unit="rows",
    dtype="int64",
    bounds=(0, "n"),
    group="rows",
    example="SELECT layer, head, SUM(nonfinite_rows) AS nonfinite_rows FROM heads GROUP BY ALL ORDER BY ALL LIMIT 5",
)
def nonfinite_rows(o: HeadQuantities) -> Values:
    """Rows whose scores overflowed or are NaN, left out of every mean."""
    return o["nonfinite"]


class HeadRecorder(DenseRecorder):
    """Keeps the head quantities of every layer; columns are worked out from them once per shard."""

    def keep_heads(self, layer: Any, sums: Any, calls: Any) -> Mapping[str, Tensor]:
        return {"values": sums.values}

    def keep_state(self, site: Any, o: ResidualObservation) -> Mapping[str, Tensor] | None:
        asked = "massive" in self.scope.needs.head_quantities
        return {"massive": o.massive_mass} if asked and o.massive_mass is not None else None

    def add(self, place: Any, sequences: np.ndarray, kept: Mapping[str, np.ndarray]) -> None:
        """Of a residual site only the mass on massive keys is kept, a head quantity of its attention layer."""
        if "massive" in kept:
            place = next(layer for layer in self._values if (layer.stack, layer.layer) == place.attention)
            self._values[place][self.scope.needs.head_names.index("massive"), sequences] = kept["massive"]
        else:
            super().add(place, sequences, kept)

    def facts(self, values: np.ndarray) -> dict[str, Values]:
        quantities = HeadQuantities(self.scope.needs.head_names, values)
        return {c.name: c.compute(quantities) for c in self.scope.columns if c.compute is not None}


def _needs(columns: Sequence[Column]) -> Needs:
    quantities = quantities_of(columns)
    reads_stream = "massive" in quantities
    return Needs(head_quantities=quantities, patterns=reads_stream, calls=reads_stream, states=reads_stream)


def _sum_is_not_one(*names: str) -> str:
    terms = " + ".join(f"CAST({name} AS DOUBLE)" for name in names)
    return f"query_rows > 0 AND ABS({terms} + COALESCE(CAST(mass_sink AS DOUBLE), 0) - 1) > 0.0001"


TABLE = Table(
    name="heads",
    row="sequence × stack × layer × head",
    kind="dense",
    weight="query_rows",
    keys=(SEQUENCE_ID, DOCUMENT_ID, STACK, LAYER, HEAD),
    facts=columns_of(dict(globals())),
    order=("stack", "layer", "head", "sequence_id"),
    needs=_needs,
    recorder=HeadRecorder,
    example=(
        "SELECT stack, layer, head, SUM({column} * query_rows) / SUM(query_rows) FILTER ({column} IS NOT NULL) AS {column} "
        "FROM {table} GROUP BY ALL ORDER BY {column} DESC LIMIT 5"
    ),
    outcome="mass_sink",
    rules=(
        Rule("class masses", _sum_is_not_one(*CLASS_MASSES), "the token classes do not sum to 1"),
        Rule(
            "masses",
            _sum_is_not_one("mass_self", "mass_backward", "mass_forward"),
            "self, backward and forward do not sum to 1",
        ),
        Rule(
            "rows",
            "of_tokens AND query_rows + masked_rows + nonfinite_rows <> n",
            "measured, masked and non-finite rows are not the tokens",
        ),
    ),
)
