"""`residual`: what one sublayer wrote into the residual stream on one sequence.

x is the stream before the sublayer, F its update, x' = x + F the stream after it (before the next norm). Columns are
means over the sequence's real tokens. At `embedding` and `final_norm` nothing is added: x' is the stream there, and the
columns of x and F are null. Every function takes a `ResidualObservation` and gives a tensor [batch], NaN where
undefined, or None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from attlas.extract.engines.needs import Needs
from attlas.extract.engines.observations import NormObservation, ResidualObservation
from attlas.extract.tables.column import Column, column, columns_of
from attlas.extract.tables.recording import DenseRecorder
from attlas.extract.tables.table import DOCUMENT_ID, LAYER, SEQUENCE_ID, STACK, Table

if TYPE_CHECKING:  # the catalogue is read by commands that need no torch
    from jaxtyping import Float
    from torch import Tensor

    from attlas.extract.engines.stream_profiles import SiteSums

    PerSequence = Float[Tensor, " batch"]

SITE = Column(name="site", dtype="stack", formula="embedding | attention | cross_attention | mlp | final_norm")


@column(formula="mean of ‖x‖", bounds=(0, None), nullable=True, group="the stream and its update")
def stream_norm(o: ResidualObservation) -> PerSequence:
    """Size of the residual stream before the sublayer (at embedding and final_norm: of the stream there)."""
    return o.mean(o.after_norms if o.stream_norms is None else o.stream_norms)


_on_request = partial(column, nullable=True, core=False)
_OF_SAMPLE = "; null outside the sample"


@_on_request(formula="median of ‖x‖", bounds=(0, None), group="the stream and its update")
def stream_norm_median(o: ResidualObservation) -> PerSequence:
    """Size of the stream at a usual token: one massive token makes a mean of norms say nothing about the others."""
    return o.median(o.after_norms if o.stream_norms is None else o.stream_norms)


@column(formula="mean of ‖F(x)‖", bounds=(0, None), nullable=True, group="the stream and its update")
def update_norm(o: ResidualObservation) -> PerSequence | None:
    """Size of the sublayer's update."""
    return None if o.update_norms is None else o.mean(o.update_norms)


@column(
    formula="mean of ‖F‖ / ‖x‖",
    bounds=(0, None),
    nullable=True,
    group="the stream and its update",
    known={"F = −x": "1"},
)
def update_ratio(o: ResidualObservation) -> PerSequence | None:
    """Size of the update against the stream it is added to."""
    if o.update_norms is None or o.stream_norms is None:
        return None
    return o.mean(o.update_norms / o.stream_norms)


@_on_request(formula="median of ‖F‖ / ‖x‖", bounds=(0, None), group="the stream and its update")
def update_ratio_median(o: ResidualObservation) -> PerSequence | None:
    """Size of the update against the stream at a usual token."""
    if o.update_norms is None or o.stream_norms is None:
        return None
    return o.median(o.update_norms / o.stream_norms)


@column(
    formula="mean of cos(x, F)",
    bounds=(-1, 1),
    nullable=True,
    group="the stream and its update",
    known={"F = −x/2": "−1"},
)
def update_cosine(o: ResidualObservation) -> PerSequence | None:
    """Writes something new (≈ 0), sharpens what is there (> 0) or erases it (< 0)."""
    if o.stream is None or o.update is None or o.stream_norms is None or o.update_norms is None:
        return None
    return o.mean(((o.stream * o.update).sum(-1) / (o.stream_norms * o.update_norms)).clamp(-1, 1))


@column(
    formula="mean of cos(x, x')", bounds=(-1, 1), nullable=True, group="the stream and its update", known={"F = x": "1"}
)
def step_cosine(o: ResidualObservation) -> PerSequence | None:
    """How much of the stream's direction survives the sublayer."""
    if o.stream is None or o.stream_norms is None:
        return None
    return o.mean(((o.stream * o.after).sum(-1) / (o.stream_norms * o.after_norms)).clamp(-1, 1))


@column(
    formula="mean of ‖x'‖ / ‖x‖",
    bounds=(0, None),
    nullable=True,
    group="the stream and its update",
    known={"F = x": "2"},
)
def stream_gain(o: ResidualObservation) -> PerSequence | None:
    """How much the sublayer grows the stream."""
    return None if o.stream_norms is None else o.mean(o.after_norms / o.stream_norms)


