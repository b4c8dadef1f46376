"""A trend as a table for people, as rows (CSV, JSON, Parquet), or as a page of charts (HTML)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, Literal

import polars as pl
from rich.console import RenderableType
from rich.text import Text

from attlas.analysis.columns import Column, FittedTable, WrappedText, printed
from attlas.analysis.output import write_whole
from attlas.analysis.report.numbers import plural
from attlas.analysis.result import write_result
from attlas.analysis.row_texts import difference_cells, interval_text, place_name, rounded
from attlas.analysis.trend import PLACE_AND_COLUMN, Trend
from attlas.analysis.trend_overview import can_alert, column_overviews, largest_changes, sparkline
from attlas.extract.printable import printable

Format = Literal["table", "csv", "json", "parquet", "html"]
FORMATS: tuple[Format, ...] = ("table", "csv", "json", "parquet", "html")
_SHOWN = 30


def write_trend(trend: Trend, form: Format, stream: IO[Any]) -> None:
    """Write a trend. Raises OutputError if the stream does not take everything."""
    if form == "table":
        write_whole([printed(_pieces(trend), stream)], stream)
    elif form == "html":
        from attlas.analysis.report.trend_page import render_trend

        write_whole([render_trend(trend).encode()], stream)
    else:
        write_result(trend.rows.to_arrow(), form, stream)


def _pieces(trend: Trend) -> Iterator[RenderableType]:
    """Notes, alerts, a line for each column, and the largest changes."""
    for note in trend.notes:
        yield WrappedText(Text(printable(note)))
    yield ""
    yield _columns(trend)
    yield from _alerts(trend)
    changed = largest_changes(trend)
    if changed.height:
        yield _changes(trend, changed.head(_SHOWN))
    if changed.height > _SHOWN:
        yield f"{changed.height - _SHOWN} more places changed: --format csv or json has them all"
    yield WrappedText(Text(f"since the one before: {_verdicts(trend, trend.changes_to(-1))}", style="bold"))


def _verdicts(trend: Trend, changes: pl.DataFrame) -> str:
    return ", ".join(f"{number} {verdict}" for verdict, number in trend.counts(changes).items())


def _columns(trend: Trend) -> FittedTable:
    """For each column its mean over all places through the series, and how many places changed."""
    found = column_overviews(trend)
    return FittedTable(
        (
            Column("column", [printable(of.column) for of in found]),
            Column("mean over all places", [sparkline(of.means) for of in found]),
            Column("first", [rounded(of.means[0]) for of in found], right=True),
            Column("last", [rounded(of.means[-1]) for of in found], right=True),
            Column("since the one before", [f"{of.changed} of {of.places}" for of in found], right=True),
            Column("since the first", [f"{of.changed_from_first} of {of.places}" for of in found], right=True),
        ),
        title="Every column, and the places that changed",
    )


def _alerts(trend: Trend) -> Iterator[RenderableType]:
    if not trend.alerts.height:
        yield WrappedText(Text("No entropy collapse, no large logits.") if can_alert(trend) else Text(""))
        return
    named = list(trend.alerts.iter_rows(named=True))
    several = trend.rows["stack"].n_unique() > 1
    yield FittedTable(
        (
            Column("alert", [row["alert"] for row in named]),
            Column("where", [printable(place_name(row, several_stacks=several)) for row in named]),
            Column("from", [printable(row["dataset"]) for row in named]),
            Column("column", [row["column"] for row in named]),
            Column("first", [rounded(row["first"]) for row in named], right=True),
            Column("then", [interval_text(row) for row in named], right=True),
            Column("in the last", ["still" if row["lasts"] else "no more" for row in named]),
        ),
        title=f"{plural(len(named), 'alert')}",
    )


def _changes(trend: Trend, changes: pl.DataFrame) -> FittedTable:
    lines = trend.rows.join(changes.select(PLACE_AND_COLUMN), on=PLACE_AND_COLUMN, how="semi", nulls_equal=True)
    series = {key: rows["estimate"].to_list() for key, rows in lines.sort("step").group_by(PLACE_AND_COLUMN)}
    cells = difference_cells(changes, several_stacks=trend.rows["stack"].n_unique() > 1)
    return FittedTable(
        (
            Column("where", [printable(row["where"]) for row in cells]),
            Column("column", [printable(row["column"]) for row in cells]),
            Column("series", [sparkline(series[key]) for key in changes.select(PLACE_AND_COLUMN).rows()]),
            Column("from", [printable(name) for name in changes["from_dataset"]]),
            Column("to", [printable(name) for name in changes["dataset"]]),
            Column("difference", [row["difference"] for row in cells], right=True),
            Column(f"{100 * (1 - trend.alpha):g} % interval", [row["interval"] for row in cells], right=True),
            Column("q", [row["q"] for row in cells], right=True, optional=True),
            Column("÷ margin", [row["÷ margin"] for row in cells], right=True),
        ),
        title="Changed, the largest effect of each place first",
    )
