"""Means with intervals. Tokens of a sequence and sequences of a document depend on each other, so the document is the
sampling unit.

The estimand is the row-weighted mean θ = Σ w·y / Σ w. Its linearised (delta-method) cluster-robust variance over G
documents with Y_d = Σ w·y and W_d = Σ w is G/(G−1) · Σ_d (Y_d − θ W_d)² / (Σ W_d)²; the interval takes Student's t with
G − 1 degrees of freedom. Source: Cochran 1977, Sampling Techniques, §6.3 (ratio estimators) and §9A (clusters).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from attlas.analysis.weighting import SUM, WEIGHT, document_sums

CONFIDENCE = 0.95
NOTE_FEW = "fewer than 2 documents: an estimate without an interval"
_CHUNK = 64  # bootstrap replicates at a time: bounds the matrix of weights


def clustered_mean(
    frame: pl.LazyFrame,
    columns: Sequence[str],
    by: Sequence[str],
    *,
    weight: str = "weight",
    confidence: float = CONFIDENCE,
) -> pl.LazyFrame:
    """Row-weighted means by group: `<col>`, `<col>_low`, `<col>_high`, `<col>_se`, `documents`, `note`.

    `frame` has `document_id` and the weight. Rows where a column is null count for the other columns only. A group of
    one document has its estimate, null intervals and a note.
    """
    sums = document_sums(frame, columns, by, weight=weight)
    measures = [expression for name in columns for expression in _moments(name)]
    moments = sums.group_by(by).agg(*measures, documents=(pl.col(WEIGHT) > 0).sum().cast(pl.Int64))
    ordered = [f"{name}{suffix}" for name in columns for suffix in ("", "_low", "_high", "_se")]
    return (
        moments.with_columns(*(_margin(name, confidence) for name in columns))
        .with_columns(
            *((pl.col(name) - pl.col(f"{name}|margin")).alias(f"{name}_low") for name in columns),
            *((pl.col(name) + pl.col(f"{name}|margin")).alias(f"{name}_high") for name in columns),
            note=pl.when(pl.col("documents") < 2).then(pl.lit(NOTE_FEW)),
        )
        .select(*by, *ordered, "documents", "note")
        .sort(by)
    )


def _moments(name: str) -> tuple[pl.Expr, pl.Expr, pl.Expr]:
    """Estimate, standard error and number of documents of one column, inside a group of document sums."""
    total, weight = pl.col(name + SUM), pl.col(name + WEIGHT)
    theta = total.sum() / weight.sum()
    groups = (weight > 0).sum().cast(pl.Float64)
    # about θ before squaring: expanding the square would cancel all digits of a nearly constant column
    squares = ((total - weight * theta) ** 2).sum()
    error = pl.when(groups >= 2).then((groups / (groups - 1) * squares).sqrt() / weight.sum())
    return theta.fill_nan(None).alias(name), error.alias(f"{name}_se"), groups.alias(f"{name}|documents")


def _margin(name: str, confidence: float) -> pl.Expr:
    def quantile(documents: pl.Series) -> pl.Series:
        return pl.Series(documents.name, student_quantile(documents.to_numpy() - 1, confidence), nan_to_null=True)

    t = pl.col(f"{name}|documents").map_batches(quantile, return_dtype=pl.Float64)
    return (t * pl.col(f"{name}_se")).alias(f"{name}|margin")


def student_quantile(freedom: NDArray[np.floating], confidence: float) -> NDArray[np.float64]:
    """Two-sided quantile of Student's t; NaN without a degree of freedom."""
    from scipy.special import stdtrit

    known = np.where(freedom >= 1, freedom, 1.0)
    return np.where(freedom >= 1, stdtrit(known, 0.5 + confidence / 2), np.nan)


@dataclass(frozen=True)
class Replicates:
    """Bootstrap means of some groups: `means[column]` is Float64[replicate, group], NaN where undefined."""

    groups: pl.DataFrame
    documents: NDArray[np.int64]
    estimates: Mapping[str, NDArray[np.float64]]
    means: Mapping[str, NDArray[np.float64]]


def bootstrap_replicates(
    frame: pl.LazyFrame,
    columns: Sequence[str],
    by: Sequence[str],
    *,
    replicates: int,
    seed: int = 0,
    weight: str = "weight",
) -> Replicates:
    """Row-weighted means under resampling of whole documents, the same resample for every group and column."""
    sums = document_sums(frame, columns, by, weight=weight).collect(engine="streaming")
    groups = sums.select(by).unique().sort(by).with_row_index("_group")
    # sorted, so that the same seed draws the same documents whatever order the group-by gave
    units = sums.select("document_id").unique().sort("document_id").with_row_index("_unit")
    placed = sums.join(groups, on=by).join(units, on="document_id")
    where = (placed["_unit"].to_numpy(), placed["_group"].to_numpy())
    shape = (units.height, groups.height)
    totals = {name: _dense(placed[name + SUM], where, shape) for name in columns}
    weights = {name: _dense(placed[name + WEIGHT], where, shape) for name in columns}
    means = {name: np.empty((replicates, groups.height)) for name in columns}
    random = np.random.default_rng(seed)
    for start in range(0, replicates, _CHUNK):
        size = min(_CHUNK, replicates - start)
        draws = random.multinomial(units.height, np.full(units.height, 1 / units.height), size=size).astype(np.float64)
        for name in columns:
            means[name][start : start + size] = _ratio(draws @ totals[name], draws @ weights[name])
    estimates = {name: _ratio(totals[name].sum(0), weights[name].sum(0)) for name in columns}
    documents = (_dense(placed[WEIGHT], where, shape) > 0).sum(0)
    return Replicates(groups.drop("_group"), documents, estimates, means)


def bootstrap_mean(
    frame: pl.LazyFrame,
    columns: Sequence[str],
    by: Sequence[str],
    *,
    replicates: int = 1000,
    seed: int = 0,
    weight: str = "weight",
    confidence: float = CONFIDENCE,
) -> pl.LazyFrame:
    """As `clustered_mean`, with percentile intervals and standard errors from resampled documents."""
    drawn = bootstrap_replicates(frame, columns, by, replicates=replicates, seed=seed, weight=weight)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    found: dict[str, NDArray[np.float64]] = {}
    for name in columns:
        # a replicate may miss every document in which the column is known
        defined = np.isfinite(drawn.means[name]).any(0) & (drawn.documents >= 2)
        known = np.where(defined, drawn.means[name], 0.0)
        low, high = np.nanquantile(known, tails, axis=0)
        error = np.nanstd(known, axis=0, ddof=1) if replicates > 1 else np.full(defined.shape, np.nan)
        for suffix, values in (("", drawn.estimates[name]), ("_low", low), ("_high", high), ("_se", error)):
            found[name + suffix] = values if suffix == "" else np.where(defined, values, np.nan)
    frame_of = drawn.groups.with_columns(
        *(pl.Series(name, values, nan_to_null=True) for name, values in found.items()),
        pl.Series("documents", drawn.documents, dtype=pl.Int64),
    )
    return frame_of.with_columns(note=pl.when(pl.col("documents") < 2).then(pl.lit(NOTE_FEW))).lazy()


def _dense(values: pl.Series, where: tuple[NDArray, NDArray], shape: tuple[int, int]) -> NDArray[np.float64]:
    matrix = np.zeros(shape)
    matrix[where] = values.to_numpy()
    return matrix


def _ratio(total: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)
