"""The printed lines open every table of the dataset. R is not installed here, so its lines are only read."""

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from attlas.analysis.dataset import Dataset
from attlas.analysis.opening_lines import TOOLS, opening_lines
from attlas.extract.store import Refusal

AWKWARD = """it's [1] *a? "b" é"""


@pytest.fixture(scope="module", params=["known [1]", AWKWARD])
def dataset(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == folder.name:
        return folder
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp("open") / request.param))


def rows_of(dataset: Path) -> dict[str, int]:
    return {name: table["rows"] for name, table in Dataset.open(dataset).manifest["tables"].items()}


def run_python(dataset: Path, tool: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec("\n".join(opening_lines(dataset, tool)), names)
    return {name: names[name] for name in rows_of(dataset)}


def test_the_lines_for_polars_open_every_table(dataset: Path) -> None:
    opened = run_python(dataset, "polars")
    assert {name: frame.select(pl.len()).collect().item() for name, frame in opened.items()} == rows_of(dataset)


def test_the_lines_for_pandas_open_every_table(dataset: Path) -> None:
    assert {name: len(frame) for name, frame in run_python(dataset, "pandas").items()} == rows_of(dataset)


@pytest.mark.filterwarnings("ignore")
def test_the_lines_for_datasets_open_every_table(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert {name: table.num_rows for name, table in run_python(dataset, "datasets").items()} == rows_of(dataset)


def test_the_lines_for_duckdb_open_every_table(dataset: Path) -> None:
    with duckdb.connect() as connection:
        connection.execute("\n".join(opening_lines(dataset, "duckdb")))
        counts = {}
        for name in rows_of(dataset):
            (counts[name],) = connection.execute(f"SELECT COUNT(*) FROM {name}").fetchall()[0]
    assert counts == rows_of(dataset)


def test_the_lines_for_r_which_no_test_runs_name_every_folder(dataset: Path) -> None:
    library, *lines = opening_lines(dataset, "r")
    assert library == "library(arrow)"
    folders = [json.loads(line.partition("open_dataset(")[2].removesuffix(")")) for line in lines]
    assert folders == [f"{dataset}/{table}" for table in rows_of(dataset)]
    assert all(Path(folder).is_dir() for folder in folders)


def test_all_lines_together_are_those_of_each_tool_below_a_heading(dataset: Path) -> None:
    lines = opening_lines(dataset)
    for name, tool in TOOLS.items():
        start = lines.index(tool.heading) + 1
        of_tool = opening_lines(dataset, name)
        assert lines[start : start + len(of_tool)] == of_tool


def test_lines_work_from_any_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    lines = opening_lines(folder.name, "polars")
    assert lines == opening_lines(folder, "polars")


def test_only_tables_of_the_dataset_are_opened(folder: Path) -> None:
    assert "pairs" not in rows_of(folder)
    assert not any(re.match(r"pairs\b", line) for line in opening_lines(folder))


@pytest.mark.parametrize(
    ("address", "setup"),
    [
        (
            "s3://bucket/it's [1]",
            ["INSTALL httpfs;", "LOAD httpfs;", "CREATE SECRET (TYPE s3, PROVIDER credential_chain);"],
        ),
        ("az://box/run", ["INSTALL azure;", "LOAD azure;", "CREATE SECRET (TYPE azure, PROVIDER credential_chain);"]),
    ],
)
def test_lines_for_an_object_store_have_its_address(folder: Path, address: str, setup: list[str]) -> None:
    memory = pytest.importorskip("obstore.store")
    from attlas.extract.store.objects import ObjectStorage

    storage = ObjectStorage(memory.MemoryStore(), address)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put(path.relative_to(folder).as_posix(), path.read_bytes())
    escaped = address.replace("[", "[[]")
    _, line, *_ = opening_lines(storage, "polars")
    (call,) = (node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call))
    table = next(iter(Dataset.open(storage).tables))
    assert ast.literal_eval(call.args[0]) == f"{escaped}/{table}/*.parquet"
    lines = opening_lines(storage, "duckdb")
    assert lines[:3] == setup
    quoted = escaped.replace("'", "''")
    assert lines[3] == f"CREATE VIEW {table} AS FROM read_parquet('{quoted}/{table}/*.parquet');"
    assert len(duckdb.extract_statements("\n".join(lines))) == len(lines)
    assert opening_lines(storage, "pandas")[1] == f"{table} = pd.read_parquet({f'{address}/{table}'!r})"


def test_a_path_that_is_no_text_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "a\x1b[2K\nb"))
    with pytest.raises(Refusal, match="has no control characters and is valid text"):
        opening_lines(copy)


def test_an_unknown_tool_is_refused(folder: Path) -> None:
    with pytest.raises(Refusal, match="--tool must be one of polars, duckdb, pandas, datasets, r; got 'spss'"):
        opening_lines(folder, "spss")
