"""The rows of an answer, written for people or for programs."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import IO, Any, Literal

import polars as pl
import polars.selectors as cs
import pyarrow as pa

from attlas.analysis.output import write_whole
from attlas.analysis.report.numbers import plural
from attlas.extract.printable import printable
from attlas.extract.store import Refusal

Format = Literal["table", "csv", "json", "parquet"]
FORMATS: tuple[Format, ...] = ("table", "csv", "json", "parquet")
_SHOWN_ROWS = 200
_LONGEST_CELL = 2_000
_AT_ONCE = 1 << 16  # rows


def write_result(table: pa.Table, format: Format, stream: IO[Any]) -> None:
    """Write a result for people (`table`) or for programs (`csv`, `json`: a list of objects, `parquet`).

    A text stream takes all but parquet; for that its binary buffer is used. Raises OutputError where the stream does not
    take all of it.
    """
    if format not in FORMATS:
        raise Refusal(f"a format is one of {', '.join(FORMATS)}; got {format!r}; choose one of them")
    if format == "parquet":
        _refuse_text(stream)
    chunks = {"table": _as_table, "csv": _as_csv, "json": _as_json, "parquet": _as_parquet}[format]
    write_whole(chunks(table, stream), stream)


def _refuse_text(stream: IO[Any]) -> None:
    if isinstance(getattr(stream, "buffer", stream), io.TextIOBase):
        raise Refusal("Parquet is binary; the output is a text stream; give --output FILE")
    if stream is sys.stdout and sys.stdout.isatty():
        raise Refusal("Parquet is binary; the output is a terminal; give --output FILE, or another --format")


def _as_parquet(table: pa.Table, _: IO[Any]) -> Iterator[memoryview]:
    import pyarrow.parquet as pq

    written = pa.BufferOutputStream()
    pq.write_table(table, written, compression="zstd")
    yield memoryview(written.getvalue())


def _as_csv(table: pa.Table, _: IO[Any]) -> Iterator[bytes]:
    frame = _frame(table)
    frame = frame.with_columns(_csv_cell(name, dtype) for name, dtype in frame.schema.items() if dtype.is_nested())
    for start in range(0, max(1, frame.height), _AT_ONCE):
        yield frame.slice(start, _AT_ONCE).write_csv(include_header=start == 0).encode()


def _csv_cell(name: str, dtype: pl.DataType) -> pl.Expr:
    """A list of plain values with spaces between them; what is nested deeper as JSON."""
    column = pl.col(name)
    if isinstance(dtype, (pl.List, pl.Array)) and not dtype.inner.is_nested():  # pyright: ignore[reportAttributeAccessIssue]
        return column.cast(pl.List(pl.String)).list.join(" ")
    if isinstance(dtype, pl.Struct):
        return column.struct.json_encode()
    wrapped = pl.struct(column.alias("x")).struct.json_encode()
    return pl.when(column.is_not_null()).then(wrapped.str.strip_prefix('{"x":').str.strip_suffix("}")).alias(name)


def _as_json(table: pa.Table, _: IO[Any]) -> Iterator[bytes]:
    # JSON has no NaN and no infinity
    frame = _frame(table).with_columns(pl.when(cs.float().is_finite()).then(cs.float()))
    yield b"["
    for start in range(0, frame.height, _AT_ONCE):
        yield (b"," if start else b"") + frame.slice(start, _AT_ONCE).write_json().encode()[1:-1]
    yield b"]\n"


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(cs.categorical().cast(pl.String))


def _as_table(table: pa.Table, stream: IO[Any]) -> Iterator[bytes]:
    """The first rows under their names, as wide as they are; texts go over several lines where a terminal is narrower."""
    from rich.text import Text

    from attlas.analysis.columns import Column, FittedTable, WrappedText, console_for

    shown = table.slice(0, _SHOWN_ROWS)
    columns = [
        Column(
            printable(field.name),
            [_cell(value) for value in column.to_pylist()],
            right=pa.types.is_integer(field.type) or pa.types.is_floating(field.type),
            breaks="never" if pa.types.is_primitive(field.type) else "anywhere",
        )
        for field, column in zip(shown.schema, shown.columns, strict=True)
    ]
    left = table.num_rows - _SHOWN_ROWS
    rest = f"; {left} more not shown: add LIMIT, or choose --format csv, json or parquet" if left > 0 else ""
    console = console_for(stream if isinstance(stream, io.TextIOBase) else io.StringIO())
    with console.capture() as captured:
        console.print(FittedTable(columns), crop=False)
        console.print(WrappedText(Text(f"{plural(table.num_rows, 'row')}{rest}")), crop=False)
    yield captured.get().encode(getattr(stream, "encoding", None) or "utf-8", "backslashreplace")


def _cell(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else printable(value, limit=_LONGEST_CELL)
