"""Read-only SQL over the tables of a dataset, and over views with names beside their numbers.

DuckDB is never allowed to open a file. The tables are registered as Arrow datasets over the manifest's parts, and
external access is disabled and locked. Checking the type of the statement would not be enough: a COPY inside a common
table expression parses as a SELECT.
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
from attlas.analysis.views import statement, views_of
from attlas.extract.store import Location, Refusal

if TYPE_CHECKING:
    import duckdb
    import pyarrow.dataset as arrow

_MEMORY_LIMIT = "4GB"
_AS_TEXT = re.compile(r"\b(BLOB|BIT|INTERVAL|MAP|UNION|VARIANT|GEOMETRY|DATE|TIME|TIMESTAMP\w*|TIMETZ|UUID)\b")
_EXPLAIN = re.compile(r"\s*explain\s*(\([^)]*\)|analyze\b)?", re.IGNORECASE)


def query(location: Location, sql: str, *, timeout_s: float = 60) -> pa.Table:
    """Run one read-only SQL statement over the tables and views: SELECT, WITH, FROM, VALUES, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN.

    Raises Refusal for any other statement, SQL that DuckDB rejects, access to files, and queries beyond the time limit.
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
            return _normalize(_cast_to_writable_types(connection.sql(sql)).to_arrow_table())
        except duckdb.InterruptException as error:
            if expired.is_set():
                raise Refusal(
                    f"a query may run {timeout_s:g} s; this one took longer; narrow it down or give a longer time limit"
                ) from error
            raise
        except duckdb.PermissionException as error:
            raise Refusal(
                f"a query reads the dataset's tables ({', '.join(_names(dataset))}) and no files; "
                f"DuckDB says: {first_line(error)}; name a table instead"
            ) from error
        except duckdb.CatalogException as error:
            raise Refusal(
                f"the query must be valid DuckDB SQL; it says: {first_line(error)}; "
                f"the tables are {', '.join(_names(dataset))}"
            ) from error
        except duckdb.Error as error:
            _refuse_damaged_parts(dataset, sql)
            raise Refusal(f"the query must be valid DuckDB SQL; it says: {first_line(error)}") from error


def _refuse_damaged_parts(dataset: Dataset, sql: str) -> None:
    """Raise Refusal if a table that the query reads has a damaged part, which is then why the query failed."""
    from attlas.analysis.integrity import check_file

    for table in filter(partial(_mentions, dataset, sql), dataset.tables):
        for part in dataset.parts(table):
            for finding in check_file(dataset, table, part):
                raise dataset.refusal(str(finding))
            reason = rows_error(dataset.storage, part.path)
            if reason is not None:
                raise dataset.refusal(f"{part.path}: its rows cannot be read ({reason})")


def _names(dataset: Dataset) -> list[str]:
    """The names that a query can use: tables and views."""
    return [*dataset.tables, *(view.name for view in views_of(dataset))]


def _mentions(dataset: Dataset, sql: str, table: str) -> bool:
    """Whether a query may read a table, by its name or through a view."""
    views = [view.name for view in views_of(dataset) if table in view.tables]
    return any(name in sql.lower() for name in (table, *views))


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
        # EXPLAIN ANALYZE runs the statement
        _refuse_other_statements(_EXPLAIN.sub("", _without_comments(statements[0].query), count=1))
    elif kind != duckdb.StatementType.SELECT:
        raise Refusal(f"a query only reads; got {kind.name}; give a single SELECT (or WITH, FROM, DESCRIBE, EXPLAIN)")


def _without_comments(sql: str) -> str:
    return re.sub(r"\A(\s*explain\b)(\s|--[^\n]*\n|/\*.*?\*/)*", r"\1 ", sql, flags=re.IGNORECASE | re.DOTALL)


@contextmanager
def _connection(dataset: Dataset, sql: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory database with the tables and views, which cannot open files."""
    import duckdb

    threads = min(os.cpu_count() or 1, 8)
    connection = duckdb.connect(":memory:", config={"threads": threads, "memory_limit": _MEMORY_LIMIT})
    unread: set[str] = set()
    try:
        for table in dataset.tables:
            try:
                connection.register(table, _table_source(dataset, table, is_named=_mentions(dataset, sql, table)))
            except Refusal:
                if _mentions(dataset, sql, table):
                    raise  # tables that the query does not read may be damaged
                unread.add(table)
        for view in views_of(dataset):
            if not unread.intersection(view.tables):
                connection.execute(statement(view, dataset))
        for setting in ("python_enable_replacements=false", "temp_directory=''", "enable_external_access=false"):
            connection.execute(f"SET {setting}")
        connection.execute("SET lock_configuration=true")
        yield connection
    finally:
        connection.close()


def _table_source(dataset: Dataset, table: str, *, is_named: bool) -> arrow.Dataset | pa.Table:
    """A table's parts as an Arrow dataset. Raises Refusal if parts are missing or damaged.

    is_named: by the query. The parts of other tables are not opened, if the manifest says their columns.
    """
    schema = None if is_named else dataset.stated_schema(table)
    if schema is None:
        schema = dataset.part_schema(table)
    parts = dataset.parts(table)
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


def _cast_to_writable_types(relation: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
    """Cast columns to text whose types some output format lacks: all but numbers, booleans, text, lists and structs."""
    types = [str(dtype) for dtype in relation.types]
    if not any(map(_AS_TEXT.search, types)):
        return relation
    columns = []
    for i, (name, dtype) in enumerate(zip(relation.columns, types, strict=True), start=1):
        quoted = '"' + name.replace('"', '""') + '"'
        columns.append(f"CAST(#{i} AS VARCHAR) AS {quoted}" if _AS_TEXT.search(dtype) else f"#{i} AS {quoted}")
    return relation.project(", ".join(columns))


def _normalize(table: pa.Table) -> pa.Table:
    """Convert DuckDB's 128-bit sums to int64 if they fit, and make column names unique."""
    names: list[str] = []
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        names.append(_unique_name(name, names))
        columns.append(_narrow_decimal(column))
    return pa.Table.from_arrays(columns, names=names)


def _unique_name(name: str, names: list[str]) -> str:
    """The name, or the first of name_1, name_2, … that is not taken."""
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return name if name not in names else next(n for n in numbered if n not in names)


def _narrow_decimal(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_decimal(column.type):
        return column
    try:
        return column.cast(pa.int64() if column.type.scale == 0 else pa.float64())
    except pa.ArrowInvalid:
        return column.cast(pa.float64())
