"""attlas run --workers N and --runner dask: the same bytes as one process."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from attlas.analysis.verify import verify
from attlas.extract.options import RunOptions
from tests.extract.runs import complete_run, contents
from tests.flows.conftest import Ended, part_bytes
from tests.flows.test_cli import refused
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_environment")
WORDS = "Whoever measures a shard writes the same bytes, and the dataset does not say who it was. "


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    corpus = tmp_path / "text.txt"
    corpus.write_text(WORDS * 40)
    return RunOptions(model="demo", corpus=str(corpus), out=tmp_path / "out", max_length=32, shard_sequences=4)


def run_with(options: RunOptions, environment: dict[str, str], *more: str) -> str:
    """Run the command in a process of its own; returns its standard error."""
    given = ["--model", options.model, "--corpus", options.corpus, "--out", str(options.out)]
    given += ["--max-length", str(options.max_length), "--shard-sequences", str(options.shard_sequences)]
    command = [sys.executable, "-m", "attlas.flows.cli", "run", *given, *more]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--workers", "2"), ("--runner", "dask", "--workers", "2")], ids=lambda how: how[0])
def test_several_processes_write_the_dataset_of_one(
    options: RunOptions, tmp_path: Path, prefect_environment: dict[str, str], how: tuple[str, ...]
) -> None:
    pytest.importorskip("prefect_dask")
    said = run_with(options, prefect_environment, *how)
    assert "in 7 shards" in said
    complete_run(replace(options, out=tmp_path / "alone"))
    found = contents(tmp_path / "out")
    assert {name: found[name] for name in found.keys() - {"report.html"}} == contents(tmp_path / "alone")
    assert verify(tmp_path / "out") == []
    assert len(part_bytes(tmp_path / "out")) > 5


@pytest.mark.slow
def test_a_dask_worker_that_is_killed_loses_nothing(
    options: RunOptions, tmp_path: Path, prefect_environment: dict[str, str]
) -> None:
    pytest.importorskip("prefect_dask")
    address = tmp_path / "scheduler.json"
    with ExitStack() as running:

        def start(name: str, *more: str) -> subprocess.Popen:
            command = [sys.executable, "-m", f"distributed.cli.dask_{name}", "--scheduler-file", str(address), *more]
            process = subprocess.Popen(
                command, env=prefect_environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            running.callback(process.wait)
            running.callback(process.kill)
            return process

        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        wait_until(address.exists)
        first, _ = (start("worker", "--no-nanny", "--nthreads", "1", "--no-dashboard") for _ in range(2))
        place = json.loads(address.read_text())["address"].removeprefix("tcp://")
        with ThreadPoolExecutor(1) as thread:
            ended = thread.submit(run_with, options, prefect_environment, "--runner", f"dask://{place}")
            wait_until(lambda: ended.done() or list((tmp_path / "out" / "_work" / "records").glob("*.json")))
            assert not ended.done(), "it was over before the worker could be killed"
            first.kill()
            ended.result()
    complete_run(replace(options, out=tmp_path / "alone"))
    assert part_bytes(tmp_path / "out") == part_bytes(tmp_path / "alone")
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (("--workers", "0"), "--workers must be at least 1; got 0"),
        (("--runner", "ray"), "--runner is dask, or dask://HOST:PORT"),
        (("--runner", "dask://"), "--runner is dask, or dask://HOST:PORT"),
        (("--runner", "dask://host:8786", "--workers", "2"), "--workers is for processes of this machine"),
        (("--shards", "1/2", "--workers", "2"), "a share is measured by one process"),
        (("--shards", "1/2", "--runner", "dask"), "a share is measured by one process"),
    ],
)
def test_what_can_t_run_is_refused_before_any_work(
    attlas: Callable[..., Ended], options: RunOptions, tmp_path: Path, how: tuple[str, ...], words: str
) -> None:
    out = tmp_path / "out"
    refused(attlas("run", "--model", "demo", "--corpus", options.corpus, "--out", out, *how), words)
    assert not out.exists()
