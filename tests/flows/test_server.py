"""Temporary servers: each with a database of its own, which goes with it, and in whatever environment."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.conftest import ROOT
from tests.flows.test_interrupted import gone

pytestmark = pytest.mark.slow
HOSTILE = {
    "http_proxy": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "HOME": "/proc/nothing",
    "PYTHONIOENCODING": "cp1252",
    # of another server
    "PREFECT_SERVER_API_AUTH_STRING": "admin:secret",
    "PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////proc/nothing/prefect.db",
}


def started(environment: dict[str, str]) -> "subprocess.Popen[str]":
    """A process that starts a temporary server, says where it is, and waits to be told to end."""
    code = (
        "import sys; from flows.server import TemporaryServer; server = TemporaryServer(); server.wait(seconds=180); "
        "print(server.url, server._process.pid, server._folder, flush=True); sys.stdin.read(); server.stop()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def several(number: int, environment: dict[str, str]) -> Iterator[list[tuple["subprocess.Popen[str]", str, int, Path]]]:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(started(environment)) for _ in range(number)]
        for process in processes:
            stack.callback(process.kill)
        said = [p.stdout.readline().split() for p in processes if p.stdout]
        yield [(p, url, int(pid), Path(folder)) for p, (url, pid, folder) in zip(processes, said, strict=True)]


@pytest.fixture
def bare(prefect_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """An environment with a home, a cache and a folder for temporary files that nothing has used yet."""
    folders = {name: str(tmp_path / name) for name in ("PREFECT_HOME", "XDG_CACHE_HOME", "TMPDIR")}
    (tmp_path / "TMPDIR").mkdir()
    return {**prefect_environment, **folders}


def test_servers_that_start_at_once_in_a_new_home_share_nothing_and_leave_the_template(
    bare: dict[str, str], tmp_path: Path
) -> None:
    with several(3, bare) as servers:
        folders = [folder for *_, folder in servers]
        assert len({url for _, url, *_ in servers}) == len(set(folders)) == 3
        assert all((folder / "prefect.db").exists() for folder in folders)
        assert not (tmp_path / "PREFECT_HOME" / "prefect.db").exists()
        for process, *_ in servers[:2]:
            process.communicate()
        killed, _, pid, _ = servers[2]
        killed.send_signal(signal.SIGKILL)
        assert gone(pid)
    assert not any(folder.exists() for folder in folders)
    assert list((tmp_path / "TMPDIR").iterdir()) == []
    (template,) = (tmp_path / "XDG_CACHE_HOME" / "attlas").iterdir()
    with contextlib.closing(sqlite3.connect(template)) as database:
        assert database.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
        assert database.execute("SELECT count(*) FROM flow_run").fetchone() == (0,)


def test_a_damaged_template_is_made_again(bare: dict[str, str], tmp_path: Path) -> None:
    import prefect

    template = tmp_path / "XDG_CACHE_HOME" / "attlas" / f"prefect-{prefect.__version__}.db"
    template.parent.mkdir(parents=True)
    template.write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    with several(1, bare) as ((process, *_),):
        process.communicate()
    with contextlib.closing(sqlite3.connect(template)) as database:
        assert database.execute("PRAGMA quick_check").fetchone() == ("ok",)


def test_a_server_serves_its_run_alone(bare: dict[str, str]) -> None:
    with several(1, bare) as ((_, url, *_),), pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/admin/version", timeout=10)


def test_a_run_succeeds_whatever_the_environment_says(
    prefect_environment: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["run", "--model", "demo", "--corpus", corpus, "--out", out, "--max-length", 16, "--engine", "reference"]
    kept = {
        name: value for name, value in prefect_environment.items() if name not in ("PREFECT_HOME", "XDG_CACHE_HOME")
    }
    ended = subprocess.run(
        [sys.executable, "-m", "flows.cli", *map(str, command)],
        cwd=ROOT,
        env={**kept, "TMPDIR": str(tmp_path), **HOSTILE},
        capture_output=True,
    )
    said = ended.stderr.decode("cp1252")
    assert ended.returncode == 0, said
    assert "PREFECT_HOME" in said and "Traceback" not in said
    assert (out / "manifest.json").exists()
    assert list(tmp_path.glob("attlas-*")) == []
