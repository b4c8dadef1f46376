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

from tests.flows.conftest import ROOT, part_bytes, wait_for

pytestmark = pytest.mark.slow


def command(out: Path, corpus: Path) -> list[str]:
    options = ("--model", "demo", "--corpus", corpus, "--out", out, "--max-length", 64, "--shard-sequences", 8)
    return [sys.executable, "-m", "attlas.flows.cli", "run", *map(str, options)]


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """Twenty documents of Python's manual, for many shards."""
    from pydoc_data.topics import topics

    folder = tmp_path / "prose"
    folder.mkdir()
    for name in sorted(topics)[:20]:
        (folder / f"{name}.txt").write_text(topics[name][:1500])
    return folder


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


def finish(out: Path, corpus: Path, environment: dict[str, str]) -> None:
    ended = subprocess.run(command(out, corpus), env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def records(out: Path) -> int:
    return len(list((out / "_work" / "records").glob("*.json")))


# (event, part of its path, its number), in the order of a run; the process is killed just before the event.
# tests/faults/test_kills.py kills before every write, without Prefect
MOMENTS = [
    ("os.rename", ".arrow", 3),  # planning
    ("os.rename", "/records/", 1),  # after all parts, before the record
    ("open", "/heads/", 6),  # in the middle, one shard in the model and one being written
    ("os.rename", "README.md", 1),  # all shards, but neither card nor manifest
]


def test_a_run_killed_in_every_stage_gives_the_same_bytes(
    real_server: dict[str, str], prose: Path, tmp_path: Path
) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    finish(uninterrupted, prose, real_server)
    counts = []
    for event, part, number in MOMENTS:
        ended = signalled("SIGKILL", event, part, number, command(killed, prose), real_server)
        assert ended.returncode == -signal.SIGKILL, (event, part, number, ended.stderr)
        assert not (killed / "manifest.json").exists()
        counts.append(records(killed))
    assert counts == sorted(counts)
    assert 0 < counts[-2] < counts[-1] == len(list((uninterrupted / "heads").iterdir()))
    finish(killed, prose, real_server)
    assert part_bytes(killed) == part_bytes(uninterrupted)
    assert (killed / "manifest.json").read_bytes() == (uninterrupted / "manifest.json").read_bytes()
    assert not (killed / "_work").exists()
    assert list(killed.rglob("*.tmp")) == []


def test_after_a_kill_behind_the_manifest_the_same_command_cleans_up(
    real_server: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = signalled("SIGKILL", "shutil.rmtree", "_work", 1, command(out, corpus), real_server)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (out / "manifest.json").exists() and (out / "_work").exists()
    finish(out, corpus, real_server)
    assert not (out / "_work").exists()


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


@pytest.mark.parametrize(
    ("signals", "code"),
    [("SIGINT", 130), ("SIGINT,SIGINT", 130), ("SIGTERM", 143)],
    ids=["once", "twice", "terminated"],
)
def test_a_stopped_share_is_continued_to_the_same_bytes(
    prefect_environment: dict[str, str], prose: Path, tmp_path: Path, signals: str, code: int
) -> None:
    """Once: what has begun is finished. Twice, or terminated: the third record is not written."""
    arguments = [*command(tmp_path / "out", prose), "--limit", "6", "--shards", "1/1"]
    ended = signalled(signals, "os.rename", "/records/", 3, arguments, prefect_environment)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "stopped; finished shards are kept in" in ended.stderr
    assert (records(tmp_path / "out") >= 3) == (signals == "SIGINT")
    again = subprocess.run(arguments, env=prefect_environment, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    undisturbed = [tmp_path / "whole" if a == str(tmp_path / "out") else a for a in arguments]
    subprocess.run(undisturbed, env=prefect_environment, cwd=ROOT, check=True, capture_output=True)
    assert part_bytes(tmp_path / "out") == part_bytes(tmp_path / "whole")


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
