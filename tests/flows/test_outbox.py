"""Alerts: written once by their key, delivered to every sink until it has taken them, and never in the way of a run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attlas.extract.errors import Refusal
from attlas.flows.outbox import Alert, Outbox
from attlas.flows.sinks import FileSink, SinkFailure, sink_named
from tests.flows.webhook import Hook, started_hook

FIRST = Alert("a" * 64, "b" * 64, "drift: heads", "2 of 72 heads changed: …", {"places": []})
SECOND = Alert("a" * 64, "b" * 64, "drift: sites", "1 of 12 sites changed: …")


@pytest.fixture
def hook() -> Iterator[Hook]:
    with started_hook(lambda: 200) as hook:
        yield hook


def answer_with(hook: Hook, *statuses: int) -> None:
    """Answer with these statuses, one after the other, and then with 200."""
    waiting = iter(statuses)
    hook.status = lambda: next(waiting, 200)


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox")


def no_pause(_: float) -> None:
    """Waits for nothing."""


def test_an_alert_is_delivered_once_to_each_sink_however_often_it_is_written(
    outbox: Outbox, hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", hook.address)
    sinks = [sink_named("alerts.jsonl", folder=tmp_path), sink_named("webhook:HOOK", folder=tmp_path)]
    assert outbox.add([FIRST, SECOND], sinks) == [FIRST, SECOND]
    for _ in range(3):
        assert outbox.deliver(sinks, pause=no_pause) == []
        assert outbox.add([FIRST, SECOND], sinks) == []
    lines = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert sorted(line["finding"] for line in lines) == ["drift: heads", "drift: sites"]
    assert hook.received == lines
    assert hook.keys == [line["key"] for line in lines]


def test_another_dataset_or_finding_is_another_alert() -> None:
    keys = {
        FIRST.key,
        SECOND.key,
        Alert("c" * 64, FIRST.current, FIRST.finding, "").key,
        Alert(FIRST.baseline, "c" * 64, FIRST.finding, "").key,
    }
    assert len(keys) == 4
    assert Alert(FIRST.baseline, FIRST.current, FIRST.finding, "in other words").key == FIRST.key


@pytest.mark.parametrize("failures", [[500], [503, 429], [302], [404, 404]])
def test_a_failed_delivery_is_tried_again_after_a_pause(
    outbox: Outbox, hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: list[int]
) -> None:
    monkeypatch.setenv("HOOK", hook.address)
    answer_with(hook, *failures)
    pauses: list[float] = []
    sink = sink_named("webhook:HOOK", folder=tmp_path)
    outbox.add([FIRST], [sink])
    assert outbox.deliver([sink], pause=pauses.append) == []
    assert len(hook.received) == 1 and len(pauses) == len(failures)
    assert pauses == sorted(pauses) and pauses[0] > 0


def test_a_redirect_is_a_failure_and_is_not_followed(
    hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", hook.address)
    answer_with(hook, 302)
    with pytest.raises(SinkFailure, match="webhook:HOOK answers with status 302"):
        sink_named("webhook:HOOK", folder=tmp_path).send({"key": "x"})
    assert hook.received == []


def test_a_dead_sink_keeps_its_alerts_for_the_next_time_and_the_others_get_theirs(
    outbox: Outbox, hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEAD", "http://127.0.0.1:9/secret-path")
    file, dead = (sink_named(name, folder=tmp_path) for name in ("alerts.jsonl", "webhook:DEAD"))
    outbox.add([FIRST, SECOND], [dead, file])
    problems = outbox.deliver([dead, file], pause=no_pause)
    assert len(problems) == 1 and problems[0].startswith(
        "webhook:DEAD does not answer (ConnectError); its alerts wait in "
    )
    assert "secret-path" not in problems[0]
    assert len((tmp_path / "alerts.jsonl").read_text().splitlines()) == 2
    monkeypatch.setenv("DEAD", hook.address)
    alive = sink_named("webhook:DEAD", folder=tmp_path)
    assert outbox.deliver([alive, file], pause=no_pause) == []
    assert sorted(alert["finding"] for alert in hook.received) == ["drift: heads", "drift: sites"]
    assert len((tmp_path / "alerts.jsonl").read_text().splitlines()) == 2


def test_a_sink_that_is_added_later_gets_no_old_alerts(outbox: Outbox, tmp_path: Path) -> None:
    first, later = (sink_named(name, folder=tmp_path) for name in ("a.jsonl", "b.jsonl"))
    outbox.add([FIRST], [first])
    outbox.deliver([first, later])
    outbox.add([SECOND], [first, later])
    outbox.deliver([first, later])
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 1


def test_a_process_killed_between_delivery_and_note_writes_no_line_twice(outbox: Outbox, tmp_path: Path) -> None:
    sink = sink_named("alerts.jsonl", folder=tmp_path)
    outbox.add([FIRST], [sink])
    outbox.deliver([sink])
    for note in outbox.root.glob("*.sent"):
        note.unlink()
    outbox.deliver([sink])
    assert len((tmp_path / "alerts.jsonl").read_text().splitlines()) == 1


def test_a_sink_of_any_fault_does_not_stop_the_others(outbox: Outbox, tmp_path: Path) -> None:
    class Broken(FileSink):
        def send(self, alert: Any) -> None:
            raise RuntimeError("a secret")

    broken, file = Broken("broken", tmp_path / "x"), sink_named("alerts.jsonl", folder=tmp_path)
    outbox.add([FIRST], [broken, file])
    (problem,) = outbox.deliver([broken, file], pause=no_pause)
    assert problem.startswith("broken has failed (RuntimeError)") and "secret" not in problem
    assert (tmp_path / "alerts.jsonl").exists()


def test_damaged_entries_are_passed_over(outbox: Outbox, tmp_path: Path) -> None:
    sink = sink_named("alerts.jsonl", folder=tmp_path)
    outbox.add([FIRST], [sink])
    for number, content in enumerate((b"", b"[]", b"\xff", b'{"sinks": [], "alert": {}}')):
        (outbox.root / f"{number}.json").write_bytes(content)
    assert outbox.deliver([sink]) == []
    assert len((tmp_path / "alerts.jsonl").read_text().splitlines()) == 1


def test_a_file_that_cannot_be_written_is_a_failure_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkFailure, match=r"^file/alerts\.jsonl can't be written: "):
        sink_named("file/alerts.jsonl", folder=tmp_path).send({"key": "x"})


@pytest.mark.parametrize(
    ("name", "address", "words"),
    [
        ("", None, "got nothing"),
        ("https://example.org/secret", None, "got an address; export it under a name"),
        ("webhook:", None, "'' is none that is set"),
        ("webhook:NOWHERE", None, "'NOWHERE' is none that is set"),
        ("webhook:A B", None, "'A B' is none that is set"),
        ("webhook:HOOK", "http://example.org/secret", "https://…, or http:// on this machine; that in HOOK is not"),
        ("webhook:HOOK", "file:///etc/secret", "that in HOOK is not"),
        ("webhook:HOOK", "https://[secret", "that in HOOK is not"),
        (".", None, "is a folder; give a file in it"),
    ],
)
def test_a_sink_that_cannot_be_is_refused_without_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, address: str | None, words: str
) -> None:
    if address is not None:
        monkeypatch.setenv("HOOK", address)
    with pytest.raises(Refusal) as caught:
        sink_named(name, folder=tmp_path)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
