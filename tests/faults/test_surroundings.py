"""What surrounds a run fails: the disk is full or read-only, its folder goes, its corpus changes, its model gives NaN.

After each, the same run goes on to the bytes of an undisturbed one, or is refused in words; nothing that was written is lost.
"""

import errno
import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from attlas.analysis.dataset import Dataset
from attlas.analysis.judge import judge
from attlas.analysis.report import write_report
from attlas.analysis.verify import verify
from attlas.extract.errors import Damaged, Refusal
from attlas.extract.instrument import Instrument
from attlas.extract.options import RunOptions
from attlas.extract.run import PlannedRun, Worker, finish, measure_shard, measure_shards, plan_run
from attlas.extract.store import MANIFEST
from tests.conftest import Ended
from tests.extract.runs import complete_run, contents, small_run

TEXT = "Every shard of this run is two short sequences, and there are four shards or so. " * 4


@pytest.fixture(scope="module")
def undisturbed(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunOptions, Instrument, dict[str, bytes]]:
    options = small_run(model, tmp_path_factory.mktemp("undisturbed"), TEXT)
    instrument = complete_run(options).instrument
    return options, instrument, contents(Path(options.out))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a file system needs more rights")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def begun(options: RunOptions, instrument: Instrument) -> tuple[PlannedRun, Worker]:
    """A run whose first shard is measured."""
    planned = plan_run(options, instrument=instrument)
    worker = planned.open_worker()
    measure_shard(worker, 0)
    return planned, worker


def remount(place: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", place], check=True)


def fill(place: Path, *, leaving: int) -> Path:
    """Leave so many bytes of a file system."""
    filler = place / "filler"
    with filler.open("wb") as file:
        file.write(bytes(shutil.disk_usage(place).free - leaving))
    return filler


# in KiB: from nothing at all to nearly the whole dataset
@pytest.mark.parametrize("left", [0, 8, 24, 48, 96, 144, 192])
def test_a_run_on_a_full_disk_is_continued_when_there_is_room(undisturbed, small_disk: Path, left: int) -> None:
    options, instrument, whole = undisturbed
    assert sum(map(len, whole.values())) > 200 << 10
    filler, again = fill(small_disk, leaving=left << 10), replace(options, out=small_disk / "out")
    with pytest.raises(OSError, match="can't be written") as failed:
        complete_run(again, instrument=instrument)
    assert failed.value.errno == errno.ENOSPC
    assert str(small_disk / "out") in str(failed.value)
    assert not (small_disk / "out" / MANIFEST).exists()
    assert list(small_disk.rglob("*.tmp")) == []
    filler.unlink()
    complete_run(again, instrument=instrument)
    assert contents(small_disk / "out") == whole


def test_a_full_disk_is_reported_in_words(attlas: Callable[..., Ended], undisturbed, small_disk: Path) -> None:
    options = undisturbed[0]
    fill(small_disk, leaving=100 << 10)
    arguments = ["--model", options.model, "--corpus", options.corpus, "--out", small_disk / "out", "--max-length", 12]
    code, _, err = attlas("run", *arguments, "--shard-sequences", 2, "--engine", "reference", "--shards", "1/1")
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"attlas: failed: {small_disk / 'out'}")
    assert last.endswith("No space left on device; make room and run the same command again: what is finished is kept")


def test_a_disk_that_becomes_read_only_is_named_and_the_run_continued_later(undisturbed, small_disk: Path) -> None:
    options, instrument, whole = undisturbed
    again = replace(options, out=small_disk / "out")
    planned, worker = begun(again, instrument)
    planned.store.unlock()  # a file that is open for writing keeps a file system writable
    remount(small_disk, "ro")
    with pytest.raises(OSError, match="can't be written: Read-only file system"):
        measure_shard(worker, 1)
    with pytest.raises(Refusal, match=r"the output folder must be writable; .*: Read-only file system"):
        plan_run(again, instrument=instrument)
    remount(small_disk, "rw")
    complete_run(again, instrument=instrument)
    assert contents(small_disk / "out") == whole


def test_a_finished_dataset_is_read_from_a_read_only_disk(undisturbed, small_disk: Path) -> None:
    options, instrument, whole = undisturbed
    again = replace(options, out=small_disk / "out")
    complete_run(again, instrument=instrument)
    remount(small_disk, "ro")
    assert verify(again.out) == []
    assert judge(Dataset.open(again.out)).count("defect") == 0
    assert complete_run(again, instrument=instrument).is_complete
    assert contents(small_disk / "out") == whole


