from pathlib import Path

import polars as pl
import pytest

from attlas.analysis.dataset import Dataset
from attlas.extract.store import Refusal
from tests.analysis.synthetic import WRITTEN, write_dataset
from tests.files import read_json, write_json


def test_scan_reads_the_manifests_parts_and_no_stray_file(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d")
    before = Dataset.open(root).scan("heads").select(pl.len()).collect().item()
    part = root / "heads" / "shard-00000.parquet"
    (root / "heads" / "shard-00099.parquet").write_bytes(part.read_bytes())
    assert Dataset.open(root).scan("heads").select(pl.len()).collect().item() == before


def test_dictionary_columns_arrive_as_strings(folder: Path) -> None:
    schema = Dataset.open(folder).scan("profiles").collect_schema()
    assert schema["stack"] == pl.String
    assert schema["profile"] == pl.String


def test_unknown_table_is_refused_with_those_that_exist(folder: Path) -> None:
    with pytest.raises(
        Refusal,
        match=f"{', '.join(WRITTEN)}; 'maps' is not one",
    ):
        Dataset.open(folder).scan("maps")


def test_missing_part_is_refused_by_name(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d")
    (root / "heads" / "shard-00000.parquet").unlink()
    with pytest.raises(Refusal, match=r"shard-00000\.parquet: there is no such file; run attlas verify"):
        Dataset.open(root).scan("heads")


@pytest.mark.parametrize("path", ["../outside.parquet", "/etc/passwd"])
def test_a_part_outside_the_dataset_is_refused(tmp_path: Path, path: str) -> None:
    root = write_dataset(tmp_path / "d")
    manifest = read_json(root / "manifest.json")
    assert manifest is not None
    manifest["tables"]["heads"]["parts"][0]["path"] = path
    write_json(root / "manifest.json", manifest)
    with pytest.raises(Refusal, match="a part lies inside its dataset"):
        Dataset.open(root).scan("heads")


def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d")
    (root / "manifest.json").write_text("{")
    with pytest.raises(Refusal, match=r"manifest\.json is JSON"):
        Dataset.open(root)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_work").mkdir()
    with pytest.raises(Refusal, match="an unfinished run"):
        Dataset.open(tmp_path)
