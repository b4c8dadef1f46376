"""The progress of a run: bars on a terminal, lines elsewhere."""

import io

import pytest

from attlas.flows.progress import BarDisplay, LineDisplay, Pace, Work, display_for_terminal, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_work_of_an_earlier_run_does_not_count_as_speed() -> None:
    clock = Clock()
    pace = Pace(Work(4, 40, 4000), Work(2, 20, 2000), clock)
    pace.done += Work(1, 10, 1000)
    clock.now = 10.0
    assert (pace.tokens_per_second, pace.seconds_left) == (100.0, 10.0)
    assert pace.text == "30 of 40 documents, 3,000 of 4,000 tokens, 100 tokens/s, 10 s left"


def test_the_time_left_is_unknown_at_the_start() -> None:
    pace = Pace(Work(1, 1, 10), Work(), Clock())
    assert pace.seconds_left is None
    assert "left" not in pace.text


def test_lines_show_each_stage_once_and_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with LineDisplay() as lines:
        lines.stage("model", 0, None)
        lines.stage("model", 1, 1)
        lines.stage("plan", 12, None)
        lines.start_measuring(total=Work(2, 3, 300), before=Work())
        lines.advance(Work(1, 1, 100))
        lines.advance(Work(1, 2, 200))
    lines_shown = capsys.readouterr().err.splitlines()
    assert lines_shown[:3] == [
        "loading the model",
        "splitting documents into sequences: 12",
        "measuring: 3 documents, 300 tokens in 2 shards",
    ]
    assert len(lines_shown) == 4
    assert lines_shown[3].startswith("measuring: 3 of 3 documents, 300 of 300 tokens, ")


def test_amounts_of_one_are_in_the_singular(capsys: pytest.CaptureFixture[str]) -> None:
    with LineDisplay() as lines:
        lines.start_measuring(total=Work(1, 1, 1), before=Work())
        lines.start_measuring(total=Work(2, 1000, 0), before=Work())
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 1 document, 1 token in 1 shard",
        "measuring: 1,000 documents, 0 tokens in 2 shards",
    ]


def test_bars_show_documents_tokens_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with BarDisplay() as bars:
        bars.stage("model", 0, None)
        bars.start_measuring(total=Work(2, 3, 300), before=Work())
        bars.advance(Work(1, 2, 200))
        bars.note("a note with [brackets]")
    output = screen.getvalue()
    assert "loading the model" in output
    assert "2 of 3 documents, 200 of 300 tokens" in output
    assert "a note with [brackets]" in output


def test_without_a_terminal_progress_is_lines() -> None:
    assert isinstance(display_for_terminal(), LineDisplay)
