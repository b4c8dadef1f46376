"""Means with confidence intervals, clustered by document, and what is concluded from them.

The document is the sampling unit, because tokens of a sequence and sequences of a document depend on each other.

The estimand is the row-weighted mean θ = Σ w·y / Σ w. Its standard error is the delete-one-document jackknife's: with
Y_d = Σ w·y, W_d = Σ w of document d, W = Σ W_d and u_d = (Y_d − θ W_d) / (W − W_d), which is how much the mean changes without d,
se² = (G − 1)/G · Σ (u_d − ū)² over the G documents. The interval takes Student's t with G_eff − 1 degrees of freedom, where
G_eff = (Σ W_d)² / Σ W_d² is the number of equal documents that these count as. Documents that `summaries` pools take the
mean W_d of all pooled documents (weighted by W_d) in W − W_d, whichever way the sums are read.
Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, §11.5; Cochran 1977, Sampling Techniques, §6.3 and §9A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

CONFIDENCE = 0.95
NOTE_FEW = "fewer than 2 documents: an estimate without an interval"
NOTE_HIDDEN = "fewer than {} documents: not shown"
NOTE_UNEQUAL = "documents so unequal that they count as fewer than 2: an estimate without an interval"
MEANS = ("estimate", "se", "documents", "effective_documents", "rows")
_SUFFIXES = {"estimate": "", "low": "_low", "high": "_high", "se": "_se"}
ESTIMATES = ("estimate", "low", "high", "se", "documents", "effective_documents", "rows", "note")


def estimates(
    summaries: pl.LazyFrame,
    by: Sequence[str],
    *,
    confidence: float = CONFIDENCE,
    comparisons: int = 1,
    min_documents: int = 1,
) -> pl.LazyFrame:
    """Means and intervals of sums over documents: `by`, `column` and ESTIMATES, sorted by them.

    comparisons: how many intervals hold together with this confidence (Bonferroni). `rows` is the weight of a mean: measured rows,
    or tokens. Intervals are null, with a note, for documents that count as fewer than 2, and everything is of fewer than min_documents.
    """
    found = jackknife(summaries, [*by, "column"])
    few = pl.col("documents") < 2
    note = pl.when(few).then(pl.lit(NOTE_FEW)).when(pl.col("se").is_null()).then(pl.lit(NOTE_UNEQUAL))
    rows = found.with_columns(*_interval(confidence, comparisons), note=note).select(*by, "column", *ESTIMATES)
    return _without_small_cells(rows, min_documents).sort(*by, "column")


def _without_small_cells(rows: pl.LazyFrame, min_documents: int) -> pl.LazyFrame:
    """Estimates of which those of too few documents say only that."""
    if min_documents <= 1:
        return rows
    is_shown = pl.col("documents") >= min_documents
    note = pl.when(is_shown).then("note").otherwise(pl.lit(NOTE_HIDDEN.format(min_documents)))
    numbers = [pl.when(is_shown).then(name).alias(name) for name in ESTIMATES if name != "note"]
    return rows.with_columns(*numbers, note=note)


def simultaneous(found: pl.DataFrame, *, comparisons: int, confidence: float = CONFIDENCE) -> pl.DataFrame:
    """The same estimates with intervals of which so many hold together (Bonferroni): for the extreme of that many."""
    return found.with_columns(_interval(confidence, comparisons))


def _interval(confidence: float, comparisons: int) -> list[pl.Expr]:
    margin = _margin(1 - (1 - confidence) / max(1, comparisons))
    return [(pl.col("estimate") - margin).alias("low"), (pl.col("estimate") + margin).alias("high")]


def wide(found: pl.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pl.DataFrame:
    """Estimates with a row for each group: of each column `<column>`, `<column>_low`, `_high` and `_se`; `documents` and `note`."""
    notes = found.group_by(by).agg(pl.col("documents").max(), pl.col("note").sort_by("documents").last())
    rows = notes.select(by)
    for name in columns:
        of_column = found.filter(pl.col("column") == name)
        named = [pl.col(field).alias(name + suffix) for field, suffix in _SUFFIXES.items()]
        rows = rows.join(of_column.select(*by, *named), on=by, how="left", nulls_equal=True)
    return rows.join(notes, on=by, how="left", nulls_equal=True).sort(by)


def jackknife(summaries: pl.LazyFrame, by: Sequence[str], *, min_documents: int = 1) -> pl.LazyFrame:
    """`estimate`, `se`, `documents`, `effective_documents` and `rows` of sums over documents, without groups of fewer than min_documents."""
    y, w = pl.col("weight") * pl.col("mean"), pl.col("weight")
    total = summaries.group_by(by).agg(rows=w.sum(), estimate=y.sum() / w.sum())
    alone = (
        summaries.filter(pl.col("document_id").is_not_null())
        .group_by(*by, "document_id")
        .agg(y=y.sum(), w=w.sum())
        .join(total, on=by, nulls_equal=True)
        .with_columns(u=(pl.col("y") - pl.col("estimate") * pl.col("w")) / (pl.col("rows") - pl.col("w")))
        .group_by(by)
        .agg(
            documents=pl.len().cast(pl.Int64),
            u=pl.col("u").sum(),
            u_squares=(pl.col("u") ** 2).sum(),
            w_squares=(pl.col("w") ** 2).sum(),
        )
    )
    pooled = (
        summaries.filter(pl.col("document_id").is_null())
        .join(total, on=by, nulls_equal=True)
        .with_columns(shift=pl.col("estimate") - pl.col("mean"))
        .group_by(by)
        .agg(
            pl.col("documents").sum(),
            deviations=-(pl.col("shift") * w).sum(),
            squares=(
                pl.col("deviation_squares")
                - 2 * pl.col("shift") * pl.col("deviation_products")
                + pl.col("shift") ** 2 * pl.col("weight_squares")
            ).sum(),
            w_squares=pl.col("weight_squares").sum(),
            without=pl.col("rows").first() - pl.col("weight_squares").sum() / w.sum(),
        )
        .select(
            *by,
            "documents",
            u=pl.col("deviations") / pl.col("without"),
            u_squares=pl.col("squares") / pl.col("without") ** 2,
            w_squares="w_squares",
        )
    )
    sums = ("documents", "u", "u_squares", "w_squares")
    documents = pl.concat([alone, pooled]).group_by(by).agg(pl.col(sums).sum())
    g = pl.col("documents").cast(pl.Float64)
    variance = (g - 1) / g * (pl.col("u_squares") - pl.col("u") ** 2 / g)
    effective = pl.col("rows") ** 2 / pl.col("w_squares")
    return (
        total.join(documents, on=by, nulls_equal=True)
        .with_columns(effective_documents=effective)
        .with_columns(
            se=pl.when((pl.col("documents") >= 2) & (pl.col("effective_documents") >= 2 - 1e-9))
            .then(variance.clip(lower_bound=0).sqrt())
            .fill_nan(None)
        )
        .filter(pl.col("documents") >= min_documents)
        .select(*by, *MEANS)
    )


def _margin(confidence: float) -> pl.Expr:
    def quantile(documents: pl.Series) -> pl.Series:
        return pl.Series(documents.name, student_quantile(documents.to_numpy() - 1, confidence), nan_to_null=True)

    return pl.col("effective_documents").map_batches(quantile, return_dtype=pl.Float64) * pl.col("se")


def student_quantile(freedom: NDArray[np.floating], confidence: float) -> NDArray[np.float64]:
    """Two-sided quantile of Student's t; NaN for less than one degree of freedom."""
    from scipy.special import stdtrit

    defined = freedom >= 1 - 1e-9
    return np.where(defined, stdtrit(np.where(defined, freedom, 1.0), 0.5 + confidence / 2), np.nan)


