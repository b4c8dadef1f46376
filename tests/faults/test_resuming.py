"""An interrupted run whose files came to harm goes on to the same bytes, or is refused by the name of the file."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attlas.analysis.verify import verify
from attlas.extract.errors import Damaged, Refusal
from attlas.extract.options import RunOptions
from attlas.extract.run import PlannedRun, finish, measure_shard, plan_run
from attlas.extract.store import CARD, MANIFEST, WORK, Store, open_dataset
from tests.extract.models import tiny
from tests.extract.runs import contents
from tests.faults.damage import OF_BYTES, OF_JSON, damages, flipped

MAX_LENGTH = 12
DONE = (0, 2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("Every shard of this run is two short sequences, and there are four shards or so. " * 4)
    return path


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Hundreds of passes of a few tokens: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small = tiny("bert")
    small.resize_token_embeddings(len(demo.tokenizer))
    small.save_pretrained(folder)
    demo.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stopped(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> PlannedRun:
    """A run that was stopped after two of its shards."""
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
def undamaged(stopped: PlannedRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(finished(copied(stopped, tmp_path_factory.mktemp("undamaged") / "out")))


def folder_of(run: PlannedRun) -> Path:
    return Path(run.options.out)


def copied(run: PlannedRun, out: Path) -> PlannedRun:
    """The same run in a copy of its folder, its model as it is in memory."""
    shutil.copytree(folder_of(run), out)
    return replace(run, store=Store.at(out), options=replace(run.options, out=out), plan=None, lock=None)


def planned_again(run: PlannedRun) -> PlannedRun:
    return plan_run(run.options, instrument=run.instrument)


def finished(run: PlannedRun) -> Path:
    """Plan the run again in its folder and do what is missing."""
    again = planned_again(run)
    for shard in again.remaining:
        measure_shard(again.open_worker(), shard)
    finish(run.options.out)
    return folder_of(run)


def assert_same_or_refused(stopped: PlannedRun, name: str, what: str, undamaged: dict[str, bytes]) -> bool:
    """Resume; True where it came to the same bytes."""
    path = folder_of(stopped) / name
    try:
        finished(stopped)
    except Refusal as refusal:
        assert path.name in str(refusal), (name, what)
        return False
    assert contents(folder_of(stopped)) == undamaged, (name, what)
    assert not any(p.is_symlink() for p in folder_of(stopped).rglob("*")), (name, what)
    return True


def kinds(stopped: PlannedRun) -> Iterator[str]:
    """One file of each kind that an interrupted run holds: of a shard that is done, and of one that is not."""
    records = [f"{WORK}/records/{shard:05d}.json" for shard in DONE]
    spools = [f"{WORK}/shard-{shard:05d}.arrow" for shard in (0, 1)]
    parts = [f"{table}/shard-{DONE[1]:05d}.parquet" for table in ("documents", "sequences", "heads", "profiles")]
    for name in (
        f"{WORK}/run.json",
        f"{WORK}/plan.json",
        f"{WORK}/manifest.json",
        f"{WORK}/lock",
        *records[:1],
        *spools,
        *parts,
    ):
        assert (folder_of(stopped) / name).is_file(), name
        yield name


def resumed_after(
    names: Iterable[tuple[str, str]], stopped: PlannedRun, undamaged: dict[str, bytes], out: Path
) -> set[str]:
    """Do each (file, damage) to a copy of the run and resume it; the damages that led to the same bytes."""
    same = set()
    for name, what in names:
        again = copied(stopped, out)
        dict(damages(Path(name)))[what](folder_of(again) / name)
        if assert_same_or_refused(again, name, what, undamaged):
            same.add(what)
        shutil.rmtree(folder_of(again))
    return same


# the newline at the end says nothing
HARMLESS = {"last byte lost"}


def test_whose_folder_it_is_cannot_be_made_again(
    stopped: PlannedRun, undamaged: dict[str, bytes], tmp_path: Path
) -> None:
    name = f"{WORK}/run.json"
    every = [(name, what) for what, _ in damages(Path(name))]
    assert resumed_after(every, stopped, undamaged, tmp_path / "out") == HARMLESS


QUICK = ("bit flipped in the middle",)


def test_what_can_be_made_again_is(stopped: PlannedRun, undamaged: dict[str, bytes], tmp_path: Path) -> None:
    for name in [n for n in kinds(stopped) if not n.endswith("run.json")]:
        wanted = {what for what, _ in damages(Path(name)) if what in QUICK}
        same = resumed_after([(name, what) for what in wanted], stopped, undamaged, tmp_path / "out")
        assert same == wanted, name


@pytest.mark.slow
def test_every_damage_to_every_file_that_can_be_made_again(
    stopped: PlannedRun, undamaged: dict[str, bytes], tmp_path: Path
) -> None:
    for name in [n for n in kinds(stopped) if not n.endswith("run.json")]:
        every = {what for what, _ in damages(Path(name))}
        same = resumed_after([(name, what) for what in every], stopped, undamaged, tmp_path / "out")
        # a folder that lies where a part goes may be the user's
        assert every - same == ({"a directory"} if name.endswith(".parquet") else set()), name


def test_what_lies_in_the_way_of_folders_is_named(
    stopped: PlannedRun, undamaged: dict[str, bytes], tmp_path: Path
) -> None:
    again = copied(stopped, tmp_path / "records")
    shutil.rmtree(folder_of(again) / WORK / "records")
    (folder_of(again) / WORK / "records").write_text("x")
    assert contents(finished(again)) == undamaged
    again = copied(stopped, tmp_path / "heads")
    shutil.rmtree(folder_of(again) / "heads")
    (folder_of(again) / "heads").write_text("x")
    with pytest.raises(Refusal, match=r"a folder is to be written at .*heads, where something else lies"):
        finished(again)
    again = copied(stopped, tmp_path / "card")
    (folder_of(again) / CARD).mkdir()
    with pytest.raises(Refusal, match=r"a file is to be written at .*README\.md, where a folder lies"):
        finished(again)


def test_a_shard_that_would_be_planned_otherwise_now_is_measured_again(
    stopped: PlannedRun, corpus: Path, tmp_path: Path
) -> None:
    """A corpus of the same names and sizes is another corpus; its records don't fit once the plan is lost."""
    again = copied(stopped, tmp_path / "out")
    (folder_of(again) / WORK / "plan.json").unlink()
    before = corpus.read_text()
    corpus.write_text(before.swapcase().replace("SHARD", "TABLE"))
    try:
        whole = finished(again)
    finally:
        corpus.write_text(before)
    assert verify(whole) == []


