"""Query results written as a table for people, or as CSV, JSON or Parquet."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal

import polars as pl
import polars.selectors as cs
import pyarrow as pa

from attlas.analysis.csv_cells import without_formulas
from attlas.analysis.frames_output import parquet_chunks
from attlas.analysis.output import write_whole
from attlas.analysis.report.numbers import plural
from attlas.extract.printable import printable
from attlas.extract.store import Refusal

Format = Literal["table", "csv", "json", "parquet"]
FORMATS: tuple[Format, ...] = ("table", "csv", "json", "parquet")
_MAX_ROWS = 200
_MAX_CELL_LENGTH = 2_000
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class Rows:
    """Rows of one schema that come batch by batch, so that no more than some are in memory."""

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]

    def tables(self) -> Iterator[pa.Table]:
        """All rows in pieces for writing, at least one."""
        held: list[pa.RecordBatch] = []
        is_first = True
        for batch in self.batches:
            held.append(batch)
            if sum(piece.num_rows for piece in held) >= _CHUNK_ROWS:
                yield pa.Table.from_batches(held, self.schema)
                held, is_first = [], False
        if held or is_first:
            yield pa.Table.from_batches(held, self.schema)


def write_result(rows: pa.Table | Rows, format: Format, stream: IO[Any], *, to_shorten: str = "add LIMIT, or ") -> None:
    """Write a result as a table for people (`table`), or as `csv`, `json` (a list of objects) or `parquet`.

    Parquet needs a binary stream, or a text stream with a binary buffer. to_shorten: how to get fewer rows than people are shown.
    Raises OutputError if the stream does not take everything.
    """
    if format not in FORMATS:
        raise Refusal(f"a format is one of {', '.join(FORMATS)}; got {format!r}; choose one of them")
    if format == "parquet":
        _refuse_text_stream(stream)
    if not isinstance(rows, Rows):
        rows = Rows(rows.schema, iter(rows.to_batches(_CHUNK_ROWS)))
    if format == "table":
        write_whole(_table_chunks(rows, stream, to_shorten), stream)
        return
    chunks = {"csv": _csv_chunks, "json": _json_chunks, "parquet": parquet_chunks}[format]
    write_whole(chunks(rows.tables()), stream)


def _refuse_text_stream(stream: IO[Any]) -> None:
    if isinstance(getattr(stream, "buffer", stream), io.TextIOBase):
        raise Refusal("Parquet is binary; the output is a text stream; give --output FILE")
    if stream is sys.stdout and sys.stdout.isatty():
        raise Refusal("Parquet is binary; the output is a terminal; give --output FILE, or another --format")


def _csv_chunks(tables: Iterator[pa.Table]) -> Iterator[bytes]:
    for number, frame in enumerate(map(_frame, tables)):
        cells = frame.with_columns(_csv_cell(name, dtype) for name, dtype in frame.schema.items() if dtype.is_nested())
        yield without_formulas(cells).write_csv(include_header=number == 0).encode()


def _csv_cell(name: str, dtype: pl.DataType) -> pl.Expr:
    """A nested column as text: a list of scalars separated by spaces, anything else as JSON."""
    column = pl.col(name)
    if isinstance(dtype, (pl.List, pl.Array)) and not dtype.inner.is_nested():  # pyright: ignore[reportAttributeAccessIssue]
        return column.cast(pl.List(pl.String)).list.join(" ")
    if isinstance(dtype, pl.Struct):
        return column.struct.json_encode()
    wrapped = pl.struct(column.alias("x")).struct.json_encode()
    return pl.when(column.is_not_null()).then(wrapped.str.strip_prefix('{"x":').str.strip_suffix("}")).alias(name)


def _json_chunks(tables: Iterator[pa.Table]) -> Iterator[bytes]:
    yield b"["
    is_first = True
    for frame in map(_frame, tables):
        # JSON has no NaN and no infinity
        finite = frame.with_columns(pl.when(cs.float().is_finite()).then(cs.float()))
        yield (b"" if is_first else b",") + finite.write_json().encode()[1:-1]
        is_first = False
    yield b"]\n"


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(cs.categorical().cast(pl.String))


def _table_chunks(rows: Rows, stream: IO[Any], to_shorten: str) -> Iterator[bytes]:
    """The first rows as a table; in a terminal that is too narrow, text is wrapped."""
    from rich.text import Text

    from attlas.analysis.columns import Column, FittedTable, WrappedText, printed

    tables = rows.tables()
    first = next(tables)  # which has more rows than are shown, if there are that many
    number = first.num_rows + sum(table.num_rows for table in tables)
    shown = first.slice(0, _MAX_ROWS)
    columns = [
        Column(
            printable(field.name),
            [_cell(value) for value in column.to_pylist()],
            right=pa.types.is_integer(field.type) or pa.types.is_floating(field.type),
            breaks="never" if pa.types.is_primitive(field.type) else "anywhere",
        )
        for field, column in zip(shown.schema, shown.columns, strict=True)
    ]
    omitted = number - _MAX_ROWS
    hint = f"; {omitted} more not shown: {to_shorten}choose --format csv, json or parquet" if omitted > 0 else ""
    pieces = (FittedTable(columns), WrappedText(Text(f"{plural(number, 'row')}{hint}")))
    yield printed(pieces, stream)


def _cell(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else printable(value, limit=_MAX_CELL_LENGTH)
