"""Read-only SQL over the tables of a dataset, and over views with names beside their numbers.

DuckDB is never allowed to open a file. The tables are registered as Arrow datasets over the manifest's parts, and
external access is disabled and locked. Checking the type of the statement would not be enough: a COPY inside a common
table expression parses as a SELECT.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from attlas.analysis.damage import refuse_if_damaged
from attlas.analysis.dataset import Dataset
from attlas.analysis.parts import first_line, rows_error
from attlas.analysis.result import FORMATS as FORMATS
from attlas.analysis.result import Format as Format
from attlas.analysis.result import Rows
from attlas.analysis.result import write_result as write_result
from attlas.analysis.scanning import arrow_dataset
from attlas.analysis.views import statement, views_of
from attlas.extract.store import Location, Refusal

if TYPE_CHECKING:
    import duckdb
    import pyarrow.dataset as arrow

_MEMORY_LIMIT = "4GB"
_MAX_RESULT_BYTES = 2 << 30
_MAX_GROWTH_BYTES = 8 << 30  # of this process: what DuckDB counts, a result in memory, and what neither counts
_MAX_SECONDS = 7 * 24 * 3600
_GRACE_S = 2  # in which an interrupted query ends, unless it is inside a single function
_LOOK_EVERY_S = 0.1
_BATCH_ROWS = 1 << 14
_BATCHES_AHEAD = 4
_HELD_BYTES = 64 << 20  # of the first rows, before any is passed on
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
    rows = query_rows(location, sql, timeout_s=timeout_s)
    batches, size = [], 0
    for batch in rows.batches:
        size += batch.nbytes
        if size > _MAX_RESULT_BYTES:
            raise _too_much_memory(f"its result is larger than {_MAX_RESULT_BYTES >> 30} GiB")
        batches.append(batch)
    return pa.Table.from_batches(batches, rows.schema)


def query_rows(location: Location, sql: str, *, timeout_s: float = 60) -> Rows:
    """The same, batch by batch, for results of any size. What fails before many rows are there fails here, and else when they are asked for.

    The time limit holds until the last row has been taken.
    """
    dataset = Dataset.open(location)
    if not 0 < timeout_s <= _MAX_SECONDS:
        raise Refusal(
            f"a query's time limit is above 0 seconds and at most {_MAX_SECONDS:,} (a week); got {timeout_s:g}; give another number"
        )
    _refuse_other_statements(sql)
    limits = _Limits(timeout_s)
    answer = _Answer(limits, _batches(dataset, sql, limits))
    return _normalized(answer.schema(), answer.batches())


class _Answer:
    """A schema and batches that a thread of its own gives, and the caller takes."""

    def __init__(self, limits: _Limits, pieces: Iterator[pa.Schema | pa.RecordBatch]) -> None:
        self._limits = limits
        self._queue: queue.Queue[pa.Schema | pa.RecordBatch | BaseException | None] = queue.Queue(_BATCHES_AHEAD)
        self._is_taken = True
        self._thread = threading.Thread(target=self._give, args=[pieces], name=QUERY_THREAD, daemon=True)
        self._thread.start()

    def _give(self, pieces: Iterator[pa.Schema | pa.RecordBatch]) -> None:
        """Pass on all pieces, and the error that ends them, for as long as someone takes them."""
        with contextlib.closing(pieces):  # pyright: ignore[reportArgumentType]
            try:
                for piece in pieces:
                    if not self._put(piece):
                        return
                self._put(None)
            except BaseException as error:
                self._put(error)

    def _put(self, piece: pa.Schema | pa.RecordBatch | BaseException | None) -> bool:
        while self._is_taken:
            with suppress(queue.Full):
                self._queue.put(piece, timeout=_LOOK_EVERY_S)
                return True
        return False

    def schema(self) -> pa.Schema:
        """The first piece. Raises what the query raises."""
        try:
            schema = self._limits.wait(self._queue)
        except BaseException:
            self._leave()
            raise
        assert isinstance(schema, pa.Schema), "the first piece is the schema"
        return schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        try:
            while isinstance(batch := self._limits.wait(self._queue), pa.RecordBatch):
                yield batch
        finally:
            self._leave()

    def _leave(self) -> None:
        self._is_taken = False
        threading.Thread(target=self._end, name="attlas-query-end", daemon=True).start()

    def _end(self) -> None:
        """Interrupt the query until it has ended: DuckDB forgets an interruption that comes before it computes."""
        while self._thread.is_alive():
            self._limits.interrupt()
            self._thread.join(_LOOK_EVERY_S)


class _Limits:
    """The limits of a query in time and memory, watched from outside the thread that runs it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.reached: Refusal | None = None
        self._ends = time.monotonic() + seconds
        self._memory = _resident_bytes()
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._lock = threading.Lock()

    def wait(self, pieces: queue.Queue[Any]) -> Any:
        """The next piece of the answer, once it is there. Raises the error that it is, and Refusal beyond a limit, even if the query does
        not heed the interruption.
        """
        while self.reached is None:
            with suppress(queue.Empty):
                piece = pieces.get(timeout=min(_LOOK_EVERY_S, max(0, self._ends - time.monotonic())))
                if isinstance(piece, BaseException):
                    raise piece
                return piece
            self.reached = self._reached()
        self.interrupt()
        with suppress(queue.Empty):
            while not isinstance(pieces.get(timeout=_GRACE_S), BaseException | None):
                pass
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
        f"a query takes at most {_MEMORY_LIMIT}, and a result in memory {_MAX_RESULT_BYTES >> 30} GiB; {came}; select fewer rows or columns, "
        "aggregate them, write them to a file (attlas query --output), or read the parts with Polars or DuckDB (attlas open)"
    )


