"""Shards are written while the next ones are measured: in bounded memory, with nothing lost when writing fails."""

import errno
import resource
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from attlas.extract import shard as measuring
from attlas.extract.collector import Collector, open_collector
from attlas.extract.errors import Refusal
from attlas.extract.options import RunOptions
from attlas.extract.run import (
    SHARDS_AT_ONCE,
    PlannedRun,
    Worker,
    finish,
    measure_shard,
    measure_shards,
    plan_run,
)
from attlas.extract.store import LocalFolder, Part, Store, part_key
from attlas.extract.store.sealed import put_sealed
from tests.extract.runs import contents
from tests.extract.test_memory import with_attend

WORDS = "Every shard is one sequence here, and there is more than one of them to be measured. " * 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(WORDS)
    return path


def planned_into(out: Path, corpus: Path) -> PlannedRun:
    planned = plan_run(
        RunOptions(model="demo", corpus=str(corpus), out=out, max_length=24, shard_sequences=1, engine="reference")
    )
    assert planned.plan is not None and planned.plan.shards >= 8
    return planned


@pytest.fixture(scope="module")
def one_after_the_other(corpus, tmp_path_factory) -> dict[str, bytes]:
    """What a run leaves whose shards are measured and written in turn."""
    out = tmp_path_factory.mktemp("turn") / "out"
    planned = planned_into(out, corpus)
    for shard in planned.remaining:
        measure_shard(planned.open_worker(), shard)
    finish(out)
    return contents(out)


@dataclass(frozen=True)
class Watched(Store):
    """A store that does something whenever the `heads` of a shard are about to be written."""

    act: Callable[[int, pa.Table], object]

    def write_part(self, table: str, shard: int, rows: pa.Table, *, source: str = "") -> Part:
        if table == "heads":
            self.act(shard, rows)
        return super().write_part(table, shard, rows, source=source)


def before_writing(worker: Worker, act: Callable[[int, pa.Table], object]) -> Worker:
    return replace(worker, store=Watched(worker.store.storage, act))


def whole(planned: PlannedRun) -> dict[str, bytes]:
    """Finish the run; what it has left."""
    finish(planned.options.out)
    return contents(Path(str(planned.options.out)))


def test_the_records_are_those_of_a_run_in_turn_and_in_the_order_of_the_shards(corpus, one_after_the_other, tmp_path):
    planned = planned_into(tmp_path / "out", corpus)
    order = [*reversed(planned.remaining)]
    records = measure_shards(planned.open_worker(), order)
    assert [r.shard for r in records] == order
    assert whole(planned) == one_after_the_other


def test_a_shard_is_measured_while_the_one_before_it_is_written(corpus, tmp_path):
    planned = planned_into(tmp_path / "out", corpus)
    measured: list[int] = []
    second = threading.Event()
    came: list[bool] = []

    def count(tokens: int, documents: int) -> None:
        measured.append(tokens)
        if len(measured) == 2:
            second.set()

    watched = before_writing(planned.open_worker(), lambda shard, _: shard == 0 and came.append(second.wait(120)))
    measure_shards(watched, [0, 1], progress=count)
    assert came == [True], "the second shard waited for the first one to be written"


def test_slow_writing_holds_the_model_up_and_memory_flat(corpus, tmp_path, monkeypatch):
    tables: list[weakref.ref[pa.Table]] = []
    collectors: list[weakref.ref[Collector]] = []
    held: list[tuple[int, int, int]] = []
    measured: list[int] = []
    changed = threading.Condition()

    def opened(*arguments: Any, **options: Any) -> Collector:
        collector = open_collector(*arguments, **options)
        collectors.append(weakref.ref(collector))
        return collector

    def count(tokens: int, documents: int) -> None:
        with changed:
            measured.append(tokens)
            changed.notify_all()

    def wait_for_the_next(shard: int, rows: pa.Table) -> None:
        tables.append(weakref.ref(rows))
        with changed:
            changed.wait_for(lambda: len(measured) >= min(shard + 2, shards), 120)
        done = sum(worker.store.read_record(n) is not None for n in range(shards))
        alive = (sum(made() is not None for made in of_kind) for of_kind in (collectors, tables))
        held.append((*alive, len(measured) - done))

    monkeypatch.setattr(measuring, "open_collector", opened)
    planned = planned_into(tmp_path / "out", corpus)
    worker = planned.open_worker()
    shards = worker.plan.shards
    measure_shards(before_writing(worker, wait_for_the_next), planned.remaining, progress=count)
    assert len(held) == len(tables) == shards > 2 * SHARDS_AT_ONCE
    for most in map(max, zip(*held, strict=True)):
        assert 1 <= most <= SHARDS_AT_ONCE


