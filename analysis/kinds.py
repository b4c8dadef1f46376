"""Head kinds: what each head mostly does, by explicit thresholds, with the agreement of resampled documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD, head_means
from attlas.analysis.summaries import averaged_columns


@dataclass(frozen=True)
class Kind:
    """A kind of head: the mean of `column` is at least (or at most) `threshold`."""

    name: str
    column: str
    side: Literal["≥", "≤"]
    threshold: float
    meaning: str

    @property
    def rule(self) -> str:
        return f"{self.column} {self.side} {self.threshold:g}"


# where most of the weight goes; if several kinds apply, the one farthest beyond its threshold wins
TARGET_KINDS = (
    Kind("previous", "mass_previous", "≥", 0.4, "looks at the token before"),
    Kind("next", "mass_next", "≥", 0.4, "looks at the token after"),
    Kind("self", "mass_self", "≥", 0.4, "looks at the token itself"),
    Kind("first", "mass_first", "≥", 0.4, "rests on the first token"),
    Kind("separator", "mass_separator", "≥", 0.4, "rests on separators"),
    Kind("punctuation", "mass_punctuation", "≥", 0.5, "looks at punctuation and symbols"),
    Kind("same-token", "mass_same_token", "≥", 0.25, "looks at other copies of the same token"),
    Kind("induction", "mass_induction", "≥", 0.25, "looks at what followed an earlier copy"),
)
# the first that applies, and only if no target kind does
SHAPE_KINDS = (
    Kind(
        "local", "distance_vs_uniform", "≤", 0.35, "stays near: at most about a third of the distance of an even head"
    ),
    Kind("broad", "entropy_normalized", "≥", 0.85, "looks almost evenly at everything it may see"),
)
KINDS = (*TARGET_KINDS, *SHAPE_KINDS)
MIXED = "mixed"
NAMES = (*(k.name for k in KINDS), MIXED)


def kinds_table() -> pl.DataFrame:
    """The kinds with their thresholds."""
    rows = [(k.name, k.rule, k.meaning) for k in KINDS] + [(MIXED, "none of these", "no one thing dominates")]
    return pl.DataFrame(rows, schema=["kind", "rule", "meaning"], orient="row")


def classify(means: Mapping[str, NDArray[np.float64]]) -> NDArray[np.intp]:
    """Indices into NAMES, in the common shape of the arrays of means; a NaN mean meets no threshold."""
    shape = next(iter(means.values())).shape
    excess = np.stack([_excess(k, means, shape) for k in TARGET_KINDS])
    target = excess.argmax(0)
    has_target = np.take_along_axis(excess, target[None], 0)[0] >= 1
    kinds = np.full(shape, NAMES.index(MIXED))
    for kind in reversed(SHAPE_KINDS):
        kinds = np.where(_excess(kind, means, shape) >= 1, NAMES.index(kind.name), kinds)
    return np.where(has_target, target, kinds)


def _excess(kind: Kind, means: Mapping[str, NDArray[np.float64]], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """How far a mean is beyond its threshold: 1 at the threshold, more beyond it, 0 if it is NaN."""
    values = np.nan_to_num(means.get(kind.column, np.full(shape, np.nan)), nan=-1.0)
    if kind.side == "≥":
        return np.maximum(values, 0) / kind.threshold
    return np.where(values >= 0, kind.threshold / np.maximum(values, 1e-12), 0.0)


def head_kinds(dataset: Dataset, *, replicates: int = 200, seed: int = 0) -> pl.DataFrame:
    """The kind of every head, and `agreement`, the share of replicates that give the same kind.

    A replicate draws every mean anew from the normal distribution around its estimate, with its standard error. `agreement` is
    null for heads without an error.
    """
    present = set(averaged_columns(dataset, "heads"))
    columns = sorted({k.column for k in KINDS} & present)
    means = head_means(dataset, columns)
    random = np.random.default_rng(seed)
    drawn = {}
    for name in columns:
        error = means[f"{name}_se"].cast(pl.Float64).to_numpy()
        drawn[name] = means[name].cast(pl.Float64).to_numpy() + error * random.standard_normal(
            (replicates, means.height)
        )
    kind = classify({name: means[name].cast(pl.Float64).to_numpy() for name in columns})
    agreement = (classify(drawn) == kind).mean(0)
    has_error = np.any([np.isfinite(values).all(0) for values in drawn.values()], axis=0)
    return means.select(
        *HEAD,
        pl.Series("kind", np.array(NAMES)[kind]),
        pl.Series("agreement", np.where(has_error, agreement, np.nan), nan_to_null=True),
    )
