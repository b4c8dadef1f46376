"""The folders and digest key of scheduled runs."""

import stat
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("prefect_environment")
MOMENT = datetime(2026, 3, 1, 2, 0, 5, tzinfo=UTC)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "nightly.toml"
    file.write_text('model = "demo"\ncorpus = "demo"\nout = "data"\n')
    return file


def test_each_scheduled_time_has_its_own_folder_in_utc(run_file: Path) -> None:
    from attlas.flows.deploy import run_at
    from attlas.flows.nights import folder_name

    assert run_at(run_file, MOMENT).out == run_file.parent / "data" / "2026-03-01T02-00-05Z"
    assert folder_name(MOMENT.astimezone(timezone(timedelta(hours=5)))) == "2026-03-01T02-00-05Z"
    assert folder_name(MOMENT) < folder_name(MOMENT + timedelta(days=250))


def test_the_key_is_created_once_beside_the_run_file_for_its_owner_only(run_file: Path) -> None:
    from attlas.flows.deploy import run_at

    key = run_at(run_file, MOMENT).digest_key
    assert key is not None
    assert key == run_file.parent / "nightly.digest-key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = key.read_text()
    assert len(bytes.fromhex(secret)) == 32
    assert run_at(run_file, MOMENT + timedelta(days=1)).digest_key == key
    assert key.read_text() == secret


def test_the_key_in_the_run_file_is_used(run_file: Path) -> None:
    from attlas.flows.deploy import run_at

    run_file.write_text(run_file.read_text() + 'digest_key = "own"\n')
    assert run_at(run_file, MOMENT).digest_key == run_file.parent / "own"
    assert not (run_file.parent / "nightly.digest-key").exists()


def test_a_schedule_without_a_server_is_refused(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from attlas.extract.errors import Refusal
    from attlas.flows.deploy import schedule_of, serve

    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(Refusal, match="prefect server start"):
        serve(run_file, schedule_of(cron="0 2 * * *", interval=None, timezone=None))
    assert not (run_file.parent / "nightly.digest-key").exists()
