"""A trend in short: a line for each column, the largest change of each place, a line of bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from attlas.analysis.alerts import RULES
from attlas.analysis.compare import CHANGED
from attlas.analysis.trend import PLACE_AND_COLUMN, Trend

_BARS = "▁▂▃▄▅▆▇█"
_BARS_AT_MOST = 24


@dataclass(frozen=True)
class ColumnOverview:
    """A column through the series: its means over all places, and the places that changed in the last dataset."""

    column: str
    means: list[float | None]
    places: int
    changed: int  # since the dataset before
    changed_from_first: int


def column_overviews(trend: Trend) -> list[ColumnOverview]:
    """Every column, in the order of the trend."""
    means = trend.rows.group_by("column", "step").agg(pl.col("estimate").mean()).sort("step")
    last = trend.rows.filter(step=trend.steps[-1]).group_by("column")
    counts = last.agg(
        pl.len(), pl.col("change", "change_from_first").eq_missing(CHANGED).sum().cast(pl.Int64)
    ).rows_by_key("column", named=True, unique=True)
    return [
        ColumnOverview(
            name,
            means.filter(column=name)["estimate"].to_list(),
            counts[name]["len"],
            counts[name]["change"],
            counts[name]["change_from_first"],
        )
        for name in trend.columns
        if name in counts
    ]


def largest_changes(trend: Trend) -> pl.DataFrame:
    """The largest change of each place and column."""
    changed = trend.changes.filter(verdict=CHANGED)
    return changed.unique(PLACE_AND_COLUMN, keep="first", maintain_order=True)


def can_alert(trend: Trend) -> bool:
    """Whether all columns that alerts look at are followed."""
    return {rule.column for rule in RULES} <= set(trend.columns)


def sparkline(values: Sequence[float | None]) -> str:
    """A bar for each value, from the smallest to the largest; a space for null. Of a long series, values at even distances."""
    if len(values) > _BARS_AT_MOST:
        last = len(values) - 1
        values = [values[round(n * last / (_BARS_AT_MOST - 1))] for n in range(_BARS_AT_MOST)]
    known = [value for value in values if value is not None]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    top = len(_BARS) - 1
    return "".join(
        " " if value is None else _BARS[round((value - low) / span * top) if span > 0 else top // 2] for value in values
    )
