"""Means with confidence intervals, clustered by document.

The document is the sampling unit, because tokens of a sequence and sequences of a document depend on each other.

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
_CHUNK = 64  # bootstrap replicates at a time, which bounds the size of the weight matrix


def clustered_mean(
    frame: pl.LazyFrame,
    columns: Sequence[str],
    by: Sequence[str],
    *,
    weight: str = "weight",
    confidence: float = CONFIDENCE,
) -> pl.LazyFrame:
    """Row-weighted means by group: `<col>`, `<col>_low`, `<col>_high`, `<col>_se`, `documents`, `note`.

    `frame` has `document_id` and the weight. A row whose value is null in one column still counts for the others. A
    group with a single document gets an estimate, null intervals and a note.
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
    """Estimate, standard error and number of documents of a column, as aggregations of document sums."""
    total, weight = pl.col(name + SUM), pl.col(name + WEIGHT)
    theta = total.sum() / weight.sum()
    groups = (weight > 0).sum().cast(pl.Float64)
    # subtract θ before squaring: the expanded square would cancel all digits of a nearly constant column
    squares = ((total - weight * theta) ** 2).sum()
    error = pl.when(groups >= 2).then((groups / (groups - 1) * squares).sqrt() / weight.sum())
    return theta.fill_nan(None).alias(name), error.alias(f"{name}_se"), groups.alias(f"{name}|documents")


def _margin(name: str, confidence: float) -> pl.Expr:
    def quantile(documents: pl.Series) -> pl.Series:
        return pl.Series(documents.name, student_quantile(documents.to_numpy() - 1, confidence), nan_to_null=True)

    t = pl.col(f"{name}|documents").map_batches(quantile, return_dtype=pl.Float64)
    return (t * pl.col(f"{name}_se")).alias(f"{name}|margin")


def student_quantile(freedom: NDArray[np.floating], confidence: float) -> NDArray[np.float64]:
    """Two-sided quantile of Student's t; NaN for less than one degree of freedom."""
    from scipy.special import stdtrit

    defined = freedom >= 1
    return np.where(defined, stdtrit(np.where(defined, freedom, 1.0), 0.5 + confidence / 2), np.nan)


@dataclass(frozen=True)
class Replicates:
    """Bootstrap means by group: `means[column]` is Float64[replicate, group], NaN where undefined."""

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
    """Row-weighted means of resampled documents; all groups and columns share the same resamples."""
    sums = document_sums(frame, columns, by, weight=weight).collect(engine="streaming")
    groups = sums.select(by).unique().sort(by).with_row_index("_group")
    # sorted, so that a seed draws the same documents whatever the order of the group-by
    units = sums.select("document_id").unique().sort("document_id").with_row_index("_unit")
    indexed = sums.join(groups, on=by).join(units, on="document_id")
    where = (indexed["_unit"].to_numpy(), indexed["_group"].to_numpy())
    shape = (units.height, groups.height)
    totals = {name: _dense_matrix(indexed[name + SUM], where, shape) for name in columns}
    weights = {name: _dense_matrix(indexed[name + WEIGHT], where, shape) for name in columns}
    means = {name: np.empty((replicates, groups.height)) for name in columns}
    random = np.random.default_rng(seed)
    for start in range(0, replicates, _CHUNK):
        size = min(_CHUNK, replicates - start)
        draws = random.multinomial(units.height, np.full(units.height, 1 / units.height), size=size).astype(np.float64)
        for name in columns:
            means[name][start : start + size] = _ratio(draws @ totals[name], draws @ weights[name])
    estimates = {name: _ratio(totals[name].sum(0), weights[name].sum(0)) for name in columns}
    documents = (_dense_matrix(indexed[WEIGHT], where, shape) > 0).sum(0)
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
    """Like `clustered_mean`, with percentile intervals and standard errors from resampled documents."""
    bootstrap = bootstrap_replicates(frame, columns, by, replicates=replicates, seed=seed, weight=weight)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    results: dict[str, NDArray[np.float64]] = {}
    for name in columns:
        # a replicate may miss every document with a value in the column
        defined = np.isfinite(bootstrap.means[name]).any(0) & (bootstrap.documents >= 2)
        means = np.where(defined, bootstrap.means[name], 0.0)
        low, high = np.nanquantile(means, tails, axis=0)
        error = np.nanstd(means, axis=0, ddof=1) if replicates > 1 else np.full(defined.shape, np.nan)
        for suffix, values in (("", bootstrap.estimates[name]), ("_low", low), ("_high", high), ("_se", error)):
            results[name + suffix] = values if suffix == "" else np.where(defined, values, np.nan)
    rows = bootstrap.groups.with_columns(
        *(pl.Series(name, values, nan_to_null=True) for name, values in results.items()),
        pl.Series("documents", bootstrap.documents, dtype=pl.Int64),
    )
    return rows.with_columns(note=pl.when(pl.col("documents") < 2).then(pl.lit(NOTE_FEW))).lazy()


def _dense_matrix(values: pl.Series, where: tuple[NDArray, NDArray], shape: tuple[int, int]) -> NDArray[np.float64]:
    matrix = np.zeros(shape)
    matrix[where] = values.to_numpy()
    return matrix


def _ratio(total: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)
