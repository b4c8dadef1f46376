"""Every head in one row: the means of its columns with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.inference import clustered_mean
from attlas.analysis.weighting import weighted_heads
from attlas.extract.tables import TABLES

HEAD = ("stack", "layer", "head")
_CHUNK = 8  # columns at a time: the sums by head and document are held in memory


def statistics_of(table: str, frame: pl.LazyFrame) -> list[str]:
    """The columns of a table that are means, as far as the dataset has them."""
    present = set(frame.collect_schema().names())
    return [c.name for c in TABLES[table].facts if c.dtype == "float32" and c.name in present]


def head_means(dataset: Dataset, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Row-weighted mean and interval of the columns (all of them by default), a row per head."""
    frame = weighted_heads(dataset)
    names = list(columns) if columns is not None else statistics_of("heads", frame)
    return joined_means(frame, names, HEAD)


def joined_means(frame: pl.LazyFrame, names: Sequence[str], by: Sequence[str]) -> pl.DataFrame:
    """`clustered_mean` of many columns, a few at a time, so that memory does not grow with their number."""
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    found = [clustered_mean(frame, chunk, by).collect(engine="streaming") for chunk in chunks]
    common = [*by, "documents", "note"]
    return pl.concat([f if i == 0 else f.drop(common) for i, f in enumerate(found)], how="horizontal")


def label(*, several_stacks: bool) -> pl.Expr:
    """A head's name, L4H10, with its stack where there is more than one."""
    name = pl.format("L{}H{}", "layer", "head")
    return (pl.format("{} {}", "stack", name) if several_stacks else name).alias("label")
