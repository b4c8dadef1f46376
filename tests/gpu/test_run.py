"""Whole runs on the GPU: the CPU's columns, the same bytes again, also after a kill, and less memory than a batch needs."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attlas.extract import shard
from attlas.extract.options import RunOptions
from tests.extract.runs import complete_run, contents
from tests.gpu.machine import DEVICE, IS_REHEARSAL, ROOT, demo_folder, memory_limit
from tests.gpu.tables import assert_tables_agree, read_tables

pytestmark = pytest.mark.gpu

DOCUMENTS = 3 if IS_REHEARSAL else 12
ENGINE = "reference" if IS_REHEARSAL else "auto"  # in a rehearsal the fastest engine would be compiled first
# kill this process in the midst of the third shard
KILLED_RUN = """
import os, pickle, signal, sys
from attlas.extract.run import measure_shard, plan_run
planned = plan_run(pickle.load(sys.stdin.buffer))
worker = planned.open_worker()
first, second, third = planned.remaining[:3]
for shard in (first, second):
    measure_shard(worker, shard)
measure_shard(worker, third, progress=lambda tokens, documents: os.kill(os.getpid(), signal.SIGKILL))
"""


def options_of(out: Path, **changes) -> RunOptions:
    """A run of the demo model over some of the demo corpus, in float32."""
    given = RunOptions(
        model=demo_folder(),
        corpus="demo",
        out=out,
        limit=DOCUMENTS,
        max_length=32 if IS_REHEARSAL else 128,
        shard_sequences=8,
        device=DEVICE,
        dtype="float32",
        engine=ENGINE,
    )
    return replace(given, **changes)


def test_a_run_gives_the_columns_of_the_cpu(tmp_path: Path) -> None:
    complete_run(options_of(tmp_path / "gpu"))
    complete_run(options_of(tmp_path / "cpu", device="cpu", engine="reference", batch_tokens=1024))
    assert_tables_agree(read_tables(tmp_path / "gpu"), read_tables(tmp_path / "cpu"))


def test_every_statistic_is_that_of_the_cpu(tmp_path: Path) -> None:
    changes = dict(statistics="all", limit=max(2, DOCUMENTS // 4))
    complete_run(options_of(tmp_path / "gpu", **changes))
    complete_run(options_of(tmp_path / "cpu", **changes, device="cpu", engine="reference", batch_tokens=1024))
    assert_tables_agree(read_tables(tmp_path / "gpu"), read_tables(tmp_path / "cpu"), absolute=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_give_the_same_bytes_in_every_file(dtype: str, tmp_path: Path) -> None:
    for name in ("once", "again"):
        complete_run(options_of(tmp_path / name, dtype=dtype))
    once, again = contents(tmp_path / "once"), contents(tmp_path / "again")
    assert [name for name in once if once[name] != again.get(name)] == []
    assert once.keys() == again.keys()


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    import pickle

    killed = options_of(tmp_path / "killed")
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_RUN], input=pickle.dumps(killed), cwd=ROOT, capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    assert len(list((tmp_path / "killed" / "_work" / "records").iterdir())) == 2
    complete_run(killed)
    complete_run(options_of(tmp_path / "whole"))
    one, other = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    assert [name for name in other if one.get(name) != other[name]] == []
    assert one.keys() == other.keys()


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released, release = [], shard.release_memory

    def counted(error: BaseException, device: torch.device) -> None:
        released.append(error)
        release(error, device)

    monkeypatch.setattr(shard, "release_memory", counted)
    # one shard, whose batches of 64k tokens need a gigabyte and a half
    changes = dict(shard_sequences=4096, limit=1 if IS_REHEARSAL else 400)
    complete_run(options_of(tmp_path / "usual", **changes, batch_tokens=128 if IS_REHEARSAL else 4096))
    assert not released
    with scarce_memory(monkeypatch):
        complete_run(options_of(tmp_path / "scarce", **changes, batch_tokens=512 if IS_REHEARSAL else 65_536))
    assert released
    assert_tables_agree(read_tables(tmp_path / "scarce"), read_tables(tmp_path / "usual"))
    facts = json.loads((tmp_path / "scarce" / "manifest.json").read_text())
    assert facts["run"]["batch_tokens"] == (512 if IS_REHEARSAL else 65_536)


@contextmanager
def scarce_memory(monkeypatch: pytest.MonkeyPatch):
    """Memory for the model and small batches; in a rehearsal larger batches fail."""
    if not IS_REHEARSAL:
        with memory_limit(600 << 20):
            yield
        return
    observe = shard.observe_batch

    def failing(instrument, inputs, batch, *others) -> None:
        if batch.sequences > 4:
            raise torch.OutOfMemoryError("not enough memory, for the test")
        observe(instrument, inputs, batch, *others)

    with monkeypatch.context() as patch:
        patch.setattr(shard, "observe_batch", failing)
        yield
