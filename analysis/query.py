"""Read-only SQL over the tables of a dataset.

DuckDB never gets the right to open a file. The tables are handed to it as Arrow datasets over the manifest's parts,
and external access is switched off and locked: a COPY hidden in a common table expression parses as a SELECT, so the
statement's type alone would not keep it from writing.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from attlas.analysis.damage import refuse_if_damaged
from attlas.analysis.dataset import Dataset
from attlas.analysis.parts import first_line, rows_error
from attlas.analysis.result import FORMATS as FORMATS
from attlas.analysis.result import Format as Format
from attlas.analysis.result import write_result as write_result
from attlas.analysis.scanning import arrow_dataset
from attlas.extract.store import Location, Refusal

if TYPE_CHECKING:
    import duckdb
    import pyarrow.dataset as arrow

_MEMORY = "4GB"
_AS_TEXT = re.compile(r"\b(BLOB|BIT|INTERVAL|MAP|UNION|VARIANT|GEOMETRY|DATE|TIME|TIMESTAMP\w*|TIMETZ|UUID)\b")
_EXPLAIN = re.compile(r"\s*explain\s*(\([^)]*\)|analyze\b)?", re.IGNORECASE)


def query(location: Location, sql: str, *, timeout_s: float = 60) -> pa.Table:
    """The result of one SELECT (or WITH, FROM, VALUES, DESCRIBE, SHOW, SUMMARIZE, EXPLAIN of one) over the tables.

    Raises Refusal for anything else, for SQL that DuckDB rejects, for a file, and for a query that runs too long.
    """
    dataset = Dataset.open(location)
    if not timeout_s > 0:
        raise Refusal(f"a query's time limit is above 0 seconds; got {timeout_s:g}; give a positive number")
    _refuse_other_statements(sql)
    with (
        refuse_if_damaged(dataset),
        _connection(dataset, sql) as connection,
        _time_limit(connection, timeout_s) as expired,
    ):
        import duckdb

        try:
            return _plain(_writable(connection.sql(sql)).to_arrow_table())
        except duckdb.InterruptException as error:
            if expired.is_set():
                raise Refusal(
                    f"a query may run {timeout_s:g} s; this one took longer; narrow it down or give a longer time limit"
                ) from error
            raise
        except duckdb.PermissionException as error:
            raise Refusal(
                f"a query reads the dataset's tables ({', '.join(dataset.tables)}) and no files; "
                f"DuckDB says: {first_line(error)}; name a table instead"
            ) from error
        except duckdb.CatalogException as error:
            raise Refusal(
                f"the query must be valid DuckDB SQL; it says: {first_line(error)}; "
                f"the tables are {', '.join(dataset.tables)}"
            ) from error
        except duckdb.Error as error:
            _refuse_damage(dataset, sql)
            raise Refusal(f"the query must be valid DuckDB SQL; it says: {first_line(error)}") from error


def _refuse_damage(dataset: Dataset, sql: str) -> None:
    """Where a query fails on bytes that are not the manifest's, they are to blame, not the query."""
    from attlas.analysis.integrity import check_file

    for table in filter(partial(_is_named, sql), dataset.tables):
        for part in dataset.parts(table):
            for finding in check_file(dataset, table, part):
                raise dataset.refusal(str(finding))
            reason = rows_error(dataset.storage, part.path)
            if reason is not None:
                raise dataset.refusal(f"{part.path}: its rows cannot be read ({reason})")


def _is_named(sql: str, table: str) -> bool:
    return table.lower() in sql.lower()


def _refuse_other_statements(sql: str) -> None:
    import duckdb

    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise Refusal(f"the query must be valid DuckDB SQL; it says: {first_line(error)}") from error
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
def _connection(dataset: Dataset, sql: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory database that holds the tables and can open nothing."""
    import duckdb

    threads = min(os.cpu_count() or 1, 8)
    connection = duckdb.connect(":memory:", config={"threads": threads, "memory_limit": _MEMORY})
    try:
        for table in dataset.tables:
            try:
                connection.register(table, _rows(dataset, table))
            except Refusal:
                if _is_named(sql, table):
                    raise  # what a query does not read may be damaged
        for setting in ("python_enable_replacements=false", "temp_directory=''", "enable_external_access=false"):
            connection.execute(f"SET {setting}")
        connection.execute("SET lock_configuration=true")
        yield connection
    finally:
        connection.close()


def _rows(dataset: Dataset, table: str) -> arrow.Dataset | pa.Table:
    """The rows of a table where they lie; of parts that are missing or damaged a Refusal."""
    schema, parts = dataset.part_schema(table), dataset.parts(table)
    if not parts:
        return schema.empty_table() if len(schema) else pa.table({"nothing": pa.array([], pa.null())})
    return arrow_dataset(dataset.storage, parts, schema)


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


def _writable(relation: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
    """The relation with what is no number, truth, text, list or record as text: not every format knows the others."""
    types = [str(dtype) for dtype in relation.types]
    if not any(map(_AS_TEXT.search, types)):
        return relation
    columns = []
    for i, (name, dtype) in enumerate(zip(relation.columns, types, strict=True), start=1):
        quoted = '"' + name.replace('"', '""') + '"'
        columns.append(f"CAST(#{i} AS VARCHAR) AS {quoted}" if _AS_TEXT.search(dtype) else f"#{i} AS {quoted}")
    return relation.project(", ".join(columns))


def _plain(table: pa.Table) -> pa.Table:
    """DuckDB's 128-bit sums as int64 where they fit, and every column under a name of its own."""
    names: list[str] = []
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        names.append(_unused(name, names))
        columns.append(_narrow(column))
    return pa.Table.from_arrays(columns, names=names)


def _unused(name: str, names: list[str]) -> str:
    """The name, or the first of name_1, name_2, … that is none yet."""
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return name if name not in names else next(n for n in numbered if n not in names)


def _narrow(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_decimal(column.type):
        return column
    try:
        return column.cast(pa.int64() if column.type.scale == 0 else pa.float64())
    except pa.ArrowInvalid:
        return column.cast(pa.float64())
