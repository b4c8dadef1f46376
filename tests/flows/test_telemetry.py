"""Progress for programs: JSON lines, and metrics over HTTP."""

import json
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attlas.extract.errors import Refusal
from attlas.flows.measuring import shown_work, using_display
from attlas.flows.progress import LineDisplay, SilentDisplay, Work, display
from attlas.flows.telemetry import JsonDisplay, MeteredDisplay
from tests.conftest import Ended
from tests.waiting import free_port


@pytest.fixture
def port() -> int:
    return free_port()


def metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_is_json_and_the_last_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with JsonDisplay() as lines:
        lines.stage("plan", 1, None)
        lines.stage("plan", 2, None)  # too soon after the first
        lines.start_measuring(total=Work(2, 20, 2000), before=Work(1, 10, 1000))
        lines.note("a note\nof two lines")
        lines.failed(OSError("the disk is full"))
        lines.advance(Work(1, 10, 1000))
    plan, measuring, note, failed, progress = events(capsys.readouterr().err)
    assert (plan["event"], plan["stage"], plan["done"], plan["total"]) == ("stage", "plan", 1, None)
    assert measuring["before"] == {"shards": 1, "documents": 10, "tokens": 1000}
    assert note["message"] == "a note\nof two lines"
    assert (failed["error"], failed["message"]) == ("OSError", "the disk is full")
    assert (progress["shards"], progress["tokens"], progress["seconds_left"]) == (2, 2000, 0)
    assert progress["tokens_per_second"] > 0 and progress["peak_memory_mib"] > 10
    assert plan["time"].startswith("20") and plan["time"].endswith("+00:00")


def test_metrics_are_those_of_the_run_and_a_failed_attempt_is_taken_back_and_counted(port: int) -> None:
    with using_display(MeteredDisplay(SilentDisplay(), str(port))):
        display.get().start_measuring(total=Work(4, 40, 4000), before=Work(1, 10, 1000))
        with shown_work() as show:
            show(Work(1, 10, 1000))
        with pytest.raises(OSError, match="the disk is full"), shown_work() as show:
            show(Work(0, 5, 500))
            assert metrics(port)["attlas_measured_tokens"] == 2500
            raise OSError("the disk is full")
        found = metrics(port)
    assert [found[f"attlas_planned_{name}"] for name in ("shards", "documents", "tokens")] == [4, 40, 4000]
    assert [found[f"attlas_measured_{name}"] for name in ("shards", "documents", "tokens")] == [2, 20, 2000]
    assert found["attlas_failed_shards_total"] == 1
    assert found["attlas_tokens_per_second"] > 0
    assert found["process_resident_memory_bytes"] > 1 << 20
    with pytest.raises(OSError):  # closed with the display
        metrics(port)


def test_metrics_change_nothing_of_what_is_shown(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for lines in (LineDisplay(), MeteredDisplay(LineDisplay(), f"127.0.0.1:{port}")):
        with lines:
            lines.stage("plan", 1, None)
            lines.note("a note")
            lines.start_measuring(total=Work(1, 1, 1), before=Work())
        shown.append(capsys.readouterr().err)
    assert shown[0] == shown[1] != ""


@pytest.mark.parametrize("address", ["", "0", "65536", "port", "http://x:1", "1:2:3"])
def test_another_address_is_refused(address: str) -> None:
    with pytest.raises(Refusal, match=r"--metrics is PORT or HOST:PORT"):
        MeteredDisplay(SilentDisplay(), address)


def test_an_address_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Refusal, match=r"an address of this machine that is free; .* use another port"):
            MeteredDisplay(SilentDisplay(), str(taken.getsockname()[1]))


def test_errors_are_events_too(attlas: Callable[..., Ended], tmp_path: Path) -> None:
    code, _, err = attlas("--log-format", "json", "info", tmp_path / "nothing")
    (error,) = events(err)
    assert code == error["exit_code"] == 2
    assert error["event"] == "error" and error["message"].startswith("attlas: a dataset is a folder")
    assert attlas("info", tmp_path / "nothing")[2].startswith("attlas: a dataset is a folder")
    code, _, err = attlas("--log-format", "yaml", "info", tmp_path)
    assert code == 2 and "--log-format must be one of text, json; got 'yaml'" in err


def test_a_share_tells_its_progress_in_json(attlas: Callable[..., Ended], model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A few words, and a few more. " * 4)
    given = ["--model", model, "--corpus", tmp_path / "text.txt", "--out", tmp_path / "out", "--max-length", 12]
    code, out, err = attlas("--log-format", "json", "run", *given, "--shards", "1/1", "--engine", "reference")
    assert code == 0 and out.startswith("share 1/1: ")
    told = events("\n".join(line for line in err.splitlines() if line.startswith("{")))
    assert [line["event"] for line in told if line["event"] != "stage"] == ["measuring", "progress"]
    assert told[-1]["tokens"] == next(line["tokens"] for line in told if line["event"] == "measuring")
