"""attlas doctor: what can't work is said before it is tried."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from obstore.store import MemoryStore

from attlas.extract.store import Storage
from attlas.extract.store.objects import ObjectStorage
from attlas.flows import doctor
from attlas.flows.doctor import Check, check_all
from tests.flows.conftest import Ended

pytestmark = pytest.mark.usefixtures("prefect_environment")


def by_name(out: str | Path | None = None) -> dict[str, Check]:
    return {check.name: check for check in check_all(None if out is None else str(out))}


def test_a_machine_that_can_run_has_no_problem(
    attlas: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    code, out, err = attlas("doctor", tmp_path / "out", "--format", "json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert (code, err) == (0, "")
    assert {
        "attlas",
        "sqlalchemy",
        "fastapi",
        "torch",
        "memory",
        "engine",
        "cache",
        "output",
        "server",
    } <= checks.keys()
    assert {check["state"] for check in checks.values()} <= {"ok", "note"}
    assert checks["attlas"]["found"].startswith(importlib.metadata.version("attlas"))
    assert checks["output"]["found"].startswith(f"{tmp_path}: ")
    assert list(tmp_path.iterdir()) == []
    code, out, _ = attlas("doctor", tmp_path)
    assert code == 0
    assert len(out.splitlines()) == len(checks)


@pytest.mark.parametrize(
    ("package", "version"), [("sqlalchemy", "2.1.0"), ("sqlalchemy", "3.0"), ("fastapi", "0.165.1")]
)
def test_versions_that_break_the_scheduler_are_problems(
    attlas: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, package: str, version: str
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == package else real(name))
    code, out, _ = attlas("doctor")
    assert code == 3
    (line,) = [line for line in out.splitlines() if line.split()[1] == package]
    assert line.startswith("problem ")
    assert f"pip install '{package}<" in line


def test_a_missing_optional_package_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "prefect-dask":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = by_name()["prefect-dask"]
    assert found.state == "note"
    assert "attlas[dask]" in found.found


def test_a_full_disk_and_a_file_in_the_way_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert by_name(tmp_path / "file" / "out")["output"].state == "problem"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    found = by_name(tmp_path)["output"]
    assert (found.state, found.found) == ("problem", f"{tmp_path}: 0.0 GiB free")


class ForgetfulStorage(ObjectStorage):
    """Ignores If-None-Match, as some object stores do."""

    def put_if_absent(self, key: str, content: bytes) -> bool:
        self.put(key, content)
        return True


@pytest.mark.parametrize(("kind", "state"), [(ObjectStorage, "ok"), (ForgetfulStorage, "problem")])
def test_an_object_store_is_tried(monkeypatch: pytest.MonkeyPatch, kind: type[ObjectStorage], state: str) -> None:
    storage = kind(MemoryStore())
    opened: list[Storage] = [storage]
    monkeypatch.setattr("attlas.extract.store.open_storage", lambda _: opened[0])
    found = by_name("s3://bucket/runs")["output"]
    assert found.state == state
    assert list(storage.list()) == []


def test_an_object_store_that_can_t_be_opened_is_a_problem() -> None:
    found = by_name("nothing://bucket")["output"]
    assert found.state == "problem"
    assert "credentials" in found.todo


def scheduler_of(monkeypatch: pytest.MonkeyPatch, deployments: list[Any], runs: list[Any]) -> Check:
    @contextmanager
    def client(**_: Any):
        yield SimpleNamespace(read_deployments=lambda: deployments, read_flow_runs=lambda **_: runs)

    monkeypatch.setattr("prefect.client.orchestration.get_client", client)
    return doctor._scheduler()


def test_a_server_that_never_starts_a_run_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    nightly = SimpleNamespace(id=1, name="nightly", paused=False, schedules=[SimpleNamespace(active=True)])
    paused = SimpleNamespace(id=2, name="paused", paused=True, schedules=[SimpleNamespace(active=True)])
    now = datetime.now(UTC)
    to_come = SimpleNamespace(deployment_id=1, next_scheduled_start_time=now + timedelta(hours=3))
    late = SimpleNamespace(deployment_id=1, next_scheduled_start_time=now - timedelta(hours=3))
    assert scheduler_of(monkeypatch, [], []) == Check("scheduler", "ok", "nothing is scheduled")
    assert scheduler_of(monkeypatch, [nightly, paused], [to_come]).state == "ok"
    dead = scheduler_of(monkeypatch, [nightly, paused], [])
    assert dead.state == "problem"
    assert dead.found.startswith("nightly has a schedule and no run to come")
    idle = scheduler_of(monkeypatch, [nightly], [to_come, late])
    assert idle.state == "problem"
    assert idle.found == "1 scheduled run late: nobody starts them"


def test_a_server_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        found = by_name()["server"]
    assert found.state == "problem"
    assert "does not answer" in found.found or "can't be" in found.found
