"""Shards are written while the next ones are measured: in bounded memory, with nothing lost when writing fails."""

import errno
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import extract.measurement
import extract.shard
from extract.measurement import Measurements
from extract.pipeline import SHARDS_UNDER_WAY, Job, RunOptions, finish, measure_shard, measure_shards, prepare
from extract.store import Part, Store

WORDS = "Every shard is one sequence here, and there is more than one of them to be measured. " * 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(WORDS)
    return path


def job_into(out: Path, corpus: Path) -> Job:
    job = prepare(
        RunOptions(model="demo", corpus=str(corpus), out=out, max_length=24, shard_sequences=1, engine="reference")
    )
    assert job.shards >= 8
    return job


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def one_after_the_other(corpus, tmp_path_factory) -> dict[str, bytes]:
    """What a run leaves whose shards are measured and written in turn."""
    job = job_into(tmp_path_factory.mktemp("turn") / "out", corpus)
    for shard in job.remaining:
        measure_shard(job, shard)
    return contents(finish(job))


def before_writing(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    """Do something to a shard whenever its `heads` are about to be written."""
    write = Store.write_part

    def write_part(store: Store, table: str, shard: int, rows: pa.Table) -> Part:
        if table == "heads":
            act(shard)
        return write(store, table, shard, rows)

    monkeypatch.setattr(Store, "write_part", write_part)


def test_the_records_are_those_of_a_run_in_turn_and_in_the_order_of_the_shards(corpus, one_after_the_other, tmp_path):
    job = job_into(tmp_path / "out", corpus)
    order = [*reversed(job.remaining)]
    records = measure_shards(job, order)
    assert [r.shard for r in records] == order
    assert contents(finish(job)) == one_after_the_other


def test_a_shard_is_measured_while_the_one_before_it_is_written(corpus, tmp_path, monkeypatch):
    job = job_into(tmp_path / "out", corpus)
    measured: list[int] = []
    second = threading.Event()

    def count(tokens: int) -> None:
        measured.append(tokens)
        if len(measured) == 2:
            second.set()

    before_writing(monkeypatch, lambda shard: shard == 0 and second.wait(120))
    started = time.monotonic()
    measure_shards(job, [0, 1], progress=count)
    assert time.monotonic() - started < 100, "the second shard waited for the first one to be written"


def test_slow_writing_holds_the_model_up_and_memory_flat(corpus, tmp_path, monkeypatch):
    sums: weakref.WeakSet[Measurements] = weakref.WeakSet()
    tables: weakref.WeakValueDictionary[int, pa.Table] = weakref.WeakValueDictionary()
    held: list[tuple[int, int, int]] = []
    measured: list[int] = []
    made: Counter[str] = Counter()

    class Counted(Measurements):
        __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

        def __init__(self) -> None:
            super().__init__()
            made["sums"] += 1
            sums.add(self)

    heads_table = extract.shard.heads_table

    def counted(*args: Any) -> pa.Table:
        made["tables"] += 1
        return tables.setdefault(made["tables"], heads_table(*args))

    job = job_into(tmp_path / "out", corpus)

    def crawl(shard: int) -> None:
        time.sleep(0.3)
        done = sum(job.store.read_record(n) is not None for n in range(job.shards))
        held.append((len(sums), len(tables), len(measured) - done))

    monkeypatch.setattr(extract.measurement, "Measurements", Counted)
    monkeypatch.setattr(extract.shard, "heads_table", counted)
    before_writing(monkeypatch, crawl)
    measure_shards(job, job.remaining, progress=measured.append)
    assert len(held) == made["sums"] == made["tables"] == job.shards > 2 * SHARDS_UNDER_WAY
    for most in map(max, zip(*held, strict=True)):
        assert most <= SHARDS_UNDER_WAY


def test_an_error_of_the_writer_reaches_the_caller_and_the_shard_is_not_done(
    corpus, one_after_the_other, tmp_path, monkeypatch
):
    job = job_into(tmp_path / "out", corpus)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fill(shard: int) -> None:
        if shard == 2:
            raise full

    with monkeypatch.context() as patch:
        before_writing(patch, fill)
        with pytest.raises(OSError, match="No space left") as caught:
            measure_shards(job, job.remaining)
    assert caught.value is full
    assert {0, 1} & set(job.remaining) == set()
    assert 2 in job.remaining
    assert job.remaining[-1] == job.shards - 1  # what was under way ended, and no more began
    again = job_into(tmp_path / "out", corpus)
    measure_shards(again, again.remaining)
    assert contents(finish(again)) == one_after_the_other


def test_an_error_of_the_model_reaches_the_caller_too(corpus, tmp_path):
    job = job_into(tmp_path / "out", corpus)

    def broken(call, plain):
        raise ArithmeticError("no numbers today")

    with pytest.raises(ArithmeticError, match="no numbers today"):
        measure_shards(replace(job, engine=replace(job.engine, attend=broken)), job.remaining)
    assert len(job.remaining) == job.shards
