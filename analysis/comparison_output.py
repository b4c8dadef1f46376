"""A comparison as a table for people, as rows (CSV, JSON, Parquet) or as JUnit XML."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import IO, Any, Literal

import polars as pl
from rich.text import Text

from attlas.analysis.columns import Column, FittedTable, WrappedText, console_for
from attlas.analysis.compare import CHANGED, UNCHANGED, VERDICTS, Comparison
from attlas.analysis.junit import Case, junit_xml
from attlas.analysis.output import write_whole
from attlas.analysis.report.numbers import plural
from attlas.analysis.result import write_result
from attlas.analysis.row_texts import place_name, rounded
from attlas.extract.printable import printable

Format = Literal["table", "csv", "json", "parquet", "html", "junit"]
FORMATS: tuple[Format, ...] = ("table", "csv", "json", "parquet", "html", "junit")
_SHOWN = 40


def write_comparison(comparison: Comparison, form: Format, stream: IO[Any]) -> None:
    """Write a comparison. Raises OutputError if the stream does not take everything."""
    if form == "junit":
        write_whole([junit_xml("attlas compare", _cases(comparison.rows))], stream)
    elif form == "html":
        from attlas.analysis.report.comparison_page import render_comparison

        write_whole([render_comparison(comparison).encode()], stream)
    elif form == "table":
        write_whole([_table(comparison, stream)], stream)
    else:
        write_result(comparison.rows.to_arrow(), form, stream)


def _cases(rows: pl.DataFrame) -> Iterator[Case]:
    several = rows["stack"].n_unique() > 1
    for row in rows.sort("column", "stack", "layer", "head", "site").iter_rows(named=True):
        outcome = {CHANGED: "failed", UNCHANGED: "passed"}.get(row["verdict"], "skipped")
        yield Case(row["column"], place_name(row, several_stacks=several), outcome, _sentence(row))  # pyright: ignore[reportArgumentType]


def _sentence(row: Mapping[str, Any]) -> str:
    return f"{row['verdict']}: {rounded(row['a'])} and {rounded(row['b'])}, difference {_interval(row)}, margin {rounded(row['margin'])}, q {rounded(row['q'])}"


def _table(comparison: Comparison, stream: IO[Any]) -> bytes:
    """Notes, counts and the largest changes."""
    rows = comparison.rows
    changed = rows.filter(pl.col("verdict") == CHANGED)
    console = console_for(stream if isinstance(stream, io.TextIOBase) else io.StringIO())
    with console.capture() as capture:
        for note in comparison.notes:
            console.print(WrappedText(Text(printable(note))), crop=False)
        counts = ", ".join(f"{comparison.counts()[verdict]} {verdict}" for verdict in VERDICTS)
        console.print()
        console.print(WrappedText(Text(f"{plural(rows.height, 'difference')}: {counts}", style="bold")), crop=False)
        if changed.height:
            console.print(
                _changes(changed.head(_SHOWN), 1 - comparison.alpha, several_stacks=rows["stack"].n_unique() > 1),
                crop=False,
            )
        if changed.height > _SHOWN:
            console.print(f"{changed.height - _SHOWN} more changed: --format csv or json has them all")
    return capture.get().encode(getattr(stream, "encoding", None) or "utf-8", "backslashreplace")


def _changes(rows: pl.DataFrame, confidence: float, *, several_stacks: bool) -> FittedTable:
    named = list(rows.iter_rows(named=True))
    numbers = {
        "a": [rounded(row["a"]) for row in named],
        "b": [rounded(row["b"]) for row in named],
        "difference": [rounded(row["difference"]) for row in named],
        f"{100 * confidence:g} % interval": [f"{rounded(row['low'])} to {rounded(row['high'])}" for row in named],
        "q": [rounded(row["q"], digits=2) for row in named],
        "÷ margin": [rounded(row["effect"], digits=3) for row in named],
    }
    return FittedTable(
        (
            Column("where", [printable(place_name(row, several_stacks=several_stacks)) for row in named]),
            Column("column", [printable(row["column"]) for row in named]),
            *(Column(name, cells, right=True) for name, cells in numbers.items()),
        ),
        title="Changed, the largest effects first",
    )


def _interval(row: Mapping[str, Any]) -> str:
    return f"{rounded(row['difference'])} ({rounded(row['low'])} to {rounded(row['high'])})"
