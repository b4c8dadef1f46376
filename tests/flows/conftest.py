"""Prefect for tests: a separate home, one test server for the quick tests, one real server for the slow ones."""

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ended as Ended
from tests.waiting import free_port, wait_until

ROOT = Path(__file__).parent.parent.parent
PROSE = (
    "The cat sat on the mat, and the cat was pleased with the mat.",
    "A transformer reads every token at once; attention says which of them matter to which.",
    "Nothing is lost: what was skipped is counted, and the reason is written beside the count.",
)


@pytest.fixture(scope="session")
def prefect_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment for everything that uses Prefect, also set in this process before Prefect is imported."""
    settings = {
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield {**os.environ, **settings}


@pytest.fixture(scope="session")
def test_server(prefect_environment: dict[str, str]) -> Iterator[None]:
    """Prefect's own test server, started once for the session."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="session")
def real_server(prefect_environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """`prefect server start`, with its scheduler; the environment that refers to it."""
    with started_prefect_server(prefect_environment) as environment:
        yield environment


@contextlib.contextmanager
def started_prefect_server(environment: dict[str, str], port: int | None = None) -> Iterator[dict[str, str]]:
    """`prefect server start` in an environment, at a free port by default; the environment that refers to it."""
    port = port or free_port()
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--no-ui",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/health", seconds=180)
        yield {**environment, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url: str, *, seconds: float) -> None:
    def answers() -> bool:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200

    wait_until(answers, seconds=seconds, pause_s=0.2)


def ask(environment: dict[str, str], what: str, **wanted: Any) -> list[dict[str, Any]]:
    """What the Prefect server of an environment has of a kind, such as flow_runs."""
    request = urllib.request.Request(
        f"{environment['PREFECT_API_URL']}/{what}/filter",
        data=json.dumps(wanted).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three text documents in a folder."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(PROSE):
        (folder / f"{number}.txt").write_text(text)
    return folder


def part_bytes(dataset: Path) -> dict[str, bytes]:
    """The bytes of all parts of a dataset, by path."""
    return {str(p.relative_to(dataset)): p.read_bytes() for p in sorted(dataset.rglob("*.parquet"))}