def _resident_bytes() -> int:
    """The memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - storages have the paths here
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _batches(dataset: Dataset, sql: str, limits: _Limits) -> Iterator[pa.Schema | pa.RecordBatch]:
    """The schema and the batches of a query's result, in the thread that may be left behind."""
    with (
        refuse_if_damaged(dataset),
        _connection(dataset, sql, limits) as connection,
    ):
        import duckdb

        try:
            reader = _cast_to_writable_types(connection.sql(sql)).to_arrow_reader(_BATCH_ROWS)
            yield reader.schema
            yield from reader
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
        except (duckdb.Error, OSError) as error:  # OSError: from Arrow, of a query that fails after its first rows
            if limits.reached is None:
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


def _normalized(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Rows:
    """Unique column names, and integers or floats in place of DuckDB's decimals, such as sums of 128 bits: floats if one of the first rows is too large.

    The first rows are waited for, so that an answer that fails among them, as most do, fails before any of it is written.
    """
    first, size = [], 0
    for batch in batches:
        first.append(batch)
        size += batch.nbytes
        if size > _HELD_BYTES:
            break
    held = pa.Table.from_batches(first, schema)
    names: list[str] = []
    for name in schema.names:
        names.append(_unique_name(name, names))
    types = [_narrowed(column) for column in held.columns]
    fields = [field.with_name(name).with_type(type) for field, name, type in zip(schema, names, types, strict=True)]
    wanted = pa.schema(fields)
    return Rows(wanted, (_cast(batch, wanted) for batch in itertools.chain(first, batches)))


def _unique_name(name: str, names: list[str]) -> str:
    """The name, or the first of name_1, name_2, … that is not taken."""
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return name if name not in names else next(n for n in numbered if n not in names)


def _narrowed(column: pa.ChunkedArray) -> pa.DataType:
    if not pa.types.is_decimal(column.type):
        return column.type
    try:
        column.cast(pa.int64())
    except pa.ArrowInvalid:
        return pa.float64()
    return pa.int64() if column.type.scale == 0 else pa.float64()


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    try:
        columns = [c if c.type == type else c.cast(type) for c, type in zip(batch.columns, schema.types, strict=True)]
    except pa.ArrowInvalid as error:
        raise Refusal(
            f"a whole number in a result has at most 64 bits; {first_line(error)}; CAST(… AS DOUBLE) in the query"
        ) from error
    return pa.RecordBatch.from_arrays(columns, schema=schema)
