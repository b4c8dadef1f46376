"""A driver plans and finishes; workers, in any process, measure the planned shards and nothing else."""

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from attlas.extract.errors import Damaged, Refusal
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shard, open_worker, plan_run
from attlas.extract.store import Store
from tests.extract.runs import complete_run, contents, small_run

WORKER = """
import pickle, sys
from attlas.extract.run import measure_shard, open_worker
worker = open_worker(pickle.load(sys.stdin.buffer))
for shard in map(int, sys.argv[1:]):
    measure_shard(worker, shard)
"""


@pytest.fixture
def options(model: Path, tmp_path: Path) -> RunOptions:
    return small_run(
        model, tmp_path, "Any worker can measure any shard, and every one of them writes the same bytes. " * 4
    )


def test_workers_in_several_processes_write_the_dataset_of_one_process(options: RunOptions, tmp_path: Path) -> None:
    alone = replace(options, out=tmp_path / "alone")
    complete_run(alone)
    planned = plan_run(options)
    shards = planned.remaining
    assert len(shards) >= 4
    # what a worker needs of the corpus is in the plan
    Path(options.corpus).unlink()
    others = [str(shard) for shard in shards[1::2]]
    with subprocess.Popen([sys.executable, "-c", WORKER, *others], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        pickle.dump(options, process.stdin)
        process.stdin.close()
        worker = planned.open_worker()
        for shard in shards[::2]:
            measure_shard(worker, shard)
    assert process.returncode == 0
    assert planned.remaining == []
    finish(options.out)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_the_driver_finishes_without_the_model(options: RunOptions, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    planned = plan_run(replace(options, model=str(copy)))
    worker = planned.open_worker()
    with pytest.raises(RuntimeError, match=r"missing or damaged of \d+: 0–"):
        finish(options.out)
    for shard in planned.remaining:
        measure_shard(worker, shard)
    shutil.rmtree(copy)
    del planned, worker
    finish(options.out)
    manifest = Store.at(options.out).manifest
    assert manifest is not None
    assert manifest["model"]["layers"] == 3
    before = contents(tmp_path / "out")
    finish(options.out)
    assert contents(tmp_path / "out") == before


def test_a_worker_neither_plans_nor_claims(options: RunOptions, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"a worker measures shards of a planned run; .*out holds none"):
        open_worker(options)
    assert not (tmp_path / "out").exists()
    planned = plan_run(options)
    before = contents(tmp_path / "out")
    open_worker(options, instrument=planned.instrument)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "_work" / "plan.json").unlink()
    with pytest.raises(Refusal, match="out holds none; start the run itself first"):
        open_worker(options, instrument=planned.instrument)
    with pytest.raises(Damaged, match="no plan"):
        finish(options.out)


OTHERWISE: dict[str, Callable[[RunOptions], RunOptions]] = {
    "engine": lambda options: replace(options, engine="cpu"),
    "max_length": lambda options: replace(options, max_length=10),
    "tokens": lambda options: replace(options, tokens="none"),
    "weights_digest": lambda options: replace(options, model="demo"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_worker_that_would_measure_otherwise_is_refused(options: RunOptions, name: str) -> None:
    plan_run(options)
    with pytest.raises(Refusal, match=f"a worker measures as planned; .*{name}: there .*, asked "):
        open_worker(OTHERWISE[name](options))