@column(
    formula="(‖Σu‖² − n)/(n(n−1)), u = x'/‖x'‖; null if n = 1",
    bounds=(-1, 1),
    reference="Ethayarajh 2019",
    nullable=True,
    group="outliers and geometry",
    known={"equal tokens": "1", "orthogonal tokens": "0"},
)
def anisotropy(o: ResidualObservation) -> PerSequence:
    """Mean cosine between the states of different tokens."""
    units = (o.after / o.after_norms[..., None]).where(o.real[..., None], 0)
    n = o.real.sum(-1).to(o.after.dtype)
    pairs = n * (n - 1)
    return (units.sum(1).square().sum(-1) - n) / pairs.where(pairs > 0, math.nan)


@column(
    formula="largest |x'| over tokens and dimensions",
    bounds=(0, None),
    reference="Sun 2024",
    nullable=True,
    group="outliers and geometry",
)
def max_abs(o: ResidualObservation) -> PerSequence:
    """Massive activations."""
    return o.largest.amax(-1)


@column(
    formula="the dimension of max_abs (lowest on ties)",
    unit="dimension",
    dtype="int32",
    bounds=(0, "d−1"),
    nullable=True,
    group="outliers and geometry",
)
def outlier_dim(o: ResidualObservation) -> PerSequence:
    """Where the largest activation sits."""
    is_max = (o.largest == o.largest.amax(-1, keepdim=True)).to(o.after.dtype)
    # the first maximum, on every device: earlier dimensions weigh more
    width = is_max.shape[-1]
    return (is_max * is_max.new_tensor(range(width, 0, -1))).argmax(-1).to(o.after.dtype)


@_on_request(
    formula="the position of max_abs (lowest on ties)",
    unit="position",
    dtype="int32",
    bounds=(0, "n−1"),
    reference="Sun 2024",
    group="outliers and geometry",
)
def max_abs_token(o: ResidualObservation) -> PerSequence:
    """The token that has the largest activation: massive activations sit on few tokens."""
    largest = o.after.abs().amax(-1).where(o.real, -1)
    first = (largest == largest.amax(-1, keepdim=True)).int().argmax(-1)
    return (first - o.start).double().where(largest.amax(-1).isfinite() & o.real.any(-1), math.nan)


@column(
    formula="mean of max|x'| / (‖x'‖/√d)",
    bounds=(1, "√d"),
    nullable=True,
    group="outliers and geometry",
    known={"one-hot tokens": "√d"},
)
def outlier_ratio(o: ResidualObservation) -> PerSequence:
    """How far one dimension stands out of a token's state."""
    return o.mean(o.after.abs().amax(-1) * math.sqrt(o.after.shape[-1]) / o.after_norms)


@column(
    formula="mean of Σx'⁴·d / (Σx'²)²",
    bounds=(1, "d"),
    nullable=True,
    group="outliers and geometry",
    known={"constant tokens": "1", "one-hot tokens": "d"},
    elsewhere="scipy.stats.kurtosis(x, fisher=False) of a state whose mean is 0",
)
def kurtosis(o: ResidualObservation) -> PerSequence:
    """Outlier features of a token's state, no centring."""
    units = o.after / o.after_norms[..., None]  # normalised first: fourth powers overflow float32 early
    return o.mean(units.square().square().sum(-1) * o.after.shape[-1])


@_on_request(
    formula="‖X' − 1 x̄'ᵀ‖_F / ‖X'‖_F over the tokens",
    bounds=(0, 1),
    reference="Dong 2021",
    group="outliers and geometry",
    known={"equal tokens": "0"},
)
def rank_collapse(o: ResidualObservation) -> PerSequence:
    """How much of the states is not shared by all tokens: 0 if they are equal."""
    states, real = o.after, o.real[..., None]
    mean = states.where(real, 0).sum(1, keepdim=True) / o.real.sum(-1)[:, None, None]
    of_tokens = (states - mean).norm(dim=-1), o.after_norms
    centred, whole = (norms.double().where(o.real, 0).norm(dim=-1) for norms in of_tokens)
    return centred / whole


@_on_request(
    formula="mean angle between x'_{t+1} − x'_t and x'_{t+2} − x'_{t+1}; null if n < 3",
    unit="radians",
    bounds=(0, "π"),
    reference="Hosseini 2023",
    group="outliers and geometry",
)
def curvature(o: ResidualObservation) -> PerSequence:
    """How sharply the states turn from token to token: 0 on a straight line, π back and forth."""
    steps = o.after.diff(dim=1)
    units = steps / steps.norm(dim=-1, keepdim=True)
    first, second = units[:, :-1], units[:, 1:]
    # from chords: the arc cosine loses half of the digits of small angles
    angles = 2 * (first - second).norm(dim=-1).atan2((first + second).norm(dim=-1))
    defined = o.real[:, :-2] & o.real[:, 2:] & angles.isfinite()
    return angles.where(defined, 0).sum(-1) / defined.sum(-1)


