"""The commands that read a dataset, as a user types them, on a dataset that a run has left."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.extract.options import RunOptions
from tests.analysis.synthetic import first_token_scores, local_scores, write_dataset
from tests.extract.runs import complete_run
from tests.flows.conftest import Ended

SQL = "SELECT layer, head, avg(entropy_nats) AS entropy FROM heads GROUP BY ALL ORDER BY layer, head"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    (folder / "corpus.txt").write_text("One fox jumps over one dog. " * 30)
    complete_run(RunOptions(model="demo", corpus=str(folder / "corpus.txt"), out=folder / "out", max_length=64))
    return folder / "out"


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


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a head that writes nothing, which is a defect, and one that rests on the first token."""
    recipes = [lambda r, n: local_scores(r, n, scale=4.0), first_token_scores]
    root = tmp_path_factory.mktemp("broken") / "d"
    return write_dataset(root, layers=1, heads=3, lengths=(20, 40), recipes=recipes, dead=[(0, 2)])


def test_findings_are_printed_for_people_and_for_machines(attlas: Callable[..., Ended], broken: Path) -> None:
    code, out, err = attlas("findings", broken)
    assert code == 0
    header, _, *lines = out.splitlines()
    assert header.split() == ["type", "name", "severity", "place", "value", "low", "high", "evidence"]
    assert [line.split()[:3] for line in lines[:3]] == [
        ["defect", "dead", "head"],
        ["finding", "attention", "sink"],
        ["finding", "head", "at"],
    ]
    assert lines[-1].strip() == "3 rows"
    reason = "not measured: value_ratio_first; measure with --statistics value_ratio_first"
    assert f"not checked: sink that writes: {reason}" in err.splitlines()
    rows = json.loads(attlas("findings", broken, "--format", "json")[1])
    assert [row["name"] for row in rows] == ["dead head", "attention sink", "head at rest"]
    assert (rows[0]["type"], rows[0]["stack"], rows[0]["layer"], rows[0]["head"]) == ("defect", "encoder", 0, 2)
    csv = attlas("findings", broken, "--format", "csv")[1].splitlines()
    assert csv[0].split(",") == list(rows[0]) and len(csv) == 4


@pytest.mark.parametrize("form", ["table", "csv", "json", "parquet"])
def test_findings_are_written_to_a_file_in_every_format(
    attlas: Callable[..., Ended], broken: Path, tmp_path: Path, form: str
) -> None:
    target = tmp_path / f"findings.{form}"
    code, out, _ = attlas("findings", broken, "--format", form, "--output", target)
    assert (code, out) == (0, "")
    assert target.stat().st_size > 0
    if form == "parquet":
        assert pq.read_table(target)["type"].to_pylist() == ["defect", "finding", "finding"]


def test_defects_and_findings_set_the_exit_code_if_asked(
    attlas: Callable[..., Ended], broken: Path, dataset: Path, tmp_path: Path
) -> None:
    assert [attlas("findings", broken, "--fail-on", what)[0] for what in ("defects", "findings")] == [3, 3]
    recipes = [lambda r, n: local_scores(r, n, scale=4.0), first_token_scores]
    resting = write_dataset(tmp_path / "d", layers=1, heads=2, lengths=(20, 40), recipes=recipes)
    assert [attlas("findings", resting, "--fail-on", what)[0] for what in ("defects", "findings")] == [0, 3]
    plain = write_dataset(tmp_path / "e", layers=1, heads=1, lengths=(20, 40), recipes=recipes)
    assert [attlas("findings", plain, "--fail-on", what)[0] for what in ("defects", "findings")] == [0, 0]
    assert attlas("findings", dataset, "--fail-on", "defects")[0] == 0


