"""Read-only SQL over the tables of a dataset.

DuckDB never gets the right to open a file. The tables are handed to it as Arrow datasets over the manifest's parts,
and external access is switched off and locked: a COPY hidden in a common table expression parses as a SELECT, so the
statement's type alone would not keep it from writing.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import pyarrow as pa

from analysis.dataset import Dataset
from extract.store import Refusal

if TYPE_CHECKING:
    import duckdb

Format = Literal["table", "csv", "json", "parquet"]
FORMATS: tuple[Format, ...] = ("table", "csv", "json", "parquet")
_MEMORY = "4GB"
_SHOWN_ROWS = 200
_EXPLAIN = re.compile(r"\s*explain\s*(\([^)]*\)|analyze\b)?", re.IGNORECASE)


def query(folder: Path | str, sql: str, *, timeout_s: float = 60) -> pa.Table:
    """The result of one SELECT (or WITH, FROM, VALUES, DESCRIBE, SHOW, SUMMARIZE, EXPLAIN of one) over the tables.

    Raises Refusal for anything else, for SQL that DuckDB rejects, for a file, and for a query that runs too long.
    """
    dataset = Dataset.open(folder)
    if not timeout_s > 0:
        raise Refusal(f"a query's time limit is above 0 seconds; got {timeout_s:g}; give a positive number")
    _refuse_other_statements(sql)
    with _connection(dataset) as connection, _time_limit(connection, timeout_s) as expired:
        import duckdb

        try:
            return _plain(connection.sql(sql).to_arrow_table())
        except duckdb.InterruptException as error:
            if expired.is_set():
                raise Refusal(
                    f"a query may run {timeout_s:g} s; this one took longer; narrow it down or give a longer time limit"
                ) from error
            raise
        except duckdb.PermissionException as error:
            raise Refusal(
                f"a query reads the dataset's tables ({', '.join(dataset.tables)}) and no files; "
                f"DuckDB says: {_first_line(error)}; name a table instead"
            ) from error
        except duckdb.Error as error:
            raise Refusal(f"the query must be valid DuckDB SQL; it says: {_first_line(error)}") from error


def _refuse_other_statements(sql: str) -> None:
    import duckdb

    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise Refusal(f"the query must be valid DuckDB SQL; it says: {_first_line(error)}") from error
    if len(statements) != 1:
        raise Refusal(f"a query is one statement; got {len(statements)}; give a single SELECT")
    kind = statements[0].type
    if kind == duckdb.StatementType.EXPLAIN:
        # EXPLAIN ANALYZE runs what it explains
        _refuse_other_statements(_EXPLAIN.sub("", _without_comments(statements[0].query), count=1))
    elif kind != duckdb.StatementType.SELECT:
        raise Refusal(f"a query only reads; got {kind.name}; give a single SELECT (or WITH, FROM, DESCRIBE, EXPLAIN)")


def _without_comments(sql: str) -> str:
    return re.sub(r"\A(\s*explain\b)(\s|--[^\n]*\n|/\*.*?\*/)*", r"\1 ", sql, flags=re.IGNORECASE | re.DOTALL)


@contextmanager
def _connection(dataset: Dataset) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory database that holds the tables and can open nothing."""
    import duckdb
    import pyarrow.dataset as arrow

    threads = min(os.cpu_count() or 1, 8)
    connection = duckdb.connect(":memory:", config={"threads": threads, "memory_limit": _MEMORY})
    try:
        for table in dataset.tables:
            paths = dataset.part_paths(table)
            if paths and all(path.is_file() for path in paths):
                connection.register(table, arrow.dataset([str(path) for path in paths], format="parquet"))
            else:
                connection.register(table, _no_rows(dataset, table, paths))
        for setting in ("python_enable_replacements=false", "temp_directory=''", "enable_external_access=false"):
            connection.execute(f"SET {setting}")
        connection.execute("SET lock_configuration=true")
        yield connection
    finally:
        connection.close()


def _no_rows(dataset: Dataset, table: str, paths: list[Path]) -> pa.Table:
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise Refusal(
            f"a dataset has every part of its manifest; {table} lacks {', '.join(missing)}; "
            f"run attlas verify {dataset.root}"
        )
    from extract.schema import TABLES

    return TABLES[table].schema().empty_table() if table in TABLES else pa.table({"nothing": pa.array([], pa.null())})


