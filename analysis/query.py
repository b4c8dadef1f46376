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
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
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
_MAX_RESULT_BYTES = 2 << 30
_MAX_GROWTH_BYTES = 8 << 30  # of this process: what DuckDB counts, the result, and what neither counts
_MAX_SECONDS = 7 * 24 * 3600
_GRACE_S = 2  # in which an interrupted query ends, unless it is inside a single function
_LOOK_EVERY_S = 0.1
_BATCH_ROWS = 1 << 14
# no variables of this program, no files, and no paths of this machine among the settings
_SETTINGS = (
    "python_enable_replacements=false",
    "temp_directory=''",
    "secret_directory=''",
    "extension_directory=''",
    "enable_external_access=false",
)
QUERY_THREAD = "attlas-query"
_AS_TEXT = re.compile(r"\b(BLOB|BIT|INTERVAL|MAP|UNION|VARIANT|GEOMETRY|DATE|TIME|TIMESTAMP\w*|TIMETZ|UUID)\b")
_EXPLAIN = re.compile(r"\s*explain\s*(\([^)]*\)|analyze\b)?", re.IGNORECASE)


def query(location: Location, sql: str, *, timeout_s: float = 60) -> pa.Table:
    """Run one read-only SQL statement over the tables and views: SELECT, WITH, FROM, VALUES, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN.

    Raises Refusal for any other statement, SQL that DuckDB rejects, access to files, and queries beyond the limits of time and memory.

    DuckDB can't be interrupted while it computes a single value. A query that does so is left to a thread that ends with this
    process.
    """
    dataset = Dataset.open(location)
    if not 0 < timeout_s <= _MAX_SECONDS:
        raise Refusal(
            f"a query's time limit is above 0 seconds and at most {_MAX_SECONDS:,} (a week); got {timeout_s:g}; give another number"
        )
    _refuse_other_statements(sql)
    future: Future[pa.Table] = Future()
    limits = _Limits(timeout_s)

    def run() -> None:
        try:
            future.set_result(_run(dataset, sql, limits))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=QUERY_THREAD, daemon=True).start()
    try:
        return limits.wait(future)
    finally:
        limits.interrupt()


class _Limits:
    """The limits of a query in time and memory, watched from outside the thread that runs it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.reached: Refusal | None = None
        self._ends = time.monotonic() + seconds
        self._memory = _resident_bytes()
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._lock = threading.Lock()

    def wait(self, future: Future[pa.Table]) -> pa.Table:
        """The result, once it is there. Raises Refusal beyond a limit, even if the query does not heed the interruption."""
        while self.reached is None:
            with suppress(TimeoutError):
                return future.result(timeout=min(_LOOK_EVERY_S, max(0, self._ends - time.monotonic())))
            self.reached = self._reached()
        self.interrupt()
        with suppress(TimeoutError):
            future.exception(timeout=_GRACE_S)
        raise self.reached

    def watch(self, connection: duckdb.DuckDBPyConnection | None) -> None:
        """Interrupt this connection at a limit; None when it is closed."""
        with self._lock:
            self._connection = connection

    def interrupt(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.interrupt()

    def _reached(self) -> Refusal | None:
        if time.monotonic() >= self._ends:
            return Refusal(
                f"a query may run {self.seconds:g} s; this one took longer; narrow it down or give a longer time limit"
            )
        if _resident_bytes() - self._memory > _MAX_GROWTH_BYTES:
            return _too_much_memory(f"this one took more than {_MAX_GROWTH_BYTES >> 30} GiB")
        return None


def _too_much_memory(came: str) -> Refusal:
    return Refusal(
        f"a query takes at most {_MEMORY_LIMIT} and its result {_MAX_RESULT_BYTES >> 30} GiB; {came}; select fewer rows or columns, "
        "aggregate them, or read the parts with Polars or DuckDB (attlas open)"
    )


def _resident_bytes() -> int:
    """The memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - storages have the paths here
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _run(dataset: Dataset, sql: str, limits: _Limits) -> pa.Table:
    """The result of a query, in the thread that may be left behind."""
    with (
        refuse_if_damaged(dataset),
        _connection(dataset, sql, limits) as connection,
    ):
        import duckdb

        try:
            return _normalize(_result(_cast_to_writable_types(connection.sql(sql))))
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
            if limits.reached is None:
                _refuse_damaged_parts(dataset, sql)
            raise Refusal(f"the query must be valid DuckDB SQL; it says: {first_line(error)}") from error


def _result(relation: duckdb.DuckDBPyRelation) -> pa.Table:
    """All rows. Raises Refusal as soon as they take too much memory."""
    reader = relation.to_arrow_reader(_BATCH_ROWS)
    batches: list[pa.RecordBatch] = []
    size = 0
    for batch in reader:
        size += batch.nbytes
        if size > _MAX_RESULT_BYTES:
            raise _too_much_memory("that of this one is larger")
        batches.append(batch)
    return pa.Table.from_batches(batches, reader.schema)


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
def _connection(dataset: Dataset, sql: str, limits: _Limits) -> Iterator[duckdb.DuckDBPyConnection]:
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
        for setting in _SETTINGS:
            connection.execute(f"SET {setting}")
        connection.execute("SET lock_configuration=true")
        limits.watch(connection)
        yield connection
    finally:
        limits.watch(None)
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
