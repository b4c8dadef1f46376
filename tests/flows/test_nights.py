"""The folder of a schedule: the newest dataset, what it was made from, and how many are kept."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from attlas.flows.config import Run
from attlas.flows.inputs import inputs_digest
from attlas.flows.nights import Nights, folder_name

MOMENT = datetime(2026, 3, 1, 2, 0, 5, tzinfo=UTC)


def finished(root: Path, day: int) -> Path:
    folder = root / folder_name(MOMENT + timedelta(days=day))
    (folder / "heads").mkdir(parents=True)
    (folder / "heads" / "shard-00000.parquet").write_bytes(b"rows")
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    return Nights(tmp_path / "data")


def test_latest_is_the_newest_and_unchanged_inputs_name_it(nights: Nights) -> None:
    assert nights.finished == []
    assert nights.unchanged_since("a") is None
    first = finished(nights.root, 0)
    nights.add(first, "a")
    assert (nights.root / "latest").resolve() == first
    assert nights.unchanged_since("a") == first
    assert nights.unchanged_since("b") is None
    assert nights.unchanged_since(None) is None
    second = finished(nights.root, 1)
    nights.add(second, None)  # of a hub, whose state no file tells
    assert (nights.root / "latest").resolve() == second
    assert nights.unchanged_since("a") is None


def test_a_late_night_does_not_look_fresh(nights: Nights) -> None:
    late, newest = finished(nights.root, 0), finished(nights.root, 1)
    nights.add(newest, "new")
    nights.add(late, "old")
    assert (nights.root / "latest").resolve() == newest
    assert nights.unchanged_since("new") == newest
    assert nights.unchanged_since("old") is None


def test_a_dataset_that_is_gone_is_measured_again(nights: Nights) -> None:
    dataset = finished(nights.root, 0)
    nights.add(dataset, "a")
    (dataset / "manifest.json").unlink()
    assert nights.unchanged_since("a") is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"dataset": "../other", "inputs": "a"}'])
def test_a_damaged_note_only_means_measuring_again(nights: Nights, content: bytes) -> None:
    nights.add(finished(nights.root, 0), "a")
    (nights.root / ".attlas-schedule.json").write_bytes(content)
    assert nights.unchanged_since("a") is None


def test_only_the_oldest_datasets_are_removed_and_nothing_else(nights: Nights) -> None:
    datasets = [finished(nights.root, day) for day in range(4)]
    unfinished = nights.root / folder_name(MOMENT - timedelta(days=1))
    others = [nights.root / "mine", unfinished, nights.root / "2026-03-01"]
    for other in others:
        other.mkdir()
        (other / "file").write_text("not to be lost")
    elsewhere = finished(nights.root.parent / "elsewhere", -9)
    link = nights.root / folder_name(MOMENT - timedelta(days=9))
    link.symlink_to(elsewhere)
    nights.add(datasets[-1], "a")
    assert nights.keep(None) == []
    assert nights.keep(9) == []
    assert nights.keep(2) == datasets[:2]
    assert nights.finished == datasets[2:]
    assert all((other / "file").is_file() for other in others)
    assert (elsewhere / "manifest.json").is_file()
    assert (nights.root / "latest").resolve() == datasets[-1]


def test_a_file_of_that_name_is_left_alone(nights: Nights) -> None:
    nights.root.mkdir()
    (nights.root / "latest").write_text("mine")
    nights.add(finished(nights.root, 0), "a")
    assert (nights.root / "latest").read_text() == "mine"


# --- what a run depends on


@pytest.fixture
def run(tmp_path: Path) -> Run:
    corpus, model = tmp_path / "corpus", tmp_path / "model"
    for folder in (corpus, model):
        folder.mkdir()
        (folder / "a.txt").write_text("as it was")
    return Run(model=str(model), corpus=str(corpus), out=tmp_path / "out")


def test_the_same_inputs_have_the_same_digest(run: Run, tmp_path: Path) -> None:
    assert inputs_digest(run) is not None
    assert inputs_digest(run) == inputs_digest(run.model_copy(update={"out": tmp_path / "another"}))


@pytest.mark.parametrize("place", ["corpus/a.txt", "corpus/b.txt", "model/a.txt", "model/deep/b.bin"])
def test_a_file_that_changed_or_is_new_changes_the_digest(run: Run, tmp_path: Path, place: str) -> None:
    before, file = inputs_digest(run), tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text("as it is")
    os.utime(file, (1, 1))
    assert inputs_digest(run) != before


def test_a_file_of_the_same_size_that_was_written_again_changes_the_digest(run: Run, tmp_path: Path) -> None:
    before, file = inputs_digest(run), tmp_path / "corpus" / "a.txt"
    then = file.stat().st_mtime_ns
    file.write_text("as it is ")
    os.utime(file, ns=(then + 1, then + 1))
    assert inputs_digest(run) != before


@pytest.mark.parametrize("change", [{"max_length": 7}, {"statistics": "all"}, {"tokens": "none"}])
def test_another_setting_changes_the_digest(run: Run, change: dict) -> None:
    assert inputs_digest(run) != inputs_digest(run.model_copy(update=change))


@pytest.mark.parametrize("change", [{"corpus": "hub:owner/name"}, {"model": "owner/name"}, {"model": "mine.py:build"}])
def test_what_files_do_not_tell_has_no_digest(run: Run, change: dict) -> None:
    assert inputs_digest(run.model_copy(update=change)) is None