@dataclass(frozen=True)
class Differences:
    """Differences of estimates, with standard errors and degrees of freedom: arrays of one shape, NaN where undefined."""

    difference: NDArray[np.float64]
    se: NDArray[np.float64]
    freedom: NDArray[np.float64]

    def interval(self, confidence: float = CONFIDENCE) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper ends of the two-sided intervals."""
        margin = student_quantile(self.freedom, confidence) * self.se
        return self.difference - margin, self.difference + margin

    @property
    def p_values(self) -> NDArray[np.float64]:
        """Two-sided p-values of no difference, by Student's t. Where no document differs from another: 1, or 0 if there is a difference."""
        from scipy.special import stdtr

        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(self.difference == 0, 0.0, np.abs(self.difference) / self.se)
        is_defined = np.isfinite(self.se) & (self.freedom >= 1 - 1e-9)
        return np.where(is_defined, 2 * stdtr(np.where(is_defined, self.freedom, 1.0), -t), np.nan)

    def are_within(self, margins: NDArray[np.float64], *, alpha: float = 1 - CONFIDENCE) -> NDArray[np.bool_]:
        """Whether the differences are equivalent to 0: two one-sided tests at level alpha, |difference| < margin."""
        low, high = self.interval(1 - 2 * alpha)
        return (low > -margins) & (high < margins)


def two_sample(a: pl.DataFrame, b: pl.DataFrame) -> Differences:
    """b − a of estimates of independent corpora, row by row, with Welch's degrees of freedom."""
    names = ("estimate", "se", "effective_documents")
    x, se_x, g_x = (a[name].cast(pl.Float64).to_numpy() for name in names)
    y, se_y, g_y = (b[name].cast(pl.Float64).to_numpy() for name in names)
    squares = se_x**2 + se_y**2
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = squares**2 / (se_x**4 / (g_x - 1) + se_y**4 / (g_y - 1))
    # no document differs from another in either
    freedom = np.where(squares == 0, np.minimum(g_x, g_y) - 1, freedom)
    return Differences(y - x, np.sqrt(squares), freedom)


def benjamini_hochberg(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The q-value of each p-value: the smallest false discovery rate at which it is found. NaN stays NaN and counts for nothing.

    Source: Benjamini & Hochberg 1995.
    """
    flat = p_values.ravel()
    known = np.flatnonzero(~np.isnan(flat))
    order = known[np.argsort(flat[known], kind="stable")]
    scaled = flat[order] * len(order) / np.arange(1, len(order) + 1)
    q = np.full(len(flat), np.nan)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return q.reshape(p_values.shape)