@contextmanager
def _time_limit(connection: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[threading.Event]:
    expired = threading.Event()

    def stop() -> None:
        expired.set()
        connection.interrupt()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()
        timer.join()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _plain(table: pa.Table) -> pa.Table:
    """DuckDB's 128-bit sums as int64 where they fit, and every column under a name of its own."""
    names: list[str] = []
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        names.append(name if name not in names else f"{name}_{sum(n.split('_')[0] == name for n in names)}")
        columns.append(_narrow(column))
    return pa.Table.from_arrays(columns, names=names)


def _narrow(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_decimal(column.type):
        return column
    try:
        return column.cast(pa.int64() if column.type.scale == 0 else pa.float64())
    except pa.ArrowInvalid:
        return column.cast(pa.float64())


def write_result(table: pa.Table, format: Format, stream: IO[Any]) -> None:
    """Write a result for people (`table`) or for programs (`csv`, `json`: a list of objects, `parquet`).

    A text stream takes all but parquet; for that its binary buffer is used.
    """
    if format not in FORMATS:
        raise Refusal(f"a format is one of {', '.join(FORMATS)}; got {format!r}; choose one of them")
    if format == "parquet":
        _write_parquet(table, stream)
    elif format == "table":
        _write_table(table, stream)
    else:
        _write_text(_as_csv(table) if format == "csv" else _as_json(table), stream)


def _write_parquet(table: pa.Table, stream: IO[Any]) -> None:
    import io

    import pyarrow.parquet as pq

    target = getattr(stream, "buffer", stream)
    if isinstance(target, io.TextIOBase):
        raise Refusal("Parquet is binary; the output is a text stream; give --output FILE")
    if target is getattr(sys.stdout, "buffer", None) and sys.stdout.isatty():
        raise Refusal("Parquet is binary; the output is a terminal; give --output FILE, or another --format")
    written = pa.BufferOutputStream()
    pq.write_table(table, written, compression="zstd")
    target.write(written.getvalue().to_pybytes())


def _write_text(text: str, stream: IO[Any]) -> None:
    import io

    binary = isinstance(stream, (io.RawIOBase, io.BufferedIOBase)) or "b" in getattr(stream, "mode", "")
    stream.write(text.encode() if binary else text)


def _as_csv(table: pa.Table) -> str:
    import polars as pl
    import polars.selectors as cs

    frame = _frame(table)
    nested = cs.by_dtype(pl.List) | cs.array()
    return frame.with_columns(
        nested.cast(pl.List(pl.String)).list.join(" "), cs.struct().struct.json_encode()
    ).write_csv()


def _as_json(table: pa.Table) -> str:
    import polars.selectors as cs

    # JSON has no NaN and no infinity
    frame = _frame(table)
    finite = [frame[c].is_finite() for c in frame.select(cs.float()).columns]
    if not all(f.all() for f in finite):
        import polars as pl

        frame = frame.with_columns(pl.when(cs.float().is_finite()).then(cs.float()))
    return frame.write_json() + "\n"


def _frame(table: pa.Table) -> Any:
    import polars as pl
    import polars.selectors as cs

    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(cs.categorical().cast(pl.String))


def _write_table(table: pa.Table, stream: IO[Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for field in table.schema:
        plain = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        shown.add_column(Text(field.name), justify="right" if plain else "left", overflow="fold")
    for row in table.slice(0, _SHOWN_ROWS).to_pylist():
        shown.add_row(*(Text(_cell(value)) for value in row.values()))
    interactive = stream.isatty() if hasattr(stream, "isatty") else False
    console = Console(file=stream, width=None if interactive else 40 + 28 * len(table.schema), highlight=False)
    console.print(shown)
    left = table.num_rows - _SHOWN_ROWS
    rest = f"; {left} more not shown: add LIMIT, or choose --format csv, json or parquet" if left > 0 else ""
    console.print(f"{table.num_rows} row{'s' * (table.num_rows != 1)}{rest}", soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
