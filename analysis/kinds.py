"""Head kinds: what each head mostly does, by explicit thresholds, corrected for chance, with the agreement of replicates.

A head has two labels. Its share **at rest** is the attention on the first token, or on massive tokens where these were measured
(attention sinks, Xiao 2024; Sun 2024; Gu 2025). What it does **awake** is judged by its masses over the rest of its attention:
an induction head rests wherever there is nothing to copy. Every share is corrected for chance, (share − even)/(1 − even), where even is
what a head that attends evenly shows on the same sequences (`attlas.analysis.chance`). Row 0 of causal heads, which sees itself alone,
is left out. All of this speaks of the documents that were measured, not of sequences of other lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from attlas.analysis.chance import COPIES, MASSIVE, Chance, chance_of
from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD, head_estimates
from attlas.analysis.summaries import averaged_columns
from attlas.extract.tables import CLASS_MASSES

Floats = NDArray[np.float64]
MIN_TOKENS = 16  # in shorter sequences chance alone gives most heads a kind
MAX_SHORT_SHARE = 0.1  # of all rows, in shorter sequences
MIN_AWAKE = 0.005  # of a head's attention
MOSTLY = 0.9  # of the attention at rest, for a head that rests on the first token rather than on massive ones
FIRM_AGREEMENT = 0.95


@dataclass(frozen=True)
class Kind:
    """A kind of head: a share of its attention is at least, or a column's mean at most, `threshold`.

    `part`: rest, a share of all attention; awake, of the attention that is not at rest; shape, a plain column.
    """

    name: str
    column: str
    part: Literal["rest", "awake", "shape"]
    side: Literal["≥", "≤"]
    threshold: float
    meaning: str

    @property
    def rule(self) -> str:
        formula = {"rest": self.column, "awake": f"{self.column} / (1 − rest)", "shape": self.column}[self.part]
        return f"{formula} {self.side} {self.threshold:g}"


# these come before all others; `sinks` if less than MOSTLY of the attention at rest is on the first token
REST_KINDS = (
    Kind("first", "mass_first", "rest", "≥", 0.3, "rests on the first token"),
    Kind("sinks", "mass_massive", "rest", "≥", 0.3, "rests on massive tokens, wherever they are"),
)
# if several apply, the one farthest beyond its threshold wins
AWAKE_KINDS = (
    Kind("previous", "mass_previous", "awake", "≥", 0.4, "looks at the token before"),
    Kind("next", "mass_next", "awake", "≥", 0.4, "looks at the token after"),
    Kind("self", "mass_self", "awake", "≥", 0.4, "looks at the token itself"),
    Kind("separator", "mass_separator", "awake", "≥", 0.4, "looks at separators"),
    Kind("delimiter", "mass_whitespace", "awake", "≥", 0.4, "looks at line ends and white space"),
    Kind("punctuation", "mass_punctuation", "awake", "≥", 0.5, "looks at punctuation and symbols"),
    Kind("same-token", "mass_same_token", "awake", "≥", 0.25, "looks at other copies of the same token"),
    Kind("induction", "mass_induction", "awake", "≥", 0.25, "looks at what followed an earlier copy"),
)
# the first that applies, only if no other kind does; of heads at rest these columns say where they rest
SHAPE_KINDS = (
    Kind(
        "local",
        "distance_vs_uniform",
        "shape",
        "≤",
        0.35,
        "stays near: at most about a third of the distance of an even head",
    ),
    Kind("broad", "entropy_normalized", "shape", "≥", 0.85, "looks almost evenly at everything it may see"),
)
KINDS = (*REST_KINDS, *AWAKE_KINDS, *SHAPE_KINDS)
MIXED = "mixed"
NAMES = (*(k.name for k in KINDS), MIXED)
POSITIONAL = ("previous", "next", "self")
_AT_REST = REST_KINDS[0].threshold


def kinds_table() -> pl.DataFrame:
    """The kinds with their thresholds. Shares of `mass_…` are corrected for chance."""
    rows = [
        *((k.name, k.rule, k.part, k.column, k.threshold, k.meaning) for k in KINDS),
        (MIXED, "none of these", None, None, None, "no one thing dominates"),
    ]
    return pl.DataFrame(rows, schema=["kind", "rule", "part", "column", "threshold", "meaning"], orient="row")


@dataclass(frozen=True)
class Shares:
    """Shares of heads' attention, arrays of one shape.

    `rest` and `awake` are corrected for chance (awake: by kind); `at_rest` is not. `is_first`: most of the rest is on the first token.
    `shapes`: means of the columns of SHAPE_KINDS. Unknown values are NaN.
    """

    rest: Floats
    at_rest: Floats
    is_first: NDArray[np.bool_]
    awake: Mapping[str, Floats]
    shapes: Mapping[str, Floats]

    @property
    def is_at_rest(self) -> NDArray[np.bool_]:
        return self.rest >= _AT_REST

    @property
    def is_awake(self) -> NDArray[np.bool_]:
        """Whether enough of the attention is awake to say what it does."""
        return ~(1 - self.at_rest < MIN_AWAKE)

    def excess(self) -> Floats:
        """How far each of AWAKE_KINDS is beyond its threshold [kind, head]: 1 at the threshold, 0 if it is not known."""
        return np.stack([np.nan_to_num(np.maximum(self.awake[k.name], 0)) / k.threshold for k in AWAKE_KINDS])


def shares_of(means: Mapping[str, Floats], chance: Chance, overlap: Mapping[str, Floats]) -> Shares:
    """The shares of heads with these mean masses. overlap: as `overlap_of` gives it, of the estimates."""
    first = means["mass_first"]
    at_rest = np.fmax(first, means[MASSIVE])
    rest = np.nan_to_num(at_rest)  # a head whose mass on the first token is not defined is awake
    even = np.nan_to_num(chance.levels["mass_first"])
    awake = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for kind in AWAKE_KINDS:
            # row 0 of causal heads attends to itself, and is all at rest
            mass = means[kind.column] - (chance.lone if kind.name == "self" else 0)
            level = chance.levels[kind.column]
            share, of_even = (
                np.clip((m - _on_rest(kind, overlap[kind.name], r)) / (1 - whole), 0, 1)
                for m, r, whole in ((mass, rest - chance.lone, rest), (level, even, even))
            )
            awake[kind.name] = _corrected(share, of_even)
        corrected = _corrected((at_rest - chance.lone) / (1 - chance.lone), even)
    shapes = {kind.column: means[kind.column] for kind in SHAPE_KINDS}
    return Shares(corrected, at_rest, ~(first < MOSTLY * at_rest), awake, shapes)


def _corrected(share: Floats, even: Floats) -> Floats:
    """A share corrected for chance: 0 for an even head, 1 for all of the attention."""
    return (share - even) / (1 - even)


def _on_rest(kind: Kind, overlap: Floats, rest: Floats) -> Floats:
    """How much of the mass at rest counts as the kind's mass, too."""
    rest = np.maximum(rest, 0)
    return np.minimum(rest, overlap) if kind.name in POSITIONAL else overlap * rest


