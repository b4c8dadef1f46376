"""Runs that are killed with SIGKILL, before one of their writes or at any moment; another one finishes each dataset."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from attlas.analysis.verify import verify
from attlas.extract.instrument import Instrument
from attlas.extract.options import RunOptions
from attlas.extract.store import WORK
from tests.extract.runs import complete_run, contents, small_run
from tests.threads import one_thread

TEXT = "Every shard of this run is two short sequences, and there are four shards or so. " * 3
# of each way
KILLS = [pytest.param(12, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.exhaustive)]
WRITES = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


@pytest.fixture(scope="module")
def options(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunOptions:
    return small_run(model, tmp_path_factory.mktemp("kills"), TEXT)


@pytest.fixture(scope="module")
def instrument(options: RunOptions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instrument]:
    """The model, loaded once: each run is a fork of this process. Threads of torch would not be there after it."""
    with one_thread():
        yield complete_run(replace(options, out=tmp_path_factory.mktemp("first") / "out")).instrument


@pytest.fixture(scope="module")
def undisturbed(
    options: RunOptions, instrument: Instrument, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    complete_run(replace(options, out=out), instrument=instrument)
    assert verify(out) == []
    return contents(out)


def forked(work: Callable[[], object], *, kill_after: float | None = None) -> int:
    """Do work in a fork of this process, and kill it after so many seconds unless it ends before; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run has failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed_before_write(options: RunOptions, instrument: Instrument, number: int) -> bool:
    """Run, and kill the process just before its N-th write to the output; whether it has come so far."""
    out = str(options.out)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal number
        if event in WRITES and arguments and str(arguments[0]).startswith(out) and _writes(event, arguments):
            number -= 1
            if number == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        sys.addaudithook(hook)
        complete_run(options, instrument=instrument)

    return forked(work) == signal.SIGKILL


def _writes(event: str, arguments: tuple[object, ...]) -> bool:
    return event != "open" or (
        isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    )


def assert_as_undisturbed(options: RunOptions, instrument: Instrument, undisturbed: dict[str, bytes]) -> None:
    out = Path(options.out)
    assert forked(lambda: complete_run(options, instrument=instrument)) == 0
    assert contents(out) == undisturbed
    assert not (out / WORK).exists()


@pytest.mark.parametrize("wanted", KILLS)
def test_killed_before_any_of_its_writes_a_run_is_continued_to_the_same_bytes(
    options: RunOptions, instrument: Instrument, undisturbed: dict[str, bytes], tmp_path: Path, wanted: int
) -> None:
    """Each dataset is killed up to four times, at moments drawn from all writes of what is left of the run."""
    kills, chance, datasets = 0, random.Random(0), 0
    while kills < wanted:
        datasets += 1
        again = replace(options, out=tmp_path / f"out{datasets}")
        for _ in range(4):
            kills += killed_before_write(again, instrument, chance.randint(1, 160))
        assert_as_undisturbed(again, instrument, undisturbed)


@pytest.mark.parametrize("wanted", KILLS)
def test_killed_at_any_moment_a_run_is_continued_to_the_same_bytes(
    options: RunOptions, instrument: Instrument, undisturbed: dict[str, bytes], tmp_path: Path, wanted: int
) -> None:
    began = time.monotonic()
    assert_as_undisturbed(replace(options, out=tmp_path / "timed"), instrument, undisturbed)
    whole, chance, kills, datasets = time.monotonic() - began, random.Random(0), 0, 0
    while kills < wanted:
        datasets += 1
        again = replace(options, out=tmp_path / f"out{datasets}")
        for _ in range(4):
            work = lambda: complete_run(again, instrument=instrument)  # noqa: B023, E731 - called at once
            kills += forked(work, kill_after=chance.uniform(0, whole)) == signal.SIGKILL
        assert_as_undisturbed(again, instrument, undisturbed)
