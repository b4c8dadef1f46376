"""Runs started by the scheduler of a real Prefect server."""

import json
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import ROOT

pytestmark = pytest.mark.slow


def flow_runs(environment: dict[str, str]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{environment['PREFECT_API_URL']}/flow_runs/filter",
        data=json.dumps({"deployments": {"name": {"any_": ["nightly"]}}}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_each_scheduled_run_writes_its_own_dataset(real_server: dict[str, str], corpus: Path, tmp_path: Path) -> None:
    run_file = tmp_path / "nightly.toml"
    run_file.write_text(f'model = "demo"\ncorpus = "{corpus.name}"\nout = "data"\nmax_length = 16\n')
    command = [sys.executable, "-m", "attlas.flows.cli", "serve", str(run_file), "--interval", "10"]
    log = (tmp_path / "log").open("w+")
    with log, subprocess.Popen(command, env=real_server, cwd=ROOT, stdout=log, stderr=log) as served:
        try:
            completed = wait_for_completed(real_server, number=2, seconds=240)
        finally:
            served.send_signal(signal.SIGINT)
            served.wait(60)
        log.seek(0)
        output = log.read()
    assert completed, output
    assert all(run["auto_scheduled"] for run in completed)
    folders = {time_of(run): tmp_path / "data" / time_of(run) for run in completed}
    assert len(folders) >= 2
    for folder in folders.values():
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["corpus"]["digest_keyed"]
        assert (folder / "report.html").exists()
    key = tmp_path / "nightly.digest-key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = key.read_bytes()
    inside = [p for p in (tmp_path / "data").rglob("*") if p.is_file() and secret in p.read_bytes()]
    assert inside == []


def wait_for_completed(environment: dict[str, str], *, number: int, seconds: float) -> list[dict[str, Any]]:
    deadline = time.monotonic() + seconds
    completed: list[dict[str, Any]] = []
    while len(completed) < number and time.monotonic() < deadline:
        time.sleep(1)
        completed = [run for run in flow_runs(environment) if run["state_type"] == "COMPLETED"]
    return completed if len(completed) >= number else []


def time_of(run: dict[str, Any]) -> str:
    """The name of the folder for the run's scheduled time."""
    return run["expected_start_time"][:19].replace(":", "-") + "Z"
