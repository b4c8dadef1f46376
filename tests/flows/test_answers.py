"""The commands that read a dataset, as a user types them, on a dataset that a run has left."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from extract.pipeline import RunOptions, finish, measure_shard, prepare
from tests.flows.conftest import Ended

SQL = "SELECT layer, head, avg(entropy_nats) AS entropy FROM heads GROUP BY ALL ORDER BY layer, head"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    (folder / "corpus.txt").write_text("One fox jumps over one dog. " * 30)
    job = prepare(RunOptions(model="demo", corpus=str(folder / "corpus.txt"), out=folder / "out", max_length=64))
    for shard in job.remaining:
        measure_shard(job, shard)
    return finish(job)


def test_query_prints_a_table_csv_or_json(attlas: Callable[..., Ended], dataset: Path) -> None:
    table = attlas("query", str(dataset), SQL)
    assert table[0] == 0 and "entropy" in table[1]
    csv = attlas("query", str(dataset), SQL, "--format", "csv")
    assert csv[0] == 0 and len(csv[1].strip().splitlines()) == 1 + 72
    rows = json.loads(attlas("query", str(dataset), SQL, "--format", "json")[1])
    assert len(rows) == 72 and all(row["entropy"] >= 0 for row in rows)


@pytest.mark.parametrize("form", ["table", "csv", "json", "parquet"])
def test_query_writes_a_file_in_every_format(
    attlas: Callable[..., Ended], dataset: Path, tmp_path: Path, form: str
) -> None:
    target = tmp_path / f"answer.{form}"
    assert attlas("query", str(dataset), SQL, "--format", form, "--output", str(target))[0] == 0
    assert target.stat().st_size > 0
    if form == "parquet":
        assert pq.read_table(target).num_rows == 72


@pytest.mark.parametrize("sql", ["DELETE FROM heads", "COPY heads TO 'x.csv'", "SELECT * FROM read_csv('/etc/passwd')"])
def test_sql_that_writes_or_reads_elsewhere_is_refused(attlas: Callable[..., Ended], dataset: Path, sql: str) -> None:
    code, out, err = attlas("query", str(dataset), sql)
    assert code == 2 and err.strip() and not out


def test_verify_info_and_report_answer(attlas: Callable[..., Ended], dataset: Path, tmp_path: Path) -> None:
    assert attlas("verify", str(dataset))[0] == 0
    assert "BertModel" in attlas("info", str(dataset))[1]
    assert attlas("report", str(dataset))[0] == 0
    assert "<html" in (dataset / "report.html").read_text("utf-8")
    part = next((dataset / "residual").iterdir())
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + b"?")
    try:
        code, out, err = attlas("verify", str(dataset))
        assert code == 3 and "residual/shard-00000.parquet" in out + err
    finally:
        part.write_bytes(whole)
