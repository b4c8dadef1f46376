"""Means of the head statistics with intervals, a row per head."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.inference import clustered_mean
from attlas.analysis.weighting import weighted_heads
from attlas.extract.tables import Table

HEAD = ("stack", "layer", "head")
_CHUNK = 8  # columns at a time; their sums by head and document are held in memory


def statistic_columns(table: Table, frame: pl.LazyFrame) -> list[str]:
    """The statistics of a table that the frame has."""
    present = set(frame.collect_schema().names())
    return [c.name for c in table.facts if c.dtype == "float32" and c.name in present]


def head_means(dataset: Dataset, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Row-weighted mean and interval of the columns (all of them by default), a row per head."""
    frame = weighted_heads(dataset)
    names = list(columns) if columns is not None else statistic_columns(dataset.table("heads"), frame)
    return means_in_chunks(frame, names, HEAD)


def means_in_chunks(frame: pl.LazyFrame, names: Sequence[str], by: Sequence[str]) -> pl.DataFrame:
    """`clustered_mean` of many columns, a few at a time, so that memory use does not grow with their number."""
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    means = [clustered_mean(frame, chunk, by).collect(engine="streaming") for chunk in chunks]
    common = [*by, "documents", "note"]
    return pl.concat([m if i == 0 else m.drop(common) for i, m in enumerate(means)], how="horizontal")


def label(*, several_stacks: bool) -> pl.Expr:
    """The name of a head, such as L4H10, preceded by its stack if there are several."""
    name = pl.format("L{}H{}", "layer", "head")
    return (pl.format("{} {}", "stack", name) if several_stacks else name).alias("label")