@_on_request(
    formula=f"exp of the entropy of σ²/Σσ², σ the singular values of X' (tokens × dimensions){_OF_SAMPLE}",
    unit="dimensions",
    bounds=(1, "min(n, d)"),
    reference="Roy 2007",
    group="outliers and geometry",
    sample=True,
    known={"orthogonal tokens": "5", "equal tokens": "1"},
)
def effective_rank(o: ResidualObservation) -> PerSequence:
    """How many dimensions the states of a sequence take up."""
    return o.of_sample(_effective_rank)


def _effective_rank(states: Float[Tensor, "token width"]) -> Float[Tensor, ""]:
    """From the eigenvalues of the smaller Gram matrix, which are the squares of the singular values."""
    from torch import linalg

    states = states.double()
    gram = states @ states.T if len(states) < states.shape[1] else states.T @ states
    if not bool(gram.isfinite().all()):
        return gram.new_tensor(math.nan)
    squares = linalg.eigvalsh(gram).clamp_min(0)
    shares = squares / squares.sum()
    return (-shares.xlogy(shares).sum()).exp()


@column(formula="mean of μ of the site's norm; null for RMSNorm", nullable=True, group="the norm")
def norm_mean(o: ResidualObservation) -> PerSequence | None:
    """Mean entry that the norm subtracts: pre-norm, of the norm that reads x; post-norm, of the one that reads x'."""
    if o.norm is None or o.norm.kind == "rms":
        return None
    return o.mean(o.norm.read.mean(-1))


@column(
    formula="mean of √(σ² + ε) (LayerNorm) or √(mean x² + ε) (RMSNorm)",
    bounds=(0, None),
    nullable=True,
    group="the norm",
)
def norm_scale(o: ResidualObservation) -> PerSequence | None:
    """What the norm divides by."""
    return None if o.norm is None else o.mean(_divisor(o.norm))


@column(
    formula="mean of ‖output‖ / ‖normalised input without γ, β‖",
    bounds=(0, None),
    nullable=True,
    group="the norm",
    known={"γ = 1, β = 0": "1"},
)
def norm_output_gain(o: ResidualObservation) -> PerSequence | None:
    """What the norm's own weights do to the size of the stream."""
    if o.norm is None:
        return None
    return o.mean(o.norm.wrote.norm(dim=-1) * _divisor(o.norm) / _centred(o.norm).norm(dim=-1))


@column(formula="mean of ‖[c¹; …; cʰ]‖ (attention only)", bounds=(0, None), nullable=True, group="heads together")
def heads_concat_norm(o: ResidualObservation) -> PerSequence | None:
    """Size of the heads' contexts side by side: one of the two ways to combine heads."""
    return None if o.contexts is None else o.mean(o.contexts.square().sum((1, 3)).sqrt())


@column(formula="mean of ‖(1/h) Σ_l cˡ‖ (attention only)", bounds=(0, None), nullable=True, group="heads together")
def heads_mean_norm(o: ResidualObservation) -> PerSequence | None:
    """Size of the mean of the heads' contexts: the other way to combine heads."""
    return None if o.contexts is None else o.mean(o.contexts.mean(1).norm(dim=-1))


@column(
    formula="mean cosine between the contexts of different heads; null if h = 1 (attention only)",
    bounds=(-1, 1),
    nullable=True,
    group="heads together",
    known={"equal heads": "1"},
)
def heads_cosine(o: ResidualObservation) -> PerSequence | None:
    """How alike the heads' contexts are at a token."""
    if o.contexts is None or o.contexts.shape[1] < 2:
        return None
    h = o.contexts.shape[1]
    units = o.contexts / o.contexts.norm(dim=-1, keepdim=True)
    return o.mean((units.sum(1).square().sum(-1) - h) / (h * (h - 1)))


@_on_request(
    formula="mean of ‖Σ_h Σ_{j≠i} p v_j W_O^h‖ / (itself + ‖Σ_h p[i,i] v_i W_O^h‖) (attention only); null where the update is "
    "not linear in the contexts",
    bounds=(0, 1),
    reference="Kobayashi 2021",
    group="context against self",
)
def mixing_ratio_attention(o: ResidualObservation) -> PerSequence | None:
    """How much of what attention adds to a token comes from others."""
    return None if o.written is None else _mixing(o, *o.written)


