"""Temporary servers: each with its own database, which is removed with it, in any environment."""

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
from tests.flows.test_interrupted import has_exited

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
    """A process that starts a temporary server, prints its address, and stops it when standard input is closed."""
    code = (
        "import sys; from attlas.flows.server import TemporaryServer; server = TemporaryServer(); server.wait(seconds=180); "
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
def started_servers(
    number: int, environment: dict[str, str]
) -> Iterator[list[tuple["subprocess.Popen[str]", str, int, Path]]]:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(started(environment)) for _ in range(number)]
        for process in processes:
            stack.callback(process.kill)
        lines = [p.stdout.readline().split() for p in processes if p.stdout]
        yield [(p, url, int(pid), Path(folder)) for p, (url, pid, folder) in zip(processes, lines, strict=True)]


@pytest.fixture
def new_environment(prefect_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """An environment with a new home, cache and folder for temporary files."""
    folders = {name: str(tmp_path / name) for name in ("PREFECT_HOME", "XDG_CACHE_HOME", "TMPDIR")}
    (tmp_path / "TMPDIR").mkdir()
    return {**prefect_environment, **folders}


def test_servers_started_at_once_in_a_new_home_share_nothing_and_save_the_template(
    new_environment: dict[str, str], tmp_path: Path
) -> None:
    with started_servers(3, new_environment) as servers:
        folders = [folder for *_, folder in servers]
        assert len({url for _, url, *_ in servers}) == len(set(folders)) == 3
        assert all((folder / "prefect.db").exists() for folder in folders)
        assert not (tmp_path / "PREFECT_HOME" / "prefect.db").exists()
        for process, *_ in servers[:2]:
            process.communicate()
        killed, _, pid, _ = servers[2]
        killed.send_signal(signal.SIGKILL)
        assert has_exited(pid)
    assert not any(folder.exists() for folder in folders)
    assert list((tmp_path / "TMPDIR").iterdir()) == []
    (template,) = (tmp_path / "XDG_CACHE_HOME" / "attlas").iterdir()
    with contextlib.closing(sqlite3.connect(template)) as database:
        assert database.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
        assert database.execute("SELECT count(*) FROM flow_run").fetchone() == (0,)


def test_a_damaged_template_is_replaced(new_environment: dict[str, str], tmp_path: Path) -> None:
    import prefect

    template = tmp_path / "XDG_CACHE_HOME" / "attlas" / f"prefect-{prefect.__version__}.db"
    template.parent.mkdir(parents=True)
    template.write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    with started_servers(1, new_environment) as ((process, *_),):
        process.communicate()
    with contextlib.closing(sqlite3.connect(template)) as database:
        assert database.execute("PRAGMA quick_check").fetchone() == ("ok",)


def test_a_server_requires_the_password_of_its_run(new_environment: dict[str, str]) -> None:
    with started_servers(1, new_environment) as ((_, url, *_),), pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/admin/version", timeout=10)


def test_a_run_succeeds_in_a_hostile_environment(
    prefect_environment: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["run", "--model", "demo", "--corpus", corpus, "--out", out, "--max-length", 16, "--engine", "reference"]
    inherited = {
        name: value for name, value in prefect_environment.items() if name not in ("PREFECT_HOME", "XDG_CACHE_HOME")
    }
    ended = subprocess.run(
        [sys.executable, "-m", "attlas.flows.cli", *map(str, command)],
        cwd=ROOT,
        env={**inherited, "TMPDIR": str(tmp_path), **HOSTILE},
        capture_output=True,
    )
    output = ended.stderr.decode("cp1252")
    assert ended.returncode == 0, output
    assert "PREFECT_HOME" in output and "Traceback" not in output
    assert (out / "manifest.json").exists()
    assert list(tmp_path.glob("attlas-*")) == []