def test_an_error_of_the_writer_reaches_the_caller_and_the_shard_is_not_done(corpus, one_after_the_other, tmp_path):
    planned = planned_into(tmp_path / "out", corpus)
    shards = planned.remaining
    in_the_way = tmp_path / "out" / part_key("heads", 2)
    in_the_way.mkdir(parents=True)
    with pytest.raises(OSError, match=r"heads/shard-00002\.parquet") as caught:
        measure_shards(planned.open_worker(), planned.remaining)
    assert caught.value.errno == errno.EISDIR
    assert list(in_the_way.parent.glob("*.tmp")) == []
    assert {0, 1} & set(planned.remaining) == set()
    assert 2 in planned.remaining
    assert planned.remaining[-1] == shards[-1]  # what was under way ended, and no more began
    with pytest.raises(Refusal, match=r"heads/shard-00002\.parquet, where a folder lies"):
        planned_into(tmp_path / "out", corpus)
    in_the_way.rmdir()
    again = planned_into(tmp_path / "out", corpus)
    measure_shards(again.open_worker(), again.remaining)
    assert whole(again) == one_after_the_other


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on_later(corpus, one_after_the_other, tmp_path):
    planned = planned_into(tmp_path / "out", corpus)
    sizes = {name: len(content) for name, content in one_after_the_other.items()}
    too_large = max(size for name, size in sizes.items() if name.startswith("heads"))
    with largest_file(too_large - 1), pytest.raises(OSError, match=r"heads/shard-0000\d\.parquet") as caught:
        measure_shards(planned.open_worker(), planned.remaining)
    assert caught.value.errno == errno.EFBIG
    for name, content in contents(tmp_path / "out").items():
        assert one_after_the_other.get(name, content) == content, name
        assert not name.endswith(".tmp")
    measure_shards(planned.open_worker(), planned.remaining)
    with largest_file(sizes["manifest.json"] - 1), pytest.raises(OSError, match=r"manifest\.json") as caught:
        finish(planned.options.out)
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert whole(planned_into(tmp_path / "out", corpus)) == one_after_the_other


def in_pieces(storage: LocalFolder, key: str) -> None:
    with storage.writing(key) as file:
        for _ in range(10):
            file.write(bytes(1_000))


WRITERS: dict[str, Callable[[LocalFolder, str], object]] = {
    "an object": lambda storage, key: storage.put(key, bytes(10_000)),
    "in pieces": in_pieces,
    "a record": lambda storage, key: put_sealed(storage, key, {"x": "x" * 10_000}),
    "a claim": lambda storage, key: storage.put_if_absent(key, bytes(10_000)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_written_whole_is_named_and_the_one_there_stays(tmp_path, name):
    storage, path = LocalFolder(tmp_path), tmp_path / "folder" / "file"
    with largest_file(5_000), pytest.raises(OSError, match=r"folder/file") as caught:
        WRITERS[name](storage, "folder/file")
    assert caught.value.errno == errno.EFBIG
    assert list(path.parent.iterdir()) == []
    path.write_text("before")
    if name != "a claim":
        with largest_file(5_000), pytest.raises(OSError, match=r"folder/file"):
            WRITERS[name](storage, "folder/file")
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert path.read_text() == "before"


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_where_the_folder_should_be_is_an_error_with_the_name(tmp_path, name):
    (tmp_path / "folder").write_text("")
    with pytest.raises(OSError, match=r"folder/file"):
        WRITERS[name](LocalFolder(tmp_path), "folder/file")


def test_an_error_of_the_model_reaches_the_caller_too(corpus, tmp_path):
    planned = planned_into(tmp_path / "out", corpus)
    shards = planned.remaining

    def broken(*arguments):
        raise ArithmeticError("no numbers today")

    with pytest.raises(ArithmeticError, match="no numbers today"):
        instrument = replace(planned.instrument, engine=with_attend(planned.instrument.engine, broken))
        measure_shards(replace(planned.open_worker(), instrument=instrument), planned.remaining)
    assert planned.remaining == shards
