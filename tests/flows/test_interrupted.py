"""Runs that are killed, interrupted, or whose temporary server must go: real processes and real signals."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.conftest import ROOT, part_bytes, wait_for

pytestmark = pytest.mark.slow
KILLS = 10


def command(out: Path, corpus: Path) -> list[str]:
    options = ("--model", "demo", "--corpus", corpus, "--out", out, "--max-length", 64, "--shard-sequences", 4)
    return [sys.executable, "-m", "flows.cli", "run", *map(str, options)]


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """Forty documents of the manual that ships with Python: enough that a kill lands in the middle."""
    from pydoc_data.topics import topics

    folder = tmp_path / "prose"
    folder.mkdir()
    for name in sorted(topics)[:40]:
        (folder / f"{name}.txt").write_text(topics[name][:3000])
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


def finish(out: Path, corpus: Path, environment: dict[str, str]) -> None:
    ended = subprocess.run(command(out, corpus), env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def records(out: Path) -> int:
    return len(list((out / "_work" / "records").glob("*.json")))


def test_ten_kills_leave_the_same_bytes_as_none(real_server: dict[str, str], prose: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(straight, prose, real_server)
    wanted = part_bytes(straight)
    shards = len(list((straight / "heads").iterdir()))
    moments = random.Random(4)
    seen = []
    for kill in range(KILLS):
        goal = kill * shards // (KILLS + 2)
        with started(command(killed, prose), real_server) as process:
            # each kill falls a little after some shard, the first ones into loading and planning
            while process.poll() is None and (kill > 1 and records(killed) <= goal):
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 4 if kill < 2 else 0.4))
            assert process.poll() is None, process.communicate()
            process.send_signal(signal.SIGKILL)
        seen.append(records(killed))
        assert not (killed / "manifest.json").exists()
    assert seen == sorted(seen)
    assert seen[-1] > 0
    finish(killed, prose, real_server)
    assert part_bytes(killed) == wanted
    assert (killed / "manifest.json").read_bytes() == (straight / "manifest.json").read_bytes()
    assert not (killed / "_work").exists()
    assert list(killed.rglob("*.tmp")) == []


def test_ctrl_c_says_how_to_go_on_and_ends_the_temporary_server(
    prefect_environment: dict[str, str], prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with started(command(out, prose), prefect_environment) as process:
        while process.poll() is None and records(out) < 1:
            time.sleep(0.01)
        servers = children_of(process.pid)
        assert servers
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert all(gone(server) for server in servers)
    finish(out, prose, prefect_environment)
    assert (out / "manifest.json").exists()


def test_the_temporary_server_answers_and_ends_with_a_killed_run(prefect_environment: dict[str, str]) -> None:
    code = (
        "import time; from flows.server import TemporaryServer; server = TemporaryServer(); server.wait(seconds=180); "
        "print(server.url, server._process.pid, flush=True); time.sleep(600)"
    )
    with started([sys.executable, "-c", code], prefect_environment) as process:
        assert process.stdout
        url, pid = process.stdout.readline().split()
        wait_for(f"{url}/health", seconds=5)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert gone(int(pid))


def children_of(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children()]


def gone(pid: int, *, seconds: float = 15) -> bool:
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
