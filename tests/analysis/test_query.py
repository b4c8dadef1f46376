import io
import json
import time
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.analysis.dataset import Dataset
from attlas.analysis.query import query, write_result
from attlas.analysis.result import Format, Rows
from attlas.extract.store import Refusal


def test_a_query_sees_every_table_and_all_its_rows(folder: Path) -> None:
    dataset = Dataset.open(folder)
    for table in dataset.tables:
        found = query(folder, f"SELECT count(*) AS rows FROM {table}")
        assert found.to_pydict() == {"rows": [dataset.manifest["tables"][table]["rows"]]}


@pytest.mark.parametrize(
    "sql",
    [
        "FROM heads SELECT layer, head",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "VALUES (1)",
        "DESCRIBE heads",
        "SHOW TABLES",
        "SUMMARIZE heads",
        "EXPLAIN SELECT * FROM heads",
        "/* why */ EXPLAIN /* and */ ANALYZE SELECT count(*) FROM heads",
        "SELECT 1;",
    ],
)
def test_whatever_only_reads_is_answered(folder: Path, sql: str) -> None:
    assert query(folder, sql).num_rows > 0


def test_dictionary_columns_filter_as_text(folder: Path) -> None:
    assert query(folder, "SELECT 1 FROM residual WHERE site = 'mlp'").num_rows > 0


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("COPY heads TO '{target}'", "COPY"),
        ("COPY (SELECT 1) TO '{inside}'", "COPY"),
        ("ATTACH '{target}'", "ATTACH"),
        ("INSTALL httpfs", "LOAD"),
        ("LOAD httpfs", "LOAD"),
        ("SET threads = 1", "SET"),
        ("RESET threads", "SET"),
        ("PRAGMA version", "PRAGMA"),
        ("CREATE TABLE t AS SELECT 1", "CREATE"),
        ("CREATE SECRET (TYPE s3)", "CREATE"),
        ("DROP VIEW heads", "DROP"),
        ("INSERT INTO heads VALUES (1)", "INSERT"),
        ("DELETE FROM heads", "DELETE"),
        ("UPDATE heads SET layer = 1", "UPDATE"),
        ("EXPORT DATABASE '{target}'", "EXPORT"),
        ("CHECKPOINT", ""),
        ("CALL pragma_version()", "CALL"),
        ("VACUUM", "VACUUM"),
        ("BEGIN TRANSACTION", "TRANSACTION"),
        ("PREPARE p AS SELECT 1", "PREPARE"),
        ("DETACH memory", "DETACH"),
        ("IMPORT DATABASE '{target}'", ""),
        ("PRAGMA enable_profiling", "PRAGMA"),
        ("EXPLAIN COPY heads TO '{target}'", "COPY"),
        ("EXPLAIN ANALYZE COPY heads TO '{target}'", "COPY"),
        ("EXPLAIN (ANALYZE) COPY heads TO '{target}'", "COPY"),
        ("explain /* a */ analyze -- b\n COPY heads TO '{target}'", "COPY"),
    ],
)
def test_whatever_does_more_than_read_is_refused(folder: Path, tmp_path: Path, sql: str, kind: str) -> None:
    target, inside = tmp_path / "written", folder / "heads" / "written.parquet"
    with pytest.raises(Refusal, match=f"a query only reads; got {kind}"):
        query(folder, sql.format(target=target, inside=inside))
    assert not target.exists()
    assert not inside.exists()


def test_a_write_that_parses_as_a_select_changes_nothing(folder: Path) -> None:
    """DuckDB runs a COPY inside a common table expression of a statement that it calls a SELECT."""
    for target in (folder / "heads" / "shard-00000.parquet", folder / "new.parquet"):
        before = target.read_bytes() if target.exists() else None
        with pytest.raises(Refusal, match="reads the dataset's tables"):
            query(folder, f"WITH x AS (COPY (SELECT 1) TO '{target}') SELECT 1")
        assert (target.read_bytes() if target.exists() else None) == before


@pytest.mark.parametrize(
    "source",
    [
        "'{path}'",
        *(f"{reader}('{{path}}')" for reader in ("read_parquet", "read_text", "read_blob", "read_csv", "read_json")),
        *(f"{reader}('{{path}}')" for reader in ("sniff_csv", "parquet_schema", "parquet_metadata", "glob")),
        "query('SELECT * FROM read_text(''{path}'')')",
    ],
)
def test_no_file_can_be_read_not_even_inside_the_dataset(folder: Path, tmp_path: Path, source: str) -> None:
    outside = tmp_path / "outside.parquet"
    pq.write_table(pa.table({"secret": [1]}), outside)
    for path in (outside, folder / "heads" / "shard-00000.parquet"):
        with pytest.raises(Refusal, match="reads the dataset's tables"):
            query(folder, f"SELECT * FROM {source.format(path=path)}")


def test_variables_of_the_program_are_no_tables(folder: Path) -> None:
    dataset = pa.table({"a": [1]})
    assert dataset.num_rows == 1
    with pytest.raises(Refusal, match="Table with name dataset does not exist"):
        query(folder, "SELECT * FROM dataset")


@pytest.mark.parametrize(("sql", "count"), [("SELECT 1; SELECT 2", 2), ("", 0), ("-- nothing", 0)])
def test_anything_but_one_statement_is_refused(folder: Path, sql: str, count: int) -> None:
    with pytest.raises(Refusal, match=f"a query is one statement; got {count}"):
        query(folder, sql)


