"""Schedules whose datasets and corpus are in an object store."""

import json
from pathlib import Path

import pytest

from attlas.extract.errors import Refusal
from attlas.extract.store import open_storage
from attlas.flows.outbox import Alert, Outbox
from attlas.flows.sinks import sink_named
from tests.flows.test_watching import House, new_house
from tests.object_store.proxy import Proxy

ALERT = Alert("a" * 64, "b" * 64, "drift: heads", "2 of 72 heads changed: …")


@pytest.fixture
def house(model: Path, tmp_path: Path, url: str) -> House:
    return new_house(model, tmp_path, url)


def test_nights_are_measured_compared_told_and_kept_as_in_a_folder(
    house: House, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refusal, match=f"{url}/nights has none yet; give --baseline DIR, or --accept"):
        house.night(0)
    first = house.night(0, accept=True)
    assert first.message == "2026-03-01T02-00-00Z@1 is measured; it is the baseline from now on"
    with monkeypatch.context() as patch:
        patch.setattr(House, "_measure", None)
        assert house.night(1).message == "nothing is new since 2026-03-01T02-00-00Z"
    house.add(100)
    grown = house.night(1)
    assert str(grown.dataset) == f"{url}/nights/2026-03-01T02-00-00Z@2" and not grown.has_drift
    assert grown.page == f"{url}/nights/2026-03-01T02-00-00Z/comparison.html"
    assert str(house.nights.baseline) == f"{url}/nights/2026-03-01T02-00-00Z@1"
    house.perturb()
    drifted = house.night(3)
    assert str(drifted.dataset) == f"{url}/nights/2026-03-04T02-00-00Z@1" and drifted.has_drift
    told = house.alerts
    assert "drift: heads" in {alert["finding"] for alert in told}
    house.perturb()
    late = house.night(2)
    assert late.message.endswith("; it is late, and a later night stands: no alert") and house.alerts == told
    nights = open_storage(f"{url}/nights")
    assert nights.get("latest") == b"2026-03-04T02-00-00Z\n"
    assert house.nights.keep(1) == [f"{url}/nights/2026-03-03T02-00-00Z"]  # the baseline stays
    assert list(nights.list("2026-03-03T02-00-00Z")) == []
    assert house.nights.finished == [f"{url}/nights/2026-03-0{day}T02-00-00Z" for day in (1, 4)]


def test_a_document_that_is_written_anew_is_new_although_its_size_is_the_same(house: House, url: str) -> None:
    house.night(0, accept=True)
    storage = open_storage(f"{url}/corpus")
    content = storage.get("3.txt") or b""
    storage.put("3.txt", content.replace(b"moon", b"star"))
    assert house.night(1).dataset is not None


def test_alerts_of_a_flaky_store_are_delivered_once(proxy: Proxy, url: str, tmp_path: Path) -> None:
    proxy.rate, proxy.seed, proxy.list_delay_s = 0.3, 5, 0.2
    proxy.faults = ("500 before", "500 after", "503 before", "reset after", "answer cut off")
    outbox, sink = Outbox(f"{url}/outbox"), sink_named("alerts.jsonl", folder=tmp_path)
    alerts = [Alert("a" * 64, f"{number:064}", "drift: heads", f"night {number}") for number in range(20)]
    for alert in alerts:
        assert outbox.add([alert], [sink]) == [alert]
        assert outbox.add([alert], [sink]) == []
        assert outbox.deliver([sink]) == []
    proxy.rate = 0
    assert Outbox(outbox.root).deliver([sink]) == []
    lines = (tmp_path / "alerts.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["summary"] for line in lines) == sorted(alert.summary for alert in alerts)
    assert sum(proxy.injected.values()) > 20


def test_alerts_that_a_killed_process_of_another_machine_holds_up_are_told_of(url: str, tmp_path: Path) -> None:
    outbox, sink = Outbox(f"{url}/outbox"), sink_named("alerts.jsonl", folder=tmp_path)
    outbox.add([ALERT], [sink])
    storage = open_storage(outbox.root)
    storage.put("lock", b"elsewhere 7 0123456789abcdef")
    assert outbox.deliver([sink]) == [
        f"alerts wait in {url}/outbox until another process (pid 7 on elsewhere; if it was killed, delete {url}/outbox/lock) "
        "has delivered its own"
    ]
    assert not (tmp_path / "alerts.jsonl").exists()
    storage.delete("lock")
    assert outbox.deliver([sink]) == []
    assert len((tmp_path / "alerts.jsonl").read_text().splitlines()) == 1