def overlap_of(means: Mapping[str, Floats], chance: Chance, stacks: Sequence[str]) -> dict[str, Floats]:
    """How much of the mass at rest can be the mass of each of AWAKE_KINDS, too.

    Of `previous`, and of `self` in heads that see both sides, at most one row of each sequence, as a mass: the first token is the one before
    the second, and itself. Of the others a share of the mass at rest: at most the least ratio of the two masses over the
    heads of a stack, and at most what is not on tokens that begin sequences (mass_bos), which are of no other class.
    """
    first = means["mass_first"]
    rest = np.fmax(first, means[MASSIVE])
    with np.errstate(divide="ignore", invalid="ignore"):
        not_opening = 1 - means["mass_bos"] / rest
        ratios = {k.name: means[k.column] / rest for k in AWAKE_KINDS}
    causal = chance.lone > 0
    found = {"previous": chance.opening, "next": np.zeros(len(first)), "self": np.where(causal, 0, chance.opening)}
    for name in (k.name for k in AWAKE_KINDS if k.name not in POSITIONAL):
        bound = np.fmin(_least(ratios[name], stacks), _largest(not_opening, stacks))
        found[name] = np.clip(np.nan_to_num(bound, nan=1.0, posinf=1.0), 0, 1)
    return found


def _least(values: Floats, stacks: Sequence[str]) -> Floats:
    least = pl.col("value").fill_nan(None).min().over("stack")
    return pl.DataFrame({"stack": stacks, "value": values}).select(least).to_series().to_numpy()


