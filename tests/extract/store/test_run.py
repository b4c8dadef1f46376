"""A whole run into an object store, and its dataset read back from there."""

from pathlib import Path

import polars as pl
import pytest
from obstore.store import MemoryStore

from attlas.analysis.dataset import Dataset
from attlas.analysis.query import query
from attlas.analysis.report import report, write_report
from attlas.analysis.verify import verify
from attlas.extract.errors import Refusal
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shard, measure_shards, plan_run
from attlas.extract.store import MANIFEST, LocalFolder, Storage, open_dataset
from attlas.extract.store.objects import ObjectStorage
from tests.extract.runs import complete_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("A short text of which there are a few windows, and two shards or more. " * 6)
    return path


def options(corpus: Path, out: Storage) -> RunOptions:
    return RunOptions(
        model="demo", corpus=str(corpus), out=out, max_length=24, shard_sequences=2, device="cpu", engine="reference"
    )


def contents(storage: Storage) -> dict[str, bytes | None]:
    return {key: storage.get(key) for key in storage.list()}


@pytest.fixture(scope="module")
def memory(corpus: Path) -> ObjectStorage:
    storage = ObjectStorage(MemoryStore())
    worker = plan_run(options(corpus, storage)).open_worker()
    assert worker.plan.shards >= 3
    measure_shard(worker, 1)
    planned = plan_run(options(corpus, storage))  # continues with what is there
    assert 1 not in planned.remaining
    measure_shards(planned.open_worker(), planned.remaining)
    assert finish(storage) is storage
    return storage


def test_the_dataset_is_that_of_a_run_into_a_folder(memory: ObjectStorage, corpus: Path, tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "out")
    complete_run(options(corpus, folder))
    assert contents(memory) == contents(folder)
    assert not any(key.startswith("_work") for key in memory.list())


def test_the_same_run_again_is_complete_and_another_is_refused(memory: ObjectStorage, corpus: Path) -> None:
    assert plan_run(options(corpus, memory)).is_complete
    with pytest.raises(Refusal, match=r"memory:// holds a different run, says its manifest\.json"):
        plan_run(RunOptions(model="demo", corpus=str(corpus), out=memory, max_length=16, device="cpu"))


def test_it_is_whole_and_can_be_asked(memory: ObjectStorage) -> None:
    assert verify(memory) == []
    rows = Dataset.open(memory).scan("heads").select(pl.len(), pl.col("entropy_nats").mean()).collect()
    assert rows["len"][0] == open_dataset(memory)[1]["tables"]["heads"]["rows"] > 0
    answer = query(memory, "SELECT count(*) AS n, avg(entropy_nats) AS entropy FROM heads WHERE stack = 'encoder'")
    assert answer["n"].to_pylist() == [rows["len"][0]]
    assert answer["entropy"].to_pylist() == pytest.approx([rows["entropy_nats"][0]])
    report(memory).terminal()


def test_its_report_is_beside_its_tables_or_in_a_file(memory: ObjectStorage, tmp_path: Path) -> None:
    copy = ObjectStorage(MemoryStore())
    for key, content in contents(memory).items():
        copy.put(key, content or b"")
    assert write_report(copy) == "memory://report.html"
    page = write_report(copy, tmp_path / "page.html")
    assert copy.get("report.html") == Path(page).read_bytes()
    assert verify(copy) == []


def test_damage_is_found_there_too(memory: ObjectStorage) -> None:
    copy = ObjectStorage(MemoryStore())
    for key, content in contents(memory).items():
        copy.put(key, content or b"")
    heads = list(copy.list("heads"))
    copy.put(heads[0], (copy.get(heads[0]) or b"")[:-1])
    copy.delete(heads[1])
    copy.put("heads/stray.parquet", b"x")
    found = {(finding.part, finding.check) for finding in verify(copy)}
    assert {(heads[0], "size"), (heads[1], "missing part"), ("heads/stray.parquet", "stray file")} <= found
    with pytest.raises(Refusal, match=f"memory:// is not: {heads[0]}: "):
        Dataset.open(copy).scan("heads")
    copy.delete(MANIFEST)
    with pytest.raises(Refusal, match=r"memory:// holds no manifest\.json"):
        open_dataset(copy)
    with pytest.raises(Refusal, match="there is none at memory://"):
        open_dataset(ObjectStorage(MemoryStore()))
