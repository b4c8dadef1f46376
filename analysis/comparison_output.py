"""A comparison as a table for people, as rows (CSV, JSON, Parquet) or as JUnit XML."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import polars as pl
from rich.console import RenderableType
from rich.text import Text

from attlas.analysis.columns import Column, FittedTable, WrappedText, printed
from attlas.analysis.compare import CHANGED, UNCHANGED, Comparison
from attlas.analysis.junit import Case, junit_xml
from attlas.analysis.output import answer_file, write_whole
from attlas.analysis.report.numbers import plural
from attlas.analysis.result import write_result
from attlas.analysis.row_texts import difference_cells, interval_text, place_name, rounded
from attlas.extract.printable import printable
from attlas.extract.store import LocalFolder, Location, open_dataset

Format = Literal["table", "csv", "json", "parquet", "html", "junit"]
FORMATS: tuple[Format, ...] = ("table", "csv", "json", "parquet", "html", "junit")
_SHOWN = 40
_PAGE = "comparison.html"


def write_comparison(comparison: Comparison, form: Format, stream: IO[Any]) -> None:
    """Write a comparison. Raises OutputError if the stream does not take everything."""
    if form == "junit":
        write_whole([junit_xml("attlas compare", _cases(comparison.rows))], stream)
    elif form == "html":
        from attlas.analysis.report.comparison_page import render_comparison

        write_whole([render_comparison(comparison).encode()], stream)
    elif form == "table":
        write_whole([printed(_pieces(comparison), stream)], stream)
    else:
        write_result(comparison.rows.to_arrow(), form, stream)


def save_comparison(comparison: Comparison, location: Location, output: Path | None = None) -> Path | str:
    """Write a comparison as a page, by default comparison.html in the dataset at a location. Returns its path, or its URL."""
    storage, _ = open_dataset(location)
    if output is None and not isinstance(storage, LocalFolder):
        page = io.BytesIO()
        write_comparison(comparison, "html", page)
        storage.put(_PAGE, page.getvalue())
        return storage.place(_PAGE)
    path = output or Path(storage.place(_PAGE))
    with answer_file(path) as stream:
        write_comparison(comparison, "html", stream)
    return path


def _cases(rows: pl.DataFrame) -> Iterator[Case]:
    several = rows["stack"].n_unique() > 1
    for row in rows.sort("column", "stack", "layer", "head", "site").iter_rows(named=True):
        outcome = {CHANGED: "failed", UNCHANGED: "passed"}.get(row["verdict"], "skipped")
        yield Case(row["column"], place_name(row, several_stacks=several), outcome, _sentence(row))  # pyright: ignore[reportArgumentType]


def _sentence(row: Mapping[str, Any]) -> str:
    return f"{row['verdict']}: {rounded(row['a'])} and {rounded(row['b'])}, difference {rounded(row['difference'])} ({interval_text(row)}), margin {rounded(row['margin'])}, q {rounded(row['q'])}"


def _pieces(comparison: Comparison) -> Iterator[RenderableType]:
    """Notes, counts and the largest changes."""
    rows = comparison.rows
    for note in comparison.notes:
        yield WrappedText(Text(printable(note)))
    yield ""
    counts = ", ".join(f"{number} {verdict}" for verdict, number in comparison.counts().items())
    yield WrappedText(Text(f"{plural(rows.height, 'difference')}: {counts}", style="bold"))
    changed = rows.filter(verdict=CHANGED)
    if changed.height:
        shown = changed.head(_SHOWN)
        yield _changes(shown, 1 - comparison.alpha, several_stacks=rows["stack"].n_unique() > 1)
    if changed.height > _SHOWN:
        yield f"{changed.height - _SHOWN} more changed: --format csv or json has them all"


def _changes(rows: pl.DataFrame, confidence: float, *, several_stacks: bool) -> FittedTable:
    cells = difference_cells(rows, several_stacks=several_stacks)
    texts = [Column(name, [printable(row[name]) for row in cells]) for name in ("where", "column")]
    means = [Column(name, [rounded(mean) for mean in rows[name]], right=True) for name in ("a", "b")]
    names = {
        "difference": "difference",
        "interval": f"{100 * confidence:g} % interval",
        "q": "q",
        "÷ margin": "÷ margin",
    }
    numbers = [Column(shown, [row[name] for row in cells], right=True) for name, shown in names.items()]
    return FittedTable((*texts, *means, *numbers), title="Changed, the largest effects first")