def _largest(values: Floats, stacks: Sequence[str]) -> Floats:
    return -_least(-values, stacks)


def classify(shares: Shares) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The kind of every head and what it does awake, as indices into NAMES."""
    excess = shares.excess()
    best = excess.argmax(0)
    has_best = np.take_along_axis(excess, best[None], 0)[0] >= 1
    awake = np.full(shares.rest.shape, NAMES.index(MIXED))
    for kind in reversed(SHAPE_KINDS):
        values = shares.shapes[kind.column]
        applies = values >= kind.threshold if kind.side == "≥" else values <= kind.threshold
        awake = np.where(applies & ~shares.is_at_rest, NAMES.index(kind.name), awake)
    awake = np.where(has_best, best + len(REST_KINDS), awake)
    rests = np.where(shares.is_first, NAMES.index("first"), NAMES.index("sinks"))
    return np.where(shares.is_at_rest, rests, awake), awake


@dataclass(frozen=True)
class HeadShares:
    """The shares of all heads of a dataset, in the order of `heads`.

    `means` and `errors` are NaN where unknown, `freedom` holds the degrees of freedom of the errors.
    """

    heads: pl.DataFrame
    means: Mapping[str, Floats]
    errors: Mapping[str, Floats]
    freedom: Floats
    chance: Chance
    refusal: str | None

    @classmethod
    def of(cls, dataset: Dataset, estimates: pl.DataFrame | None = None) -> HeadShares:
        """From the summaries of a dataset; estimates: what `head_estimates` gives, if it is at hand."""
        if estimates is None:
            present = set(averaged_columns(dataset, "heads"))
            estimates = head_estimates(dataset, sorted(set(_COLUMNS) & present))
        heads = estimates.group_by(HEAD).agg(pl.col("effective_documents").max()).sort(HEAD)
        means, errors = _wide(estimates, heads, "estimate"), _wide(estimates, heads, "se")
        chance = chance_of(dataset, means)
        freedom = heads["effective_documents"].cast(pl.Float64).to_numpy() - 1
        return cls(heads.select(HEAD), _arrays(means), _arrays(errors), freedom, chance, refusal(dataset))

    @cached_property
    def overlap(self) -> dict[str, Floats]:
        return overlap_of(self.means, self.chance, self.heads["stack"].to_list())

    @cached_property
    def shares(self) -> Shares:
        return shares_of(self.means, self.chance, self.overlap)

    def frame(self) -> pl.DataFrame:
        """A row per head: `rest`, `is_at_rest`, and `awake_<kind>` of AWAKE_KINDS, each corrected for chance."""
        shares = self.shares
        return self.heads.with_columns(
            _series("rest", shares.rest),
            pl.Series("is_at_rest", shares.is_at_rest),
            *(_series(f"awake_{name}", np.where(shares.is_awake, v, np.nan)) for name, v in shares.awake.items()),
        )

    def agreement(self, *, replicates: int, seed: int) -> tuple[Floats, Floats]:
        """The shares of replicates that give a head the same kind, and the same doing awake; NaN without errors.

        Each replicate draws every mean anew: Student's t with the error's degrees of freedom, times the error, around the
        estimate. mass_first and mass_massive, which are mostly of the same keys, share a draw; others are independent, although a
        head's masses vary together: this makes the labels of heads that are hardly awake seem less firm than they are.
        """
        random = np.random.default_rng(seed)
        labels = classify(self.shares)
        same = np.zeros((2, self.heads.height))
        has_error = np.any([np.isfinite(e) for e in self.errors.values()], axis=0) & (self.freedom >= 1 - 1e-9)
        freedom = np.where(has_error, np.maximum(self.freedom, 1), 1.0)
        for _ in range(replicates):
            t = {name: random.standard_t(freedom) for name in self.means}
            t[MASSIVE] = t["mass_first"]
            drawn = {name: mean + np.nan_to_num(self.errors[name]) * t[name] for name, mean in self.means.items()}
            masses = {name: np.clip(v, 0, 1) if name.startswith("mass_") else v for name, v in drawn.items()}
            same += np.equal(classify(shares_of(masses, self.chance, self.overlap)), labels)
        kind, awake = np.where(has_error, same / replicates, np.nan)
        return kind, awake


_COLUMNS = tuple(dict.fromkeys([*(k.column for k in KINDS), *CLASS_MASSES, *COPIES]))


def _wide(estimates: pl.DataFrame, heads: pl.DataFrame, field: str) -> pl.DataFrame:
    """One field of estimates with a column for each statistic; null for those that the dataset lacks."""
    rows = estimates.filter(pl.col("column").is_in(_COLUMNS)).pivot("column", index=HEAD, values=field)
    missing = [pl.lit(None, pl.Float64).alias(name) for name in _COLUMNS if name not in rows.columns]
    return heads.select(HEAD).join(rows.with_columns(missing), on=HEAD, how="left", maintain_order="left")


def _arrays(frame: pl.DataFrame) -> dict[str, Floats]:
    return {name: frame[name].cast(pl.Float64).to_numpy() for name in _COLUMNS}


def _series(name: str, values: Floats) -> pl.Series:
    return pl.Series(name, values, dtype=pl.Float64, nan_to_null=True)


def refusal(dataset: Dataset) -> str | None:
    """Why the heads of a dataset have no kinds; None if they have."""
    tokens, is_short = pl.col("tokens"), pl.col("tokens") < MIN_TOKENS
    sums = dataset.scan("sequences").select(short=tokens.filter(is_short).sum(), all=tokens.sum()).collect()
    short, total = sums.row(0)
    if short <= MAX_SHORT_SHARE * total:
        return None
    return (
        f"kinds need sequences of at least {MIN_TOKENS} tokens; {100 * short / total:.0f} % of the tokens are in shorter ones, "
        "where chance alone gives most heads a kind"
    )


def head_kinds(
    dataset: Dataset, *, replicates: int = 200, seed: int = 0, shares: HeadShares | None = None
) -> pl.DataFrame:
    """The kind of every head, and what it does with the attention that is not at rest: a row per head.

    `kind`: first or sinks for a head at rest, else what it does awake. `rest`: the share at rest, corrected for chance. `awake`: what it
    does awake, and `awake_share` the corrected share of it that makes it so. `agreement`, `awake_agreement`: the share of replicates that give the
    same; null without errors. `reason`: why there is no kind, or nothing awake. `awake_<kind>`: every share, corrected for chance.
    shares: if they are at hand.
    """
    measured = HeadShares.of(dataset) if shares is None else shares
    kind, awake = classify(measured.shares)
    agreement, awake_agreement = measured.agreement(replicates=replicates, seed=seed)
    names, is_refused = np.array(NAMES), pl.lit(measured.refusal is not None)
    labels = measured.frame().with_columns(
        pl.Series("kind", names[kind]),
        _series("agreement", agreement),
        pl.Series("awake", names[awake]),
        _series("awake_share", _share_behind(measured.shares, awake)),
        _series("awake_agreement", awake_agreement),
        pl.Series("is_awake", measured.shares.is_awake),
    )
    asleep = f"less than {100 * MIN_AWAKE:g} % of its attention is awake"
    reason = pl.when(is_refused).then(pl.lit(measured.refusal)).when(~pl.col("is_awake")).then(pl.lit(asleep))
    return labels.select(
        *HEAD,
        *(pl.when(~is_refused).then(name).alias(name) for name in ("kind", "agreement")),
        "rest",
        *(
            pl.when(~is_refused & pl.col("is_awake")).then(name).alias(name)
            for name in ("awake", "awake_share", "awake_agreement")
        ),
        reason.alias("reason"),
        "is_at_rest",
        *(f"awake_{k.name}" for k in AWAKE_KINDS),
    )


def _share_behind(shares: Shares, awake: NDArray[np.intp]) -> Floats:
    """The share that makes heads what they are awake; NaN for those that are of no one of AWAKE_KINDS."""
    of_kinds = np.stack([shares.awake[k.name] for k in AWAKE_KINDS])
    number = awake - len(REST_KINDS)
    has_share = (number >= 0) & (number < len(AWAKE_KINDS))
    behind = np.take_along_axis(of_kinds, np.where(has_share, number, 0)[None], 0)[0]
    return np.where(has_share, behind, np.nan)
