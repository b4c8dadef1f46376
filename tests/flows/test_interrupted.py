"""Killed and interrupted runs and their temporary servers, with real processes and signals."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attlas.extract.options import RunOptions
from attlas.extract.run import finish
from tests.extract.runs import complete_run
from tests.flows.conftest import ROOT, part_bytes, wait_for

pytestmark = pytest.mark.slow


def command(out: Path, corpus: Path) -> list[str]:
    options = ("--model", "demo", "--corpus", corpus, "--out", out, "--max-length", 64, "--shard-sequences", 8)
    return [sys.executable, "-m", "attlas.flows.cli", "run", *map(str, options)]


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten documents of Python's manual, for many shards."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("prose")
    for name in sorted(topics)[:10]:
        (folder / f"{name}.txt").write_text(topics[name][:1500])
    return folder


@pytest.fixture(scope="module")
def undisturbed(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of one process, without Prefect."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    complete_run(RunOptions(model="demo", corpus=str(prose), out=out, max_length=64, shard_sequences=8))
    return out


@contextlib.contextmanager
def started(arguments: list[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        arguments, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def signalled(
    name: str, event: str, part: str, number: int, arguments: list[str], environment: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run the command and signal it just before an event happens for the n-th time."""
    killing = [sys.executable, "-m", "tests.flows.killing", name, event, part, str(number), *arguments[3:]]
    return subprocess.run(killing, env=environment, cwd=ROOT, capture_output=True, text=True)


def records(out: Path) -> int:
    return len(list((out / "_work" / "records").glob("*.json")))


# (event, part of its path, its number), in the order of a run; the process is killed just before the event.
# tests/faults/test_kills.py kills before every write, without Prefect
MOMENTS = [
    ("os.rename", ".arrow", 3),  # planning
    ("os.rename", "/records/", 1),  # after all parts, before the record
    ("open", "/heads/", 6),  # in the middle, one shard in the model and one being written
    ("os.rename", "README.md", 1),  # all shards, but neither card nor manifest
    ("shutil.rmtree", "_work", 1),  # finished, but not cleaned up
]


def test_a_run_killed_in_every_stage_gives_the_same_bytes(
    real_server: dict[str, str], prose: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out, counts = tmp_path / "out", []
    for event, part, number in MOMENTS:
        ended = signalled("SIGKILL", event, part, number, command(out, prose), real_server)
        assert ended.returncode == -signal.SIGKILL, (event, part, number, ended.stderr)
        assert (out / "manifest.json").exists() == (event == "shutil.rmtree")
        counts.append(records(out))
    assert counts == sorted(counts)
    assert 0 < counts[2] < counts[3] == len(list((undisturbed / "heads").iterdir()))
    ended = subprocess.run(command(out, prose), env=real_server, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert part_bytes(out) == part_bytes(undisturbed)
    assert (out / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()
    assert not (out / "_work").exists()
    assert list(out.rglob("*.tmp")) == []


@pytest.mark.parametrize(
    ("event", "part"),
    [
        ("open", "prefect/settings/"),  # imports
        ("subprocess.Popen", "python"),  # the server
        ("open", "modeling_bert"),  # the model, while the server starts
        ("os.link", "run.json"),  # the plan
    ],
)
def test_ctrl_c_at_any_stage_of_the_start_leaves_no_server(
    prefect_environment: dict[str, str], corpus: Path, tmp_path: Path, event: str, part: str
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**prefect_environment, "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = signalled("SIGINT", event, part, 1, command(tmp_path / "out", corpus), environment)
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert all(has_exited(server) for server in servers_in(temporary))
    assert list(temporary.glob("attlas-*")) == []


def test_two_identical_commands_at_once_give_one_valid_dataset(
    prefect_environment: dict[str, str], prose: Path, tmp_path: Path
) -> None:
    from attlas.analysis.verify import verify

    out, errors = tmp_path / "out", []
    with contextlib.ExitStack() as both:
        runs = [
            both.enter_context(
                started(command(out, prose), {**prefect_environment, "PREFECT_HOME": str(tmp_path / name)})
            )
            for name in ("one", "two")
        ]
        errors = [run.communicate(timeout=500)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes, errors
    for code, text in zip(codes, errors, strict=True):
        assert code in (0, 2), text
        assert code == 0 or "is being measured by another process (pid " in text
    assert verify(out) == []


def test_ctrl_c_finishes_what_has_begun_and_says_how_to_continue_and_stops_the_temporary_server(
    prefect_environment: dict[str, str], prose: Path, tmp_path: Path
) -> None:
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    environment = {**prefect_environment, "TMPDIR": str(temporary)}
    ended = signalled("SIGINT", "os.rename", "/records/", 3, command(out, prose), environment)
    assert ended.returncode == 130, ended.stderr
    assert "stopping when the shards that are being measured are finished; Ctrl-C again stops now" in ended.stderr
    assert ended.stderr.endswith("the same command continues from there\n")
    assert "Traceback" not in ended.stderr and "ERROR" not in ended.stderr
    assert all(has_exited(server) for server in servers_in(temporary))
    assert list(temporary.glob("attlas-*")) == []
    assert 3 <= records(out) <= 4
    assert list(out.rglob("*.tmp")) == []
    assert not (out / "manifest.json").exists()


# (signals, exit code, whether what has begun is finished)
STOPS = [("SIGINT", 130, True), ("SIGINT,SIGINT", 130, False), ("SIGTERM", 143, False)]


def test_a_stopped_share_is_continued_to_the_same_bytes(
    prefect_environment: dict[str, str], prose: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Stopped three times, each time before the second record; Ctrl-C once lets that be written."""
    out = tmp_path / "out"
    arguments = [*command(out, prose), "--shards", "1/1"]
    for signals, code, is_finished in STOPS:
        before = records(out)
        ended = signalled(signals, "os.rename", "/records/", 2, arguments, prefect_environment)
        assert ended.returncode == code, ended.stderr
        assert "Traceback" not in ended.stderr
        assert "stopped; finished shards are kept in" in ended.stderr
        assert (records(out) - before >= 2) == is_finished
    again = subprocess.run(arguments, env=prefect_environment, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    finish(out)
    assert part_bytes(out) == part_bytes(undisturbed)


def test_the_temporary_server_answers_and_exits_with_a_killed_run(prefect_environment: dict[str, str]) -> None:
    code = (
        "import time; from attlas.flows.server import TemporaryServer; server = TemporaryServer(); server.wait(seconds=180); "
        "print(server.url, server._process.pid, flush=True); time.sleep(600)"
    )
    with started([sys.executable, "-c", code], prefect_environment) as process:
        assert process.stdout
        url, pid = process.stdout.readline().split()
        wait_for(f"{url}/health", seconds=5)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert has_exited(int(pid))


def servers_in(temporary: Path) -> list[int]:
    """The process ids of servers with a folder in there."""
    import psutil

    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(str(temporary) in argument for argument in process.info["cmdline"] or [])
    ]


def has_exited(pid: int, *, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False