def test_an_output_folder_that_goes_is_not_made_again_by_a_worker(undisturbed, tmp_path: Path) -> None:
    options, instrument, whole = undisturbed
    again = replace(options, out=tmp_path / "out")
    planned, worker = begun(again, instrument)
    rows = worker.rows_of(1)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(Damaged, match=r"shard-00001\.arrow is missing"):
        measure_shard(worker, 1)
    object.__setattr__(worker, "rows_of", lambda _: rows)  # as one that had read its shard before
    with pytest.raises(Damaged, match="has gone"):
        measure_shard(worker, 1)
    assert not (tmp_path / "out").exists()
    planned.store.unlock()
    complete_run(again, instrument=instrument)
    assert contents(tmp_path / "out") == whole


def test_a_corpus_that_changes_after_it_was_planned_changes_nothing(undisturbed, tmp_path: Path) -> None:
    """The state of the corpus is that at the beginning of the run."""
    options, instrument, whole = undisturbed
    corpus = Path(options.corpus)
    again = replace(options, out=tmp_path / "out")
    planned = plan_run(again, instrument=instrument)
    before = corpus.read_bytes()
    try:
        corpus.write_text("Something else, while it is measured.")
        for shard in planned.remaining:
            measure_shard(planned.open_worker(), shard)
    finally:
        corpus.write_bytes(before)
    complete_run(again, instrument=instrument)
    assert contents(tmp_path / "out") == whole


def many_files(corpus: Path) -> Path:
    """A corpus of 600 files, which is planned in three batches."""
    corpus.mkdir()
    for number in range(600):
        (corpus / f"{number:03d}.txt").write_text(f"The text of number {number}.")
    return corpus


@pytest.mark.parametrize("kind", ["gone", "a folder", "longer"])
def test_a_file_that_goes_or_changes_while_the_corpus_is_planned_is_named(
    undisturbed, tmp_path: Path, kind: str
) -> None:
    options, instrument, _ = undisturbed
    corpus = many_files(tmp_path / "corpus")
    again = replace(options, corpus=str(corpus), out=tmp_path / "out", shard_sequences=2000)

    def progress(stage: str, done: int, _total: int | None) -> None:
        if stage == "plan" and 0 < done < 599 and (corpus / "599.txt").is_file():
            (corpus / "599.txt").unlink()
            if kind == "a folder":
                (corpus / "599.txt").mkdir()
            elif kind == "longer":
                (corpus / "599.txt").write_text("The text of number 599, and more.")

    with pytest.raises(Refusal, match=r"a corpus stays as it is while it is read; 599\.txt of .* changed meanwhile"):
        plan_run(again, instrument=instrument, progress=progress)
    assert not (tmp_path / "out").exists()
    if (corpus / "599.txt").is_dir():
        (corpus / "599.txt").rmdir()
    (corpus / "599.txt").write_text("The text of number 599.")
    complete_run(again, instrument=instrument)
    assert verify(again.out) == []


def test_a_file_that_is_added_while_the_corpus_is_planned_is_in_the_next_generation(
    undisturbed, tmp_path: Path
) -> None:
    options, instrument, _ = undisturbed
    corpus = many_files(tmp_path / "corpus")
    again = replace(options, corpus=str(corpus), out=tmp_path / "out", shard_sequences=2000)

    def progress(stage: str, done: int, _total: int | None) -> None:
        if stage == "plan" and 0 < done < 599:
            (corpus / "600.txt").write_text("The text that has come meanwhile.")

    planned = plan_run(again, instrument=instrument, progress=progress)
    measure_shards(planned.open_worker(), planned.remaining)
    finish(planned.options.out)
    del planned  # its lock with it
    for documents in (600, 601):
        sources = pl.read_parquet(again.out / "documents" / "*.parquet")["source"].to_list()
        assert sorted(sources) == [f"{number:03d}.txt" for number in range(documents)]
        assert verify(again.out) == []
        complete_run(again, instrument=instrument)


def test_a_model_that_gives_nan_is_measured_and_its_heads_are_a_defect(undisturbed, tmp_path: Path) -> None:
    options, instrument, _ = undisturbed
    query = instrument.encoder.model.encoder.layer[0].attention.self.query.weight
    before = query.detach().clone()
    try:
        with torch.no_grad():
            query[:4] = float("nan")  # of the first head
        complete_run(replace(options, out=tmp_path / "out"), instrument=instrument)
    finally:
        with torch.no_grad():
            query.copy_(before)
    assert verify(tmp_path / "out") == []
    found = judge(Dataset.open(tmp_path / "out")).found.filter(type="defect")
    # the head itself, and all heads of the layers above, whose stream it has spoilt
    config = instrument.encoder.model.config
    above = itertools.product(range(1, config.num_hidden_layers), range(config.num_attention_heads))
    assert found.filter(name="non-finite rows").select("layer", "head").rows() == [(0, 0), *above]
    page = write_report(tmp_path / "out")
    assert "non-finite" in page.read_text()
