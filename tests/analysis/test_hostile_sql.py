"""SQL that reaches for more than the tables of a dataset, or never ends."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attlas.analysis import query as query_module
from attlas.analysis.query import QUERY_THREAD, query, query_rows
from attlas.extract.store import Refusal
from tests.conftest import Ended

# a single value, inside whose computation DuckDB can't be interrupted; of this length it takes some seconds
ONE_LONG_VALUE = "SELECT levenshtein(repeat('x', 40000), repeat('y', 40000))"


def wait_for_abandoned_queries() -> None:
    for thread in threading.enumerate():
        if thread.name == QUERY_THREAD:
            thread.join(120)


def test_a_value_that_takes_for_ever_does_not_outlive_the_time_limit(folder: Path) -> None:
    start = time.monotonic()
    with pytest.raises(Refusal, match=r"a query may run 0\.5 s; this one took longer"):
        query(folder, ONE_LONG_VALUE, timeout_s=0.5)
    assert time.monotonic() - start < 30
    wait_for_abandoned_queries()


def test_the_command_ends_with_its_refusal_while_such_a_value_is_computed(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "answer.csv"
    sql = ONE_LONG_VALUE.replace("40000", "2000000")  # an hour
    command = [sys.executable, "-m", "attlas.flows.cli", "query", str(folder), sql]
    options = ["--timeout", "0.5", "--format", "csv", "--output", str(output)]
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=100)
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        "attlas: a query may run 0.5 s; this one took longer; narrow it down or give a longer time limit"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), 1e300])
def test_a_time_limit_is_a_number_of_seconds_up_to_a_week(folder: Path, seconds: float) -> None:
    with pytest.raises(Refusal, match=r"above 0 seconds and at most 604,800 \(a week\)"):
        query(folder, "SELECT 1", timeout_s=seconds)


def test_a_result_is_refused_as_soon_as_it_is_too_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_module, "_MAX_RESULT_BYTES", 1 << 24)
    start = time.monotonic()
    with pytest.raises(Refusal, match=r"a query takes at most 4GB, .*; its result is larger .*--output"):
        query(folder, "SELECT * FROM range(100000000000)")
    assert time.monotonic() - start < 30


def test_a_result_of_any_size_is_passed_on_batch_by_batch(folder: Path) -> None:
    rows, at_first, most = 0, query_module._resident_bytes(), 0
    for batch in query_rows(folder, "SELECT range AS a, range % 7 AS b FROM range(60000000)").batches:
        rows += batch.num_rows
        most = max(most, query_module._resident_bytes() - at_first)
    assert rows == 60_000_000
    assert most < 500 << 20  # of 960 MB


def test_a_result_that_nobody_takes_to_its_end_stops_its_query(folder: Path) -> None:
    rows = query_rows(folder, "SELECT * FROM range(100000000000)")
    next(rows.batches)
    del rows
    start = time.monotonic()
    wait_for_abandoned_queries()
    assert time.monotonic() - start < 30


def test_a_query_that_is_given_up_before_it_computes_does_not_compute(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = query_module.statement
    pauses = iter([query_module._GRACE_S + 1])

    def slow(*arguments: Any) -> Any:
        time.sleep(next(pauses, 0))
        return real(*arguments)

    monkeypatch.setattr(query_module, "statement", slow)
    with pytest.raises(Refusal, match=r"a query may run 0\.2 s"):
        query(folder, "SELECT count(*) FROM range(100000000000000) r(i) WHERE hash(i) = 1", timeout_s=0.2)
    start = time.monotonic()
    wait_for_abandoned_queries()
    assert time.monotonic() - start < 30


def test_a_query_that_fails_late_leaves_no_file(attlas: Callable[..., Ended], folder: Path, tmp_path: Path) -> None:
    sql = "SELECT CASE WHEN range < 20000000 THEN range ELSE error('late') END AS a FROM range(20000001)"
    code, _, err = attlas("query", folder, sql, "--format", "csv", "--output", tmp_path / "rows.csv")
    assert (code, err.count("\n")) == (2, 1) and "late" in err
    assert list(tmp_path.iterdir()) == []


def test_memory_that_duckdb_does_not_count_is_limited_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_module, "_MAX_GROWTH_BYTES", 1 << 29)
    with pytest.raises(Refusal, match="a query takes at most 4GB"):
        query(folder, "SELECT sum(length(repeat('x', 100000000) || i)) FROM range(2000) r(i)", timeout_s=60)
    wait_for_abandoned_queries()


@pytest.mark.parametrize(
    "source",
    [
        "read_text('http://127.0.0.1:9/x')",
        "'https://example.invalid/x.parquet'",
        "'s3://bucket/x.parquet'",
        "'hf://datasets/a/b/x.parquet'",
        "read_text('/proc/self/environ')",
        "duckdb_secrets()",
        "duckdb_extensions()",
        "glob('/etc/*')",
    ],
)
def test_neither_network_nor_files_nor_secrets_are_reached(folder: Path, source: str) -> None:
    with pytest.raises(Refusal, match="and no files"):
        query(folder, f"SELECT * FROM {source}")


def test_the_environment_is_not_readable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTLAS_TEST_SECRET", "s3cr3t")
    with pytest.raises(Refusal, match="getenv does not exist"):
        query(folder, "SELECT getenv('ATTLAS_TEST_SECRET')")


def test_no_setting_shows_a_path_of_this_machine(folder: Path) -> None:
    shown = query(folder, "SELECT value FROM duckdb_settings()")["value"].to_pylist()
    paths = [str(Path.home()), os.getcwd(), str(folder)]  # noqa: PTH109 - a text to look for
    assert not [value for value in shown for path in paths if value and path != "/" and path in value]


@pytest.mark.parametrize("sql", ["SET threads = 1", "RESET lock_configuration", "SET enable_external_access = true"])
def test_settings_stay_locked(folder: Path, sql: str) -> None:
    with pytest.raises(Refusal, match="a query only reads; got SET"):
        query(folder, sql)