@pytest.mark.parametrize("sql", ["SELEC 1", "SELECT nope FROM heads", "SELECT * FROM nope", "SELECT 'a'::INT"])
def test_wrong_sql_is_refused_with_what_duckdb_says(folder: Path, sql: str) -> None:
    with pytest.raises(Refusal, match=r"the query must be valid DuckDB SQL; it says: .*Error"):
        query(folder, sql)


def test_a_query_that_runs_too_long_is_stopped_and_says_so(folder: Path) -> None:
    start = time.monotonic()
    with pytest.raises(Refusal, match=r"a query may run 0\.5 s; this one took longer"):
        query(folder, "SELECT count(*) FROM range(100000000000000) r(i) WHERE hash(i) = 1", timeout_s=0.5)
    assert time.monotonic() - start < 30


def test_a_time_limit_is_positive(folder: Path) -> None:
    with pytest.raises(Refusal, match=r"above 0 seconds and .*; got 0"):
        query(folder, "SELECT 1", timeout_s=0)


def test_sums_are_integers_and_repeated_names_are_told_apart(folder: Path) -> None:
    found = query(folder, "SELECT sum(query_rows) AS a, 1 AS a, 2 AS a FROM heads")
    assert found.column_names == ["a", "a_1", "a_2"]
    assert found.schema.field("a").type == pa.int64()
    assert query(folder, "SELECT 1 AS a_b, 2 AS a_b, 3 AS a_b_1, 4 AS a_b").column_names == [
        "a_b",
        "a_b_1",
        "a_b_1_1",
        "a_b_2",
    ]


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("SELECT 170141183460469231731687303715884105727::HUGEINT AS a", pa.float64()),
        ("SELECT sum(i) AS a FROM range(10) r(i)", pa.int64()),
        ("SELECT 1.5 AS a", pa.float64()),
        ("SELECT i::HUGEINT AS a FROM range(5000000) r(i)", pa.int64()),
    ],
)
def test_decimals_of_duckdb_are_integers_or_floats(folder: Path, sql: str, kind: pa.DataType) -> None:
    assert query(folder, sql).schema.field("a").type == kind


def test_a_number_beyond_64_bits_that_comes_late_is_refused_with_what_to_do(folder: Path) -> None:
    sql = "SELECT CASE WHEN i < 9000000 THEN i::HUGEINT ELSE i::HUGEINT * 1000000000000000 END AS a FROM range(9000100) r(i)"
    with pytest.raises(Refusal, match=r"has at most 64 bits; .*; CAST\(… AS DOUBLE\) in the query"):
        query(folder, sql)


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_rows_that_come_in_many_batches_read_back(form: Format) -> None:
    batches = [
        pa.record_batch({"a": range(start, start + 1000), "b": ["x,y"] * 1000}) for start in range(0, 300_000, 1000)
    ]
    stream = io.BytesIO()
    write_result(Rows(batches[0].schema, iter(batches)), form, stream)
    read = {"csv": pl.read_csv, "json": pl.read_json, "parquet": pl.read_parquet}[form]
    back = read(io.BytesIO(stream.getvalue()))
    assert back["a"].to_list() == list(range(300_000)) and back["b"].unique().to_list() == ["x,y"]


@pytest.mark.parametrize(("form", "text"), [("csv", "a\n"), ("json", "[]\n")])
def test_a_result_without_rows_is_whole(form: Format, text: str) -> None:
    stream = io.StringIO()
    write_result(pa.table({"a": pa.array([], pa.int64())}), form, stream)
    assert stream.getvalue() == text


RESULT = pa.table(
    {
        "name": ["a,b", 'quote " and\nline', None],
        "value": pa.array([1.5, float("nan"), None], pa.float64()),
        "ids": pa.array([[1, 2], [], None], pa.list_(pa.int32())),
    }
)


def test_csv_reads_back(folder: Path) -> None:
    stream = io.StringIO()
    write_result(RESULT, "csv", stream)
    back = pl.read_csv(io.StringIO(stream.getvalue()))
    assert back["name"].to_list() == ["a,b", 'quote " and\nline', None]
    assert back["ids"].to_list()[0] == "1 2"


def test_json_is_a_list_of_objects_without_nan() -> None:
    stream = io.StringIO()
    write_result(RESULT, "json", stream)
    rows = json.loads(stream.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert rows[0] == {"name": "a,b", "value": 1.5, "ids": [1, 2]}
    assert rows[1]["value"] is None


def test_parquet_is_written_as_bytes_and_text_streams_are_refused() -> None:
    stream = io.BytesIO()
    write_result(RESULT, "parquet", stream)
    assert pq.read_table(io.BytesIO(stream.getvalue())).schema == RESULT.schema
    with pytest.raises(Refusal, match="Parquet is binary"):
        write_result(RESULT, "parquet", io.StringIO())


def test_the_table_shows_markup_as_it_is_and_says_how_many_rows_it_leaves_out() -> None:
    stream = io.StringIO()
    write_result(pa.table({"[red]x[/red]": ["[bold]"] * 250}), "table", stream)
    text = stream.getvalue()
    assert "[red]x[/red]" in text
    assert text.count("[bold]") == 200
    assert "250 rows; 50 more not shown" in text


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(Refusal, match="one of table, csv, json, parquet; got 'xml'"):
        write_result(RESULT, "xml", io.StringIO())  # type: ignore[arg-type]
