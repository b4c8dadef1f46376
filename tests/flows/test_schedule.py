"""Runs started by the scheduler of a real Prefect server."""

import asyncio
import json
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from attlas.analysis.verify import verify
from tests.flows.conftest import ROOT, ask, started_prefect_server
from tests.flows.postgresql import postgresql, programs, rows_of
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


def flow_runs(environment: dict[str, str], deployment: str, state: str) -> list[dict[str, Any]]:
    """The runs of a deployment in this state."""
    runs = ask(environment, "flow_runs", deployments={"name": {"any_": [deployment]}}, sort="START_TIME_ASC")
    return [run for run in runs if run["state_name"] == state]


def events_named(environment: dict[str, str], name: str) -> list[dict[str, Any]]:
    """The events of a name, of which the server answers with a page."""
    found: Any = ask(environment, "events", filter={"event": {"name": [name]}})
    return found["events"]


def wait_for_runs(
    environment: dict[str, str], deployment: str, state: str, number: int, *, seconds: float = 240
) -> list[dict[str, Any]]:
    def enough() -> list[dict[str, Any]]:
        found = flow_runs(environment, deployment, state)
        return found if len(found) >= number else []

    return wait_until(enough, seconds=seconds, pause_s=1)


def test_the_scheduler_measures_what_changed_and_says_what_it_did(
    real_server: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    run_file, data = tmp_path / "hourly.toml", tmp_path / "data"
    run_file.write_text(f'model = "demo"\ncorpus = "{corpus.name}"\nout = "data"\nmax_length = 16\n')
    command = [sys.executable, "-m", "attlas.flows.cli", "serve", str(run_file), "--interval", "8", "--keep", "2"]
    log = (tmp_path / "log").open("w+")
    with log, subprocess.Popen(command, env=real_server, cwd=ROOT, stdout=log, stderr=log) as served:
        try:
            (first,) = wait_for_runs(real_server, "hourly", "Completed", 1)
            unchanged = wait_for_runs(real_server, "hourly", "Unchanged", 1)[0]
            for number in (2, 3):
                (corpus / f"more{number}.txt").write_text(f"A document that was not there before, number {number}.")
                completed = wait_for_runs(real_server, "hourly", "Completed", number)
            moved = corpus.rename(tmp_path / "elsewhere")
            failed = wait_for_runs(real_server, "hourly", "Failed", 1)[0]
            moved.rename(corpus)
        finally:
            served.send_signal(signal.SIGINT)
            served.wait(60)
        log.seek(0)
        output = log.read()
    assert len(completed) == 3, output
    assert all(run["auto_scheduled"] and "attlas" in run["tags"] for run in completed)
    times = [time_of(run) for run in completed]
    assert (
        first["name"]
        == f"hourly {times[0].removesuffix('Z').replace('T', ' ')[:11]}{times[0][11:19].replace('-', ':')}"
    )
    assert unchanged["state"]["message"] == f"skipped: nothing has changed since {times[0]}"
    assert completed[2]["state"]["message"].endswith(f"; removed {times[0]}")
    assert failed["state"]["message"].startswith("a corpus ")
    assert "\n" not in failed["state"]["message"]
    assert "Traceback" not in output

    assert sorted(p.name for p in data.iterdir() if not p.name.startswith(".")) == [*times[1:], "latest"]
    assert (data / "latest").readlink() == Path(times[2])
    documents = [json.loads((data / name / "manifest.json").read_text())["corpus"] for name in times[1:]]
    assert [corpus["documents"] for corpus in documents] == [4, 5]
    assert all(
        corpus["digest_keyed"] and (data / name / "report.html").exists()
        for corpus, name in zip(documents, times[1:], strict=True)
    )

    artifacts = {artifact["key"]: artifact for artifact in ask(real_server, "artifacts/latest")}
    assert {f"hourly-{what}" for what in ("progress", "dataset", "findings", "report")} <= artifacts.keys()
    assert re.search(r"documents \| 5\b", artifacts["hourly-dataset"]["data"])
    metrics = {row["metric"]: row["value"] for row in json.loads(artifacts["hourly-metrics"]["data"])}
    assert (metrics["shards measured"], metrics["documents measured"]) == ("1", "5")
    assert metrics["attempts at a shard that failed"] == "0"
    assert int(metrics["tokens per second"].replace(",", "")) > 0
    rules = json.loads(artifacts["hourly-findings"]["data"])
    assert {"dead head", "attention sink"} <= {row["name"] for row in rules}

    key = tmp_path / "hourly.digest-key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = key.read_bytes()
    inside = [p for p in data.rglob("*") if p.is_file() and secret in p.read_bytes()]
    assert inside == []


@pytest.mark.skipif(programs() is None, reason="needs Debian's package postgresql")
def test_the_scheduler_of_a_server_on_postgresql_starts_runs(
    prefect_environment: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    run_file = tmp_path / "hourly.toml"
    run_file.write_text(f'model = "demo"\ncorpus = "{corpus.name}"\nout = "data"\nmax_length = 16\n')
    command = [sys.executable, "-m", "attlas.flows.cli", "serve", str(run_file), "--interval", "8"]
    with postgresql() as url, (tmp_path / "log").open("w+") as log:
        database = {"PREFECT_API_DATABASE_CONNECTION_URL": url, "PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
        with started_prefect_server({**prefect_environment, **database}) as environment:
            with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log) as served:
                try:
                    (first,) = wait_for_runs(environment, "hourly", "Completed", 1)
                    (unchanged, *_) = wait_for_runs(environment, "hourly", "Unchanged", 1)
                finally:
                    served.send_signal(signal.SIGINT)
                    served.wait(60)
            artifacts = {artifact["key"] for artifact in ask(environment, "artifacts/latest")}
        assert asyncio.run(rows_of(url, "flow_run")) >= 2  # the server has used this database
        log.seek(0)
        assert "Traceback" not in log.read()
    assert first["auto_scheduled"] and unchanged["auto_scheduled"]
    assert unchanged["state"]["message"] == f"skipped: nothing has changed since {time_of(first)}"
    assert {f"hourly-{what}" for what in ("progress", "dataset", "findings", "report")} <= artifacts
    assert verify(tmp_path / "data" / "latest") == []


def test_a_worker_of_a_work_pool_runs_what_prefect_yaml_deploys(
    real_server: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    run_file = tmp_path / "nightly.toml"
    run_file.write_text(f'model = "demo"\ncorpus = "{corpus.name}"\nout = "data"\nmax_length = 16\n')
    environment = real_server | {"ATTLAS_RUN_FILE": str(run_file), "ATTLAS_IMAGE": "none", "ATTLAS_DATA": str(tmp_path)}

    def prefect(*arguments: str) -> str:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    prefect("work-pool", "create", "--type", "process", "attlas")
    prefect("work-pool", "create", "--type", "docker", "attlas-docker")
    prefect("deploy", "--all")
    deployed = {found["name"]: found for found in ask(environment, "deployments")}
    try:
        assert deployed["nightly"]["parameters"] == {"run_file": str(run_file), "keep": 30}
        assert deployed["nightly"]["global_concurrency_limit"]["limit"] == 1
        assert deployed["nightly"]["parameter_openapi_schema"]["required"] == ["run_file"]
        assert deployed["nightly-docker"]["job_variables"]["image"] == "none"
        prefect("deployment", "run", "attlas-scheduled/nightly")
        prefect("worker", "start", "--pool", "attlas", "--run-once")
        (run,) = wait_for_runs(environment, "nightly", "Completed", 1)
        assert run["work_pool_name"] == "attlas"
        assert (tmp_path / "data" / "latest" / "manifest.json").is_file()
    finally:
        for name in ("nightly", "nightly-docker"):
            prefect("deployment", "delete", f"attlas-scheduled/{name}")


@pytest.mark.exhaustive
def test_a_run_whose_process_was_killed_is_marked_as_crashed_by_the_automation(
    prefect_environment: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    automation, run_file = tmp_path / "automation.yaml", tmp_path / "killed.toml"
    shipped = (ROOT / "prefect-automation.yaml").read_text()
    automation.write_text(shipped.replace("within: 600", "within: 70"))
    assert automation.read_text() != shipped
    run_file.write_text('model = "demo"\ncorpus = "demo"\nout = "data"\n')  # measured for longer than a heartbeat takes
    with started_prefect_server({**prefect_environment, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}) as environment:
        create = [sys.executable, "-m", "prefect", "automation", "create", "--from-file", str(automation)]
        subprocess.run(create, env=environment, check=True, stdout=subprocess.DEVNULL)
        serve = [sys.executable, "-m", "attlas.flows.cli", "serve", str(run_file), "--interval", "20"]
        with subprocess.Popen(serve, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL) as served:
            try:
                wait_for_runs(environment, "killed", "Running", 1)
                wait_until(lambda: events_named(environment, "prefect.flow-run.heartbeat"), seconds=120, pause_s=1)
            finally:
                for process in [*psutil.Process(served.pid).children(recursive=True), served]:
                    process.kill()
        (crashed,) = wait_for_runs(environment, "killed", "Crashed", 1)
    assert crashed["state"]["message"] == "its process gave no sign of life for ten minutes"


def time_of(run: dict[str, Any]) -> str:
    """The name of the folder for the run's scheduled time."""
    return run["expected_start_time"][:19].replace(":", "-") + "Z"


def test_a_scheduled_night_is_compared_with_the_baseline_and_told_once(
    real_server: dict[str, str], model: Path, tmp_path: Path
) -> None:
    from tests.flows.test_watching import new_house

    house = new_house(model, tmp_path, tmp_path)
    run_file = tmp_path / "watched.toml"
    run_file.write_text('model = "model"\ncorpus = "corpus"\nout = "nights"\nmax_length = 16\nengine = "reference"\n')
    watch = [sys.executable, "-m", "attlas.flows.cli", "watch", str(run_file), "--columns", "entropy_nats"]
    alerts = ["--alert", str(tmp_path / "alerts.jsonl"), "--alert", "prefect", "--alert", "webhook:HOOK"]
    environment = real_server | {"HOOK": "http://127.0.0.1:9/secret-of-the-hook"}
    once = subprocess.run([*watch, "--accept"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert once.returncode == 0 and once.stdout.endswith("it is the baseline from now on\n"), once.stderr
    log = (tmp_path / "log").open("w+")
    command = [*watch, *alerts, "--interval", "8"]
    with log, subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log) as served:
        try:
            unchanged = wait_for_runs(real_server, "watched", "Unchanged", 1)[0]
            house.add(50)
            grown = wait_for_runs(real_server, "watched", "Completed", 1)[0]
            house.perturb()
            drifted = wait_for_runs(real_server, "watched", "Drift", 1)[0]
            wait_for_runs(real_server, "watched", "Unchanged", 3)
        finally:
            served.send_signal(signal.SIGINT)
            served.wait(60)
        log.seek(0)
        output = log.read()
    assert house.nights.baseline is not None
    name = house.nights.baseline.name
    assert unchanged["state"]["message"] == f"skipped: nothing is new since {name.removesuffix('@1')}"
    assert grown["state"]["message"].startswith(f"{name.removesuffix('@1')}@2 against {name}: 0 of ")
    said = rf"\S+@1 against {name}: \d+ of \d+ changed; webhook:HOOK does not answer \(ConnectError\); its alerts wait in .+"
    assert re.fullmatch(said, drifted["state"]["message"])
    artifacts = {artifact["key"]: artifact for artifact in ask(real_server, "artifacts/latest")}
    assert "watched-drift" in artifacts
    changes = json.loads(artifacts["watched-changes"]["data"])
    assert changes[0]["column"] == "entropy\\_nats" and changes[0]["head"] and float(changes[0]["difference"])
    told = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert sorted(alert["finding"] for alert in told) == ["defect: entropy collapse", "drift: heads"]
    events = events_named(real_server, "attlas.alert")
    assert sorted(event["payload"]["key"] for event in events) == sorted(alert["key"] for alert in told)
    assert "secret-of-the-hook" not in output and "Traceback" not in output
    assert not [p for p in (tmp_path / "nights").rglob("*") if p.is_file() and b"secret-of-the-hook" in p.read_bytes()]