@_on_request(
    formula="mean of ‖Σ_h Σ_{j≠i} p v_j W_O^h‖ / (itself + ‖x_i + Σ_h p[i,i] v_i W_O^h‖) (attention only); null where "
    "mixing_ratio_attention is",
    bounds=(0, 1),
    reference="Kobayashi 2021",
    group="context against self",
)
def mixing_ratio(o: ResidualObservation) -> PerSequence | None:
    """How much of a token's state comes from others: context against the token itself, which the residual connection keeps."""
    if o.written is None or o.stream is None:
        return None
    own, others = o.written
    return _mixing(o, o.stream + own, others)


@_on_request(
    formula="mixing_ratio of both parts after the norm: each centred (LayerNorm) and times γ (attention of post-norm models only)",
    bounds=(0, 1),
    reference="Kobayashi 2021",
    group="context against self",
)
def mixing_ratio_norm(o: ResidualObservation) -> PerSequence | None:
    """How much of what the norm gives to the next layer comes from others."""
    if o.written is None or o.stream is None or o.norm is None or o.norm.gain is None:
        return None
    kind, gain = o.norm.kind, o.norm.gain.to(o.stream.device)
    own, others = o.stream + o.written[0], o.written[1]
    return _mixing(o, *(gain * (x if kind == "rms" else x - x.mean(-1, keepdim=True)) for x in (own, others)))


def _mixing(o: ResidualObservation, own: Tensor, others: Tensor) -> PerSequence:
    size = others.norm(dim=-1)
    return o.mean(size / (size + own.norm(dim=-1)))


@_on_request(
    formula=f"mean of H(mean over heads of p) − mean over heads of H(p) (attention only){_OF_SAMPLE}",
    unit="nats",
    bounds=(0, "ln h"),
    group="heads together",
    sample=True,
)
def head_diversity_nats(o: ResidualObservation) -> PerSequence | None:
    """How differently the heads of a layer look (generalised Jensen–Shannon divergence): 0 if all look alike."""
    mixture = None if o.heads is None else o.heads.rows.get("mixture_entropy")
    if o.heads is None or mixture is None:
        return None
    measured = o.heads.rows.measured.all(1)
    diversity = mixture[:, 0] - o.heads.entropy.mean(1)
    return diversity.clamp_min(0).where(measured, 0).sum(-1) / measured.sum(-1)


def _centred(norm: NormObservation) -> Float[Tensor, "*batch token width"]:
    return norm.read if norm.kind == "rms" else norm.read - norm.read.mean(-1, keepdim=True)


def _divisor(norm: NormObservation) -> Float[Tensor, "*batch token"]:
    return (_centred(norm).square().mean(-1) + norm.epsilon).sqrt()


_MIXING = frozenset({"mixing_ratio_attention", "mixing_ratio", "mixing_ratio_norm"})


def _needs(columns: Sequence[Column]) -> Needs:
    names = {c.name for c in columns}
    mixes = bool(names & _MIXING)
    compares_heads = "head_diversity_nats" in names
    reads_calls = mixes or compares_heads
    return Needs(
        residual={c.name: c.compute for c in columns if c.compute is not None},
        rows=frozenset(
            (
                *(("self_score", "score_max", "max_weight") if mixes else ()),
                *(("mixture_entropy", "entropy") if compares_heads else ()),
            )
        ),
        patterns=reads_calls,
        calls=reads_calls,
        outputs=mixes,
    )


class SiteRecorder(DenseRecorder):
    """Keeps the columns of every site, which capture works out as each site is complete."""

    def keep_site(self, site: Any, sums: SiteSums) -> Mapping[str, Tensor]:
        return {"values": sums.values}

    def facts(self, values: np.ndarray) -> dict[str, np.ndarray]:
        places = {name: place for place, name in enumerate(self.scope.needs.residual_names)}
        return {c.name: values[places[c.name]] for c in self.scope.columns}


TABLE = Table(
    name="residual",
    row="sequence × stack × layer × site",
    kind="dense",
    weight="tokens",
    of_stream=True,
    keys=(
        SEQUENCE_ID,
        DOCUMENT_ID,
        STACK,
        LAYER,
        SITE,
    ),
    facts=columns_of(dict(globals())),
    order=("stack", "layer", "site", "sequence_id"),
    needs=_needs,
    recorder=SiteRecorder,
    example="SELECT stack, layer, site, AVG({column}) AS {column} FROM {table} GROUP BY ALL ORDER BY {column} DESC LIMIT 5",
)
