"""The flow on a real corpus with the real model and Prefect's test server."""

import json
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.extract.errors import Refusal
from attlas.flows.config import Run
from attlas.flows.progress import SilentDisplay, Work
from tests.flows.conftest import PROSE, part_bytes

pytestmark = pytest.mark.usefixtures("test_server")


class Recorder(SilentDisplay):
    """Records what it should show."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.total, self.done, self.notes = Work(), Work(), list[str]()
        self.history: list[Work] = []

    def stage(self, name: str, done: int, total: int | None) -> None:
        self.stages.append(name)

    def start_measuring(self, *, total: Work, before: Work) -> None:
        self.total, self.done = total, before

    def advance(self, work: Work) -> None:
        self.done += work
        self.history.append(self.done)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def run_into(corpus: Path, tmp_path: Path) -> Callable[[str], Run]:
    def run(name: str) -> Run:
        return Run(model="demo", corpus=str(corpus), out=tmp_path / name, max_length=12, shard_sequences=2)

    return run


def test_a_flow_writes_a_valid_dataset_and_a_report(run_into: Callable[[str], Run]) -> None:
    from attlas.analysis.verify import verify
    from attlas.flows.measure import measure_locally

    run, show = run_into("out"), Recorder()
    page = measure_locally(run, show=show)
    manifest = json.loads((run.out / "manifest.json").read_text())
    assert manifest["corpus"]["documents"] == len(PROSE)
    assert pq.read_table(run.out / "documents")["source"].to_pylist() == ["0.txt", "1.txt", "2.txt"]
    assert verify(run.out) == []
    assert "<html" in page.read_text()
    assert show.done == show.total
    assert show.total.shards == manifest["shards"] > 1
    assert show.total.tokens == manifest["corpus"]["tokens"]
    assert {"model", "plan", "finish"} <= set(show.stages)


def test_documents_are_counted_with_their_last_batch(run_into: Callable[[str], Run]) -> None:
    from attlas.flows.measure import measure_locally

    # a batch per sequence in a single shard, so that progress comes from batches only
    run, show = run_into("out").model_copy(update={"batch_tokens": 1, "shard_sequences": 256}), Recorder()
    measure_locally(run, show=show)
    at_the_end = [work for work in show.history if work.tokens == show.total.tokens]
    assert at_the_end[0].documents == show.total.documents and at_the_end[0].shards == 0
    assert 0 < show.history[len(show.history) // 2].documents < show.total.documents
    assert show.done == show.total


def test_warnings_of_libraries_are_shown_as_notes() -> None:
    import warnings

    from attlas.flows.measuring import using_display

    show, before = Recorder(), warnings.showwarning
    with using_display(show):
        warnings.showwarning("look out", UserWarning, "file.py", 1)
    assert show.notes == ["warning: look out"]
    assert warnings.showwarning is before


def test_a_complete_run_is_noted_and_its_parts_do_not_change(run_into: Callable[[str], Run]) -> None:
    from attlas.flows.measure import measure_locally

    run = run_into("out")
    page = measure_locally(run, show=Recorder())
    before = {path: (run.out / path).stat().st_mtime_ns for path in part_bytes(run.out)}
    page.unlink()
    show = Recorder()
    assert measure_locally(run, show=show) == page
    assert page.exists()
    assert "complete" in show.notes[0]
    assert {path: (run.out / path).stat().st_mtime_ns for path in part_bytes(run.out)} == before


def test_a_folder_with_another_run_is_refused_with_the_differences(run_into: Callable[[str], Run]) -> None:
    from attlas.flows.measure import measure_locally

    run = run_into("out")
    measure_locally(run, show=Recorder())
    before = part_bytes(run.out)
    with pytest.raises(Refusal, match="max_length: there 12, asked 16"):
        measure_locally(run.model_copy(update={"max_length": 16}), show=Recorder())
    assert part_bytes(run.out) == before


def test_an_invalid_document_is_dropped_counted_and_named(corpus: Path, run_into: Callable[[str], Run]) -> None:
    from attlas.flows.measure import measure_locally

    (corpus / "1.txt").write_bytes(b"not UTF-8: \xff")
    run = run_into("out")
    measure_locally(run, show=Recorder())
    reasons = pq.read_table(run.out / "documents").select(["source", "dropped_reason"]).to_pylist()
    assert [r["source"] for r in reasons if r["dropped_reason"]] == ["1.txt"]
    assert sum(json.loads((run.out / "manifest.json").read_text())["corpus"]["dropped"].values()) == 1


@pytest.mark.parametrize(("error", "attempts"), [(OSError("no space left on device"), 2), (Refusal("never"), 1)])
def test_a_full_disk_is_retried_and_a_refusal_is_not(
    run_into: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch, error: Exception, attempts: int
) -> None:
    import attlas.extract.run
    from attlas.flows.measure import measure_locally

    attempted: list[int] = []
    original = attlas.extract.run.measure_shard

    def failing_once(worker: object, shard: int, **rest: object) -> object:
        attempted.append(shard)
        if attempted.count(0) == 1 and shard == 0:
            raise error
        return original(worker, shard, **rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(attlas.extract.run, "measure_shard", failing_once)
    run, show = run_into("out"), Recorder()
    if attempts == 1:
        with pytest.raises(Refusal, match="never"):
            measure_locally(run, show=show)
        assert not (run.out / "manifest.json").exists()
    else:
        measure_locally(run, show=show)
        assert show.done == show.total
    assert attempted.count(0) == attempts


def test_finished_shards_are_not_measured_again(
    run_into: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    import attlas.extract.run
    from attlas.flows.measure import measure_locally

    measure_locally(run_into("uninterrupted"), show=Recorder())
    original, measured = attlas.extract.run.measure_shard, []

    def stopping_at_the_second(worker: object, shard: int, **rest: object) -> object:
        if measured:
            raise Refusal("stopped here")
        measured.append(shard)
        return original(worker, shard, **rest)  # pyright: ignore[reportArgumentType]

    run = run_into("resumed")
    with monkeypatch.context() as patch:
        patch.setattr(attlas.extract.run, "measure_shard", stopping_at_the_second)
        with pytest.raises(Refusal, match="stopped here"):
            measure_locally(run, show=Recorder())
    first = {p: (run.out / p).stat().st_mtime_ns for p in part_bytes(run.out)}
    measure_locally(run, show=Recorder())
    assert first
    assert {p: (run.out / p).stat().st_mtime_ns for p in first} == first
    assert part_bytes(run.out) == part_bytes(run_into("uninterrupted").out)


def test_a_shard_is_measured_while_another_is_written_and_no_third_is_in_memory(
    run_into: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from attlas.extract import shard as module
    from attlas.extract.store import Store
    from attlas.flows.measure import measure_locally

    changed = threading.Condition()
    measured, written = list[int](), list[int]()
    tables, in_memory = list[weakref.ref[pa.Table]](), list[int]()
    measure_sequences, write_part = module.measure_sequences, Store.write_part

    def measuring(*arguments: Any, **options: Any) -> Any:
        result = measure_sequences(*arguments, **options)
        with changed:
            measured.append(options["shard"])
            tables.append(weakref.ref(result[0]["heads"]))
            changed.notify_all()
        return result

    def writing_slowly(store: Store, table: str, shard: int, rows: pa.Table, *, source: str) -> Any:
        if table == "heads":
            with changed:  # until the next shard has been in the model
                assert changed.wait_for(lambda: len(measured) >= min(len(written) + 2, shards), 120)
                in_memory.append(sum(table() is not None for table in tables))
                written.append(shard)
        return write_part(store, table, shard, rows, source=source)

    run = run_into("out").model_copy(update={"shard_sequences": 1})
    shards = 6
    monkeypatch.setattr(module, "measure_sequences", measuring)
    monkeypatch.setattr(Store, "write_part", writing_slowly)
    measure_locally(run, show=Recorder())
    manifest = json.loads((run.out / "manifest.json").read_text())
    assert manifest["shards"] == len(written) == shards
    assert max(in_memory) == 2
