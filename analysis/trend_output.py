"""A trend as a table for people, as rows (CSV, JSON, Parquet), or as a page of charts (HTML)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal

import polars as pl
from rich.console import RenderableType
from rich.text import Text

from attlas.analysis.alerts import RULES
from attlas.analysis.columns import Column, FittedTable, WrappedText, console_for
from attlas.analysis.compare import CHANGED, VERDICTS
from attlas.analysis.comparison_output import place_name, rounded
from attlas.analysis.output import write_whole
from attlas.analysis.report.numbers import plural
from attlas.analysis.result import write_result
from attlas.analysis.trend import Trend
from attlas.extract.printable import printable

Format = Literal["table", "csv", "json", "parquet", "html"]
FORMATS: tuple[Format, ...] = ("table", "csv", "json", "parquet", "html")
_SHOWN = 30
_BARS = "▁▂▃▄▅▆▇█"
_BARS_AT_MOST = 24
_ON = ("stack", "layer", "head", "site", "column")


def write_trend(trend: Trend, form: Format, stream: IO[Any]) -> None:
    """Write a trend. Raises OutputError if the stream does not take everything."""
    if form == "table":
        write_whole([_table(trend, stream)], stream)
    elif form == "html":
        from attlas.analysis.report.trend_page import render_trend

        write_whole([render_trend(trend).encode()], stream)
    else:
        write_result(trend.rows.to_arrow(), form, stream)


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


def _table(trend: Trend, stream: IO[Any]) -> bytes:
    console = console_for(stream if isinstance(stream, io.TextIOBase) else io.StringIO())
    with console.capture() as capture:
        for piece in _pieces(trend):
            console.print(piece, crop=False)
    return capture.get().encode(getattr(stream, "encoding", None) or "utf-8", "backslashreplace")


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
    counts = trend.counts(changes)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def _columns(trend: Trend) -> FittedTable:
    """For each column its mean over all places through the series, and how many places changed."""
    means = trend.rows.group_by("column", "step", maintain_order=True).agg(pl.col("estimate").mean())
    series = [means.filter(column=name).sort("step")["estimate"].to_list() for name in trend.columns]
    since = {
        "since the one before": changed_places(trend, "change"),
        "since the first": changed_places(trend, "change_from_first"),
    }
    places = trend.rows.filter(step=trend.steps[-1]).group_by("column").len()
    totals = dict(places.iter_rows())
    return FittedTable(
        (
            Column("column", list(map(printable, trend.columns))),
            Column("mean over all places", [sparkline(values) for values in series]),
            Column("first", [rounded(values[0]) for values in series], right=True),
            Column("last", [rounded(values[-1]) for values in series], right=True),
            *(
                Column(name, [f"{found.get(n, 0)} of {totals.get(n, 0)}" for n in trend.columns], right=True)
                for name, found in since.items()
            ),
        ),
        title="Every column, and the places that changed",
    )


def changed_places(trend: Trend, field: str) -> dict[str, int]:
    """The number of places of each column that changed in the last dataset. field: `change` or `change_from_first`."""
    last = trend.rows.filter(pl.col("step") == trend.steps[-1], pl.col(field) == CHANGED)
    return dict(last.group_by("column").len().iter_rows())


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
            Column("then", [f"{rounded(row['low'])} to {rounded(row['high'])}" for row in named], right=True),
            Column("in the last", ["still" if row["lasts"] else "no more" for row in named]),
        ),
        title=f"{plural(len(named), 'alert')}",
    )


def can_alert(trend: Trend) -> bool:
    """Whether all columns that alerts look at are followed."""
    return {rule.column for rule in RULES} <= set(trend.columns)


def largest_changes(trend: Trend) -> pl.DataFrame:
    """The largest change of each place and column."""
    changed = trend.changes.filter(verdict=CHANGED)
    return changed.unique(_ON, keep="first", maintain_order=True)


def _changes(trend: Trend, changes: pl.DataFrame) -> FittedTable:
    lines = trend.rows.join(changes.select(_ON), on=_ON, how="semi", nulls_equal=True)
    series = {key: rows["estimate"].to_list() for key, rows in lines.sort("step").group_by(_ON)}
    named = list(changes.iter_rows(named=True))
    several = trend.rows["stack"].n_unique() > 1
    return FittedTable(
        (
            Column("where", [printable(place_name(row, several_stacks=several)) for row in named]),
            Column("column", [printable(row["column"]) for row in named]),
            Column("series", [sparkline(series[tuple(row[name] for name in _ON)]) for row in named]),
            Column("from", [printable(row["from_dataset"]) for row in named]),
            Column("to", [printable(row["dataset"]) for row in named]),
            Column("difference", [rounded(row["difference"]) for row in named], right=True),
            Column(
                f"{100 * (1 - trend.alpha):g} % interval",
                [f"{rounded(row['low'])} to {rounded(row['high'])}" for row in named],
                right=True,
            ),
            Column("q", [rounded(row["q"], digits=2) for row in named], right=True, optional=True),
            Column("÷ margin", [rounded(row["effect"], digits=3) for row in named], right=True),
        ),
        title="Changed, the largest effect of each place first",
    )
