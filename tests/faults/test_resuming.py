"""An interrupted run with a damaged file either resumes to the same bytes, or is refused with the name of the file."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from attlas.analysis.verify import verify
from attlas.extract.errors import Damaged, Refusal
from attlas.extract.options import RunOptions
from attlas.extract.run import PlannedRun, finish, measure_shard, plan_run
from attlas.extract.store import CARD, MANIFEST, WORK, LocalFolder, Store, open_dataset
from tests.extract.runs import contents
from tests.faults.damage import BYTE_DAMAGES, JSON_DAMAGES, damages, flip_bit
from tests.threads import one_thread

MAX_LENGTH = 12
DONE = (0, 2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("Every shard of this run is two short sequences, and there are four shards or so. " * 4)
    return path


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: in hundreds of passes over a few tokens, threads would only wait for each other."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def interrupted(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> PlannedRun:
    """A run that was interrupted after two of its shards."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    options = RunOptions(
        model=str(model), corpus=str(corpus), out=out, max_length=MAX_LENGTH, shard_sequences=2, engine="reference"
    )
    planned = plan_run(options)
    worker = planned.open_worker()
    assert worker.plan.shards >= 4
    for shard in DONE:
        measure_shard(worker, shard)
    return planned


@pytest.fixture(scope="module")
def undamaged(interrupted: PlannedRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(finish_run(copy_run(interrupted, tmp_path_factory.mktemp("undamaged") / "out")))


def output_folder(run: PlannedRun) -> Path:
    return Path(run.options.out)


def copy_run(run: PlannedRun, out: Path) -> PlannedRun:
    """The same run in a copy of its folder, with the same model object."""
    shutil.copytree(output_folder(run), out)
    return replace(run, store=Store.at(out), options=replace(run.options, out=out), plan=None, lock=None)


def plan_again(run: PlannedRun) -> PlannedRun:
    return plan_run(run.options, instrument=run.instrument)


def finish_run(run: PlannedRun) -> Path:
    """Resume the run in its folder and finish it."""
    again = plan_again(run)
    for shard in again.remaining:
        measure_shard(again.open_worker(), shard)
    finish(run.options.out)
    return output_folder(run)


def assert_same_or_refused(interrupted: PlannedRun, name: str, what: str, undamaged: dict[str, bytes]) -> bool:
    """Resume; returns whether the result has the same bytes, or False if the run is refused."""
    path = output_folder(interrupted) / name
    try:
        finish_run(interrupted)
    except Refusal as refusal:
        assert path.name in str(refusal), (name, what)
        return False
    assert contents(output_folder(interrupted)) == undamaged, (name, what)
    assert not any(p.is_symlink() for p in output_folder(interrupted).rglob("*")), (name, what)
    return True


def one_file_of_each_kind(interrupted: PlannedRun) -> Iterator[str]:
    """One file of each kind in the folder of an interrupted run, for finished and for missing shards."""
    records = [f"{WORK}/records/{shard:05d}.json" for shard in DONE]
    spools = [f"{WORK}/shard-{shard:05d}.arrow" for shard in (0, 1)]
    parts = [f"{table}/shard-{DONE[1]:05d}.parquet" for table in ("sequences", "heads", "profiles")]
    parts.append(f"documents/shard-{DONE[0]:05d}.parquet")  # of the only document
    for name in (
        f"{WORK}/run.json",
        f"{WORK}/plan.json",
        f"{WORK}/manifest.json",
        f"{WORK}/lock",
        *records[:1],
        *spools,
        *parts,
    ):
        assert (output_folder(interrupted) / name).is_file(), name
        yield name


def resume_after_damage(
    names: Iterable[tuple[str, str]], interrupted: PlannedRun, undamaged: dict[str, bytes], out: Path
) -> set[str]:
    """Apply each (file, damage) to a copy of the run and resume it; returns the damages that led to the same bytes."""
    same = set()
    for name, what in names:
        again = copy_run(interrupted, out)
        dict(damages(Path(name)))[what](output_folder(again) / name)
        if assert_same_or_refused(again, name, what, undamaged):
            same.add(what)
        shutil.rmtree(output_folder(again))
    return same


# the last byte is a newline, which is not significant
HARMLESS = {"last byte lost"}


def test_a_damaged_run_file_is_refused(interrupted: PlannedRun, undamaged: dict[str, bytes], tmp_path: Path) -> None:
    name = f"{WORK}/run.json"
    every = [(name, what) for what, _ in damages(Path(name))]
    assert resume_after_damage(every, interrupted, undamaged, tmp_path / "out") == HARMLESS


QUICK_DAMAGES = ("bit flipped in the middle",)


def test_other_damaged_files_are_made_again(
    interrupted: PlannedRun, undamaged: dict[str, bytes], tmp_path: Path
) -> None:
    for name in [n for n in one_file_of_each_kind(interrupted) if not n.endswith("run.json")]:
        wanted = {what for what, _ in damages(Path(name)) if what in QUICK_DAMAGES}
        same = resume_after_damage([(name, what) for what in wanted], interrupted, undamaged, tmp_path / "out")
        assert same == wanted, name


@pytest.mark.exhaustive
def test_every_damage_to_every_file_that_can_be_made_again(
    interrupted: PlannedRun, undamaged: dict[str, bytes], tmp_path: Path
) -> None:
    names = [n for n in one_file_of_each_kind(interrupted) if not n.endswith("run.json")]
    for number, name in enumerate(names):
        # every other damage, the others of the next file: all of each kind of file would take minutes
        every = {what for what, _ in list(damages(Path(name)))[number % 2 :: 2]}
        same = resume_after_damage([(name, what) for what in every], interrupted, undamaged, tmp_path / "out")
        # a folder in the place of a part may be the user's
        assert every - same == ({"a directory"} & every if name.endswith(".parquet") else set()), name


def test_temporary_files_of_killed_writers_are_deleted_although_the_deletion_is_killed(
    interrupted: PlannedRun, undamaged: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = copy_run(interrupted, tmp_path / "out")
    left = output_folder(again) / "sequences" / "shard-00000.parquet.1-0a1b2c3d.tmp"
    left.write_bytes(b"PAR1")

    def killed(_: LocalFolder, key: str) -> None:
        if key.endswith(".tmp"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalFolder, "delete", killed)
        finish_run(again)
    assert left.exists() and (output_folder(again) / MANIFEST).exists()
    plan_again(again)
    assert contents(output_folder(again)) == undamaged


def test_files_and_folders_in_the_way_are_replaced_or_named(
    interrupted: PlannedRun, undamaged: dict[str, bytes], tmp_path: Path
) -> None:
    again = copy_run(interrupted, tmp_path / "records")
    shutil.rmtree(output_folder(again) / WORK / "records")
    (output_folder(again) / WORK / "records").write_text("x")
    assert contents(finish_run(again)) == undamaged
    again = copy_run(interrupted, tmp_path / "heads")
    shutil.rmtree(output_folder(again) / "heads")
    (output_folder(again) / "heads").write_text("x")
    with pytest.raises(Refusal, match=r"a folder is to be written at .*heads, where something else lies"):
        finish_run(again)
    again = copy_run(interrupted, tmp_path / "card")
    (output_folder(again) / CARD).mkdir()
    with pytest.raises(Refusal, match=r"a file is to be written at .*README\.md, where a folder lies"):
        finish_run(again)


def test_a_shard_whose_plan_has_changed_is_measured_again(
    interrupted: PlannedRun, corpus: Path, tmp_path: Path
) -> None:
    """A changed corpus of the same size invalidates the records once the plan is lost."""
    again = copy_run(interrupted, tmp_path / "out")
    (output_folder(again) / WORK / "plan.json").unlink()
    before = corpus.read_text()
    corpus.write_text(before.swapcase().replace("SHARD", "TABLE"))
    try:
        whole = finish_run(again)
    finally:
        corpus.write_text(before)
    assert verify(whole) == []


def test_parts_of_shards_that_a_new_plan_lacks_are_removed(
    interrupted: PlannedRun, corpus: Path, tmp_path: Path
) -> None:
    again = copy_run(interrupted, tmp_path / "out")
    (output_folder(again) / WORK / "plan.json").unlink()
    before = corpus.read_text()
    corpus.write_text("Few words." + " " * (len(before) - 10))
    try:
        whole = finish_run(again)
    finally:
        corpus.write_text(before)
    assert open_dataset(whole)[1]["shards"] == 1
    assert verify(whole) == []


def test_a_spool_damaged_while_shards_are_measured_is_named(interrupted: PlannedRun, tmp_path: Path) -> None:
    again = copy_run(interrupted, tmp_path / "out")
    worker = plan_again(again).open_worker()
    spool = output_folder(again) / WORK / "shard-00001.arrow"
    spool.write_bytes(flip_bit(spool.read_bytes(), at=0.5))
    with pytest.raises(Damaged, match=r"shard-00001\.arrow is not as it was written; the same command plans again"):
        measure_shard(worker, 1)


@pytest.mark.parametrize("name", ["empty", "cut off", "null bytes", "not UTF-8", "a directory", "a pipe", "no keys"])
def test_a_finished_dataset_with_a_damaged_manifest_is_refused_and_left_alone(
    interrupted: PlannedRun, tmp_path: Path, name: str
) -> None:
    whole = finish_run(copy_run(interrupted, tmp_path / "out"))
    {**BYTE_DAMAGES, **JSON_DAMAGES}[name](whole / MANIFEST)
    before = contents(whole) if name != "a pipe" else {}
    with pytest.raises(Refusal, match=r"manifest\.json"):
        plan_run(replace(interrupted.options, out=whole), instrument=interrupted.instrument)
    assert name == "a pipe" or contents(whole) == before
    assert not (whole / WORK).exists()


def test_a_run_that_is_refused_while_it_plans_keeps_what_an_earlier_one_measured(
    interrupted: PlannedRun, undamaged: dict[str, bytes], corpus: Path, tmp_path: Path
) -> None:
    again = copy_run(interrupted, tmp_path / "out")
    (output_folder(again) / WORK / "plan.json").unlink()
    before = corpus.read_bytes()
    corpus.write_bytes(b" " * len(before))
    try:
        with pytest.raises(Refusal, match="at least one document"):
            finish_run(again)
    finally:
        corpus.write_bytes(before)
    assert all(again.store.read_record(shard) is not None for shard in DONE)
    assert contents(finish_run(again)) == undamaged
