"""Datasets made to do harm: nothing outside them is read, and nothing is read without end."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.analysis.dataset import Dataset
from attlas.analysis.export import export
from attlas.analysis.query import query
from attlas.analysis.report import write_report
from attlas.analysis.verify import verify
from attlas.extract.store import MANIFEST, LocalFolder, Refusal, open_dataset
from tests.analysis.synthetic import write_dataset

READERS: dict[str, Callable[[Path], object]] = {
    "query": lambda root: query(root, "SELECT max(layer) FROM heads"),
    "report": lambda root: write_report(root, root.parent / "page.html"),
    "export": lambda root: export(root, root.parent / "means.csv"),
    "scan": lambda root: Dataset.open(root).scan("heads").collect(),
}
PART = "heads/shard-00000.parquet"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "d", documents=2, layers=1, heads=1)


def replace_by_link(path: Path) -> None:
    """Move a file or folder out of the dataset, and leave a link to it."""
    outside = path.parents[1 if path.is_dir() else 2] / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("name", [PART, "heads"])
@pytest.mark.parametrize("reader", READERS)
def test_a_part_that_is_linked_out_of_the_dataset_is_not_read(root: Path, name: str, reader: str) -> None:
    replace_by_link(root / name)
    with pytest.raises(Refusal, match=f"{PART}: it is not a readable file .*leads out of the dataset"):
        READERS[reader](root)


def test_verify_names_a_part_that_is_linked_out_of_the_dataset(root: Path) -> None:
    replace_by_link(root / PART)
    (finding,) = verify(root)
    assert (finding.part, finding.check) == (PART, "unreadable")
    assert "leads out of the dataset" in finding.message


def test_a_manifest_that_is_linked_out_of_the_dataset_is_not_read(root: Path) -> None:
    (root / MANIFEST).rename(root.parent / "elsewhere")
    (root / MANIFEST).symlink_to(root.parent / "elsewhere")
    with pytest.raises(Refusal, match="leads out of the dataset"):
        open_dataset(root)


def test_links_inside_a_dataset_and_links_to_it_are_followed(root: Path) -> None:
    (root / PART).rename(root / "heads" / "kept")
    (root / PART).symlink_to("kept")
    (root.parent / "link").symlink_to(root)
    assert query(root.parent / "link", "SELECT count(*) AS n FROM heads")["n"].to_pylist() != [0]


def test_a_snapshot_of_the_hub_s_cache_is_read_through_its_links(root: Path) -> None:
    cache = root.parent / "datasets--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = Path(shutil.copytree(root, cache / "snapshots" / "0123"))
    for number, file in enumerate(p for p in snapshot.rglob("*") if p.is_file()):
        file.rename(cache / "blobs" / str(number))
        file.symlink_to(os.path.relpath(cache / "blobs" / str(number), file.parent))
    assert verify(snapshot) == []
    (snapshot / PART).unlink()
    (snapshot / PART).symlink_to(root / PART)
    with pytest.raises(Refusal, match="leads out of the dataset"):
        query(snapshot, "SELECT max(layer) FROM heads")


@pytest.mark.parametrize("key", [MANIFEST, PART])
@pytest.mark.parametrize("replace", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_pipes_and_devices_are_never_read(root: Path, key: str, replace: Callable[[Path], None]) -> None:
    (root / key).unlink()
    replace(root / key)
    with pytest.raises(Refusal, match=key):
        query(root, "SELECT max(layer) FROM heads")


def test_a_manifest_of_a_terabyte_is_refused_before_it_is_read(root: Path) -> None:
    os.truncate(root / MANIFEST, 1 << 40)
    with pytest.raises(Refusal, match="more than 268,435,456"):
        open_dataset(root)


def test_a_part_that_unpacks_to_gigabytes_is_refused_even_if_the_manifest_has_its_checksum(root: Path) -> None:
    part = root / "documents" / "shard-00000.parquet"
    rows = pq.read_table(part)
    place = rows.schema.get_field_index("source")
    bomb = pa.array(["a" * (140 << 20)] * rows.num_rows)
    pq.write_table(
        rows.set_column(place, rows.schema.field(place), bomb), part, compression="zstd", use_dictionary=False
    )
    manifest = json.loads((root / MANIFEST).read_text())
    facts = manifest["tables"]["documents"]["parts"][0]
    facts |= {"bytes": part.stat().st_size, "sha256": hashlib.sha256(part.read_bytes()).hexdigest()}
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(Refusal, match="it claims to unpack from"):
        query(root, "SELECT max(length(source)) FROM documents")
    assert "it claims to unpack from" in str(verify(root)[0])


def test_a_forged_schema_is_refused_by_the_column(root: Path) -> None:
    rows = pq.read_table(root / PART)
    place = rows.schema.get_field_index("layer")
    pq.write_table(rows.set_column(place, "layer", pa.array(["x"] * rows.num_rows)), root / PART)
    with pytest.raises(Refusal, match="layer is string, the contract says int16"):
        query(root, "SELECT max(layer) FROM heads")


def test_a_claim_of_a_trillion_layers_is_not_believed(root: Path) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["model"]["stacks"][0] |= {"layers": 10**12, "heads": 10**12}
    (root / MANIFEST).write_text(json.dumps(manifest))
    READERS["query"](root)
    READERS["export"](root)


def test_writing_replaces_a_link_and_leaves_its_target(root: Path) -> None:
    target = root.parent / "target"
    target.write_text("before")
    (root / "README.md").unlink(missing_ok=True)
    (root / "README.md").symlink_to(target)
    LocalFolder(root).put("README.md", b"after")
    assert (target.read_text(), (root / "README.md").read_text()) == ("before", "after")
