"""Weights of means: every measured row counts the same, so a sequence weighs as many rows as were measured in it."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from attlas.analysis.dataset import Dataset

SUM, WEIGHT = "|sum", "|weight"


def weighted_heads(dataset: Dataset) -> pl.LazyFrame:
    """`heads` with `weight`, the number of measured rows."""
    return dataset.scan("heads").with_columns(weight=pl.col("query_rows").cast(pl.Float64))


def weighted_residual(dataset: Dataset) -> pl.LazyFrame:
    """`residual` with `weight`, the number of tokens of the sequence."""
    tokens = dataset.scan("sequences").select("sequence_id", weight=pl.col("tokens").cast(pl.Float64))
    return dataset.scan("residual").join(tokens, on="sequence_id", how="left")


def document_sums(
    frame: pl.LazyFrame, columns: Sequence[str], by: Sequence[str], *, weight: str = "weight"
) -> pl.LazyFrame:
    """Sums by group and document: for every column Σ w·y and Σ w over the rows where y is not null, and Σ w over all rows."""
    w = pl.col(weight).cast(pl.Float64)
    sums = [
        expression
        for name in columns
        for expression in (
            (w * pl.col(name).cast(pl.Float64)).sum().alias(name + SUM),
            w.filter(pl.col(name).is_not_null()).sum().alias(name + WEIGHT),
        )
    ]
    return frame.group_by(*by, "document_id").agg(*sums, w.sum().alias(WEIGHT))