def test_a_stack_can_forge_no_line_of_findings(attlas: Callable[..., Ended], tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", layers=1, heads=2, lengths=(20, 40), dead=[(0, 1)], summaries=False)
    for path in [*(root / "heads").glob("*.parquet"), *(root / "profiles").glob("*.parquet")]:
        rows = pq.read_table(path)
        at = rows.schema.get_field_index("stack")
        names = pa.array([FORGED] * rows.num_rows).dictionary_encode().cast(rows.schema.field(at).type)
        pq.write_table(rows.set_column(at, rows.schema.field(at), names), path)
    code, out, err = attlas("findings", root)
    assert code == 0
    assert not STEERING.search(out + err)
    assert r"x\x1b[2K\r\nattlas" in out
    assert json.loads(attlas("findings", root, "--format", "json")[1])[0]["stack"] == FORGED


def test_the_demo_model_has_no_defect(attlas: Callable[..., Ended], dataset: Path) -> None:
    rows = json.loads(attlas("findings", dataset, "--format", "json")[1])
    assert "defect" not in {row["type"] for row in rows}


FORGED = "x\x1b[2K\r\nattlas: is whole\x9b31m\u202e\u2028"
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")


def test_a_stray_file_can_forge_no_line(attlas: Callable[..., Ended], dataset: Path) -> None:
    stray = dataset / "heads" / f"{FORGED}.parquet"
    stray.write_bytes(b"")
    try:
        code, out, err = attlas("verify", dataset)
    finally:
        stray.unlink()
    assert (code, len(out.splitlines()), len(err.splitlines())) == (3, 1, 1)
    assert r"x\x1b[2K\r\nattlas: is whole\x9b31m\u202e\u2028.parquet: stray file" in out
    assert not STEERING.search(out + err)
    assert "1 finding in" in err


def test_names_in_the_manifest_can_forge_no_line(attlas: Callable[..., Ended], dataset: Path, tmp_path: Path) -> None:
    forged = shutil.copytree(dataset, tmp_path / FORGED)
    manifest = json.loads((forged / "manifest.json").read_text())
    manifest["corpus"] |= {"name": FORGED, "dropped": {FORGED: 1}}
    manifest["model"] |= {"name": FORGED, "title": FORGED, "residual": FORGED}
    manifest["run"][FORGED] = [FORGED]
    manifest["software"][FORGED] = FORGED
    (forged / "manifest.json").write_text(json.dumps(manifest))
    lines = len(attlas("info", dataset)[1].splitlines())
    for command in ("info", "report", "verify"):
        code, out, err = attlas(command, forged)
        assert code == 0, err
        assert r"x\x1b[2K\r\nattlas" in out
        assert not STEERING.search(out + err)
        assert command != "info" or len(out.splitlines()) == lines + 3  # dropped, run, software


@pytest.mark.parametrize("command", ["info", "report", "verify", "findings", "query"])
def test_a_refusal_is_one_line_whatever_it_names(attlas: Callable[..., Ended], tmp_path: Path, command: str) -> None:
    code, out, err = attlas(command, tmp_path / FORGED, *([FORGED] if command == "query" else []))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert not STEERING.search(err)


def test_a_query_shows_names_of_the_data_as_text(attlas: Callable[..., Ended], dataset: Path) -> None:
    sql = "SELECT chr(27) || '[31m' || chr(10) AS name"
    assert r"\x1b[31m\n" in attlas("query", dataset, sql)[1]
    assert json.loads(attlas("query", dataset, sql, "--format", "json")[1]) == [{"name": "\x1b[31m\n"}]
    assert not STEERING.search(attlas("query", dataset, f"SELECT * FROM {FORGED}")[2])


def test_the_built_in_model_is_named(attlas: Callable[..., Ended], dataset: Path) -> None:
    assert "demo (all-MiniLM-L6-v2)" in attlas("info", dataset)[1]
    assert attlas("report", dataset)[1].startswith("demo (all-MiniLM-L6-v2) on corpus.txt: 72 heads, 1 document, ")
    assert "<h1><bdi>all-MiniLM-L6-v2</bdi></h1>" in (dataset / "report.html").read_text("utf-8")
    assert "all-MiniLM-L6-v2" in (dataset / "README.md").read_text("utf-8")


@pytest.mark.parametrize("width", ["60", "80", "200"])
def test_a_report_in_a_pipe_is_as_wide_as_its_numbers(
    attlas: Callable[..., Ended], dataset: Path, monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    out = attlas("report", dataset)[1]
    header = next(line for line in out.splitlines() if "entropy of max" in line)
    assert header.split() == [
        "head",
        "kind",
        "entropy",
        "of",
        "max",
        "tokens",
        "away",
        "previous",
        "first",
        "separator",
    ]
    assert "…" not in out


@pytest.mark.parametrize("form", ["table", "csv", "json", "parquet"])
def test_an_answer_that_does_not_fit_fails_and_says_where(
    attlas: Callable[..., Ended], dataset: Path, form: str
) -> None:
    code, out, err = attlas("query", dataset, SQL, "--format", form, "--output", "/dev/full")
    assert (code, out) == (1, "")
    assert "/dev/full did not take all of it (No space left on device)" in err


def test_verify_and_info_answer_to_programs(attlas: Callable[..., Ended], dataset: Path, tmp_path: Path) -> None:
    code, out, _ = attlas("verify", dataset, "--format", "json")
    assert (code, json.loads(out)["valid"]) == (0, True)
    code, out, _ = attlas("verify", dataset, "--format", "junit", "--output", tmp_path / "verify.xml")
    assert (code, out) == (0, "")
    assert 'failures="0"' in (tmp_path / "verify.xml").read_text()
    assert json.loads(attlas("info", dataset, "--format", "json")[1])["model"]["architecture"] == "BertModel"
    stray = dataset / "heads" / "more.parquet"
    stray.write_bytes(b"")
    try:
        code, out, err = attlas("verify", dataset, "--format", "json")
    finally:
        stray.unlink()
    assert (code, json.loads(out)["findings"][0]["part"]) == (3, "heads/more.parquet")
    assert "1 finding in" in err


@pytest.mark.parametrize("command", ["verify", "info"])
def test_an_unknown_format_is_refused(attlas: Callable[..., Ended], dataset: Path, command: str) -> None:
    code, out, err = attlas(command, dataset, "--format", "yaml")
    assert (code, out) == (2, "")
    assert "--format must be one of text, json" in err


def test_query_examples_need_no_dataset_and_say_what_one_lacks(attlas: Callable[..., Ended], dataset: Path) -> None:
    code, out, _ = attlas("query", "--examples")
    assert code == 0 and "-- sharpest-heads: " in out and "lacks" not in out
    code, out, _ = attlas("query", dataset, "--examples", "--format", "json")
    assert code == 0 and {tuple(row["lacks"]) for row in json.loads(out)} == {()}


@pytest.mark.parametrize("arguments", [(), ("DIR",), ("DIR", "SELECT 1", "--examples")])
def test_a_query_without_its_parts_is_refused(attlas: Callable[..., Ended], arguments: tuple[str, ...]) -> None:
    code, out, err = attlas("query", *arguments)
    assert (code, out) == (2, "")
    assert "a query is DIR and SQL, or --examples [DIR]" in err


def test_open_prints_the_lines_for_all_software_or_for_one(attlas: Callable[..., Ended], dataset: Path) -> None:
    code, out, _ = attlas("open", dataset)
    assert code == 0 and "# Polars: lazy frames\nimport polars as pl\n" in out and "library(arrow)" in out
    code, out, _ = attlas("open", dataset, "--tool", "duckdb")
    assert code == 0 and out.startswith("CREATE VIEW ") and "import" not in out
    assert attlas("open", dataset / "nowhere")[0] == 2


def test_export_writes_what_statistics_software_reads(
    attlas: Callable[..., Ended], dataset: Path, tmp_path: Path
) -> None:
    file = tmp_path / "heads.csv"
    code, out, _ = attlas("export", dataset, "--output", file, "--columns", "entropy_nats, mass_first", "--wide")
    assert (code, out) == (0, f"export   {file}\n")
    header, *rows = file.read_text().splitlines()
    assert header == "document_id,source,sequences,tokens,stack,layer,head,weight,entropy_nats,mass_first"
    assert len(rows) == 72
    assert attlas("export", dataset, "--output", tmp_path / "m.parquet", "--mixed-model", "entropy_nats")[0] == 0
    assert "log_tokens" in pq.read_schema(tmp_path / "m.parquet").names
    code, _, err = attlas("export", dataset, "--output", file, "--mixed-model", "entropy_nats", "--wide")
    assert code == 2 and "--columns and --wide do not apply" in err