def test_parts_of_shards_that_a_new_plan_does_not_have_go(stopped: PlannedRun, corpus: Path, tmp_path: Path) -> None:
    again = copied(stopped, tmp_path / "out")
    (folder_of(again) / WORK / "plan.json").unlink()
    before = corpus.read_text()
    corpus.write_text("Few words." + " " * (len(before) - 10))
    try:
        whole = finished(again)
    finally:
        corpus.write_text(before)
    assert open_dataset(whole)[1]["shards"] == 1
    assert verify(whole) == []


def test_a_spool_that_comes_to_harm_while_shards_are_measured_is_named(stopped: PlannedRun, tmp_path: Path) -> None:
    again = copied(stopped, tmp_path / "out")
    worker = planned_again(again).open_worker()
    spool = folder_of(again) / WORK / "shard-00001.arrow"
    spool.write_bytes(flipped(spool.read_bytes(), at=0.5))
    with pytest.raises(Damaged, match=r"shard-00001\.arrow is not as it was written; the same command plans again"):
        measure_shard(worker, 1)


@pytest.mark.parametrize("name", ["empty", "cut off", "null bytes", "not UTF-8", "a directory", "a pipe", "no keys"])
def test_a_finished_dataset_with_a_damaged_manifest_is_refused_and_left_alone(
    stopped: PlannedRun, tmp_path: Path, name: str
) -> None:
    whole = finished(copied(stopped, tmp_path / "out"))
    {**OF_BYTES, **OF_JSON}[name](whole / MANIFEST)
    before = contents(whole) if name != "a pipe" else {}
    with pytest.raises(Refusal, match=r"manifest\.json"):
        plan_run(replace(stopped.options, out=whole), instrument=stopped.instrument)
    assert name == "a pipe" or contents(whole) == before
    assert not (whole / WORK).exists()


def test_a_run_that_is_refused_while_it_plans_keeps_what_an_earlier_one_measured(
    stopped: PlannedRun, undamaged: dict[str, bytes], corpus: Path, tmp_path: Path
) -> None:
    again = copied(stopped, tmp_path / "out")
    (folder_of(again) / WORK / "plan.json").unlink()
    before = corpus.read_bytes()
    corpus.write_bytes(b" " * len(before))
    try:
        with pytest.raises(Refusal, match="at least one document"):
            finished(again)
    finally:
        corpus.write_bytes(before)
    assert all(again.store.read_record(shard) is not None for shard in DONE)
    assert contents(finished(again)) == undamaged
