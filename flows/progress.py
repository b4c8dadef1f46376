"""Show the progress of a run: stages, documents, tokens per second, time left."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from attlas.extract.printable import printable
from attlas.flows.streams import print_message

STAGES = {
    "server": "starting Prefect's temporary server",
    "model": "loading the model",
    "engine": "compiling the engine, once per machine (about half a minute)",
    "wait": "waiting for the plan, which another process is making",
    "plan": "splitting documents into sequences",
    "means": "averaging what heads and sublayers give over the sample",
    "check": "comparing what is there with its checksums",
    "finish": "writing the manifest",
    "report": "writing the report",
}
_INTERVAL_S = 5.0


@dataclass(frozen=True)
class Work:
    """An amount of work."""

    shards: int = 0
    documents: int = 0
    tokens: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.shards + other.shards, self.documents + other.documents, self.tokens + other.tokens)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.shards - other.shards, self.documents - other.documents, self.tokens - other.tokens)


@dataclass
class Pace:
    """The speed of a run and the time left, without the work that an earlier run has done."""

    total: Work
    before: Work  # done by an earlier run
    clock: Callable[[], float] = time.monotonic
    done: Work = field(init=False)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.done, self.started = self.before, self.clock()

    @property
    def tokens_per_second(self) -> float:
        elapsed = self.clock() - self.started
        return (self.done.tokens - self.before.tokens) / elapsed if elapsed > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        speed = self.tokens_per_second
        return (self.total.tokens - self.done.tokens) / speed if speed > 0 else None

    @property
    def text(self) -> str:
        left = self.seconds_left
        parts = [
            f"{self.done.documents:,} of {self.total.documents:,} documents",
            f"{self.done.tokens:,} of {self.total.tokens:,} tokens",
            f"{self.tokens_per_second:,.0f} tokens/s",
            "" if left is None else f"{duration(left)} left",
        ]
        return ", ".join(part for part in parts if part)


def count_of(number: int, noun: str) -> str:
    """The number with the noun: 1 shard, 2,000 shards."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """A readable duration: 8 s, 3 min 20 s, 2 h 05 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


class Display(AbstractContextManager[Any], Protocol):
    """Shows the progress of a run."""

    def stage(self, name: str, done: int, total: int | None) -> None: ...
    def start_measuring(self, *, total: Work, before: Work) -> None: ...
    def advance(self, work: Work) -> None: ...
    def failed(self, error: BaseException) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class SilentDisplay:
    """Shows nothing. Scheduled runs and workers use Prefect's log instead."""

    def stage(self, name: str, done: int, total: int | None) -> None: ...
    def start_measuring(self, *, total: Work, before: Work) -> None: ...
    def advance(self, work: Work) -> None: ...
    def failed(self, error: BaseException) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PeriodicDisplay(SilentDisplay):
    """Says that a stage begins, and every few seconds, and at its end, how far the measuring is: `_show(pace)` does."""

    def __init__(self) -> None:
        self._stage, self._last = "", 0.0
        self._pace: Pace | None = None

    def start_measuring(self, *, total: Work, before: Work) -> None:
        self._pace = Pace(total, before)

    def advance(self, work: Work) -> None:
        if self._pace is None:
            return
        self._pace.done += work
        if self._is_due() or self._pace.done.shards == self._pace.total.shards:
            self._last = time.monotonic()
            self._show(self._pace)

    def _show(self, pace: Pace) -> None: ...

    def _is_due(self) -> bool:
        return time.monotonic() - self._last >= _INTERVAL_S


class LineDisplay(PeriodicDisplay):
    """Lines on standard error, for logs and pipes: one when a stage begins, then one every few seconds."""

    def stage(self, name: str, done: int, total: int | None) -> None:
        is_complete = total is not None and done >= total
        if name != self._stage or (self._is_due() and not is_complete):
            amount = f": {done:,}" + (f" of {total:,}" if total else "") if done else ""
            self._print(STAGES.get(name, name) + amount)
        self._stage = name

    def start_measuring(self, *, total: Work, before: Work) -> None:
        super().start_measuring(total=total, before=before)
        amounts = ", ".join([count_of(total.documents, "document"), count_of(total.tokens, "token")])
        self._print(f"measuring: {amounts} in {count_of(total.shards, 'shard')}")

    def note(self, text: str) -> None:
        self._print(printable(text))

    def _show(self, pace: Pace) -> None:
        self._print(f"measuring: {pace.text}")

    def _print(self, text: str) -> None:
        self._last = time.monotonic()
        print_message(text)


class BarDisplay(SilentDisplay):
    """Progress bars on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
        )
        self._rows: dict[str, Any] = {}
        self._pace: Pace | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def stage(self, name: str, done: int, total: int | None) -> None:
        if name not in self._rows:
            self._rows[name] = self._bars.add_task(STAGES.get(name, name), total=total, facts="")
        facts = f"{done:,}" if done > 1 else ""
        self._bars.update(self._rows[name], completed=done, total=total, facts=facts)

    def start_measuring(self, *, total: Work, before: Work) -> None:
        self._pace = Pace(total, before)
        self._rows["measure"] = self._bars.add_task("measuring", total=total.tokens, completed=before.tokens, facts="")

    def advance(self, work: Work) -> None:
        if self._pace is not None:
            self._pace.done += work
            self._bars.update(self._rows["measure"], completed=self._pace.done.tokens, facts=self._pace.text)

    def note(self, text: str) -> None:
        self._bars.console.print(printable(text), markup=False, highlight=False)

    def close(self) -> None:
        for row in self._bars.tasks:
            if row.total is None:
                self._bars.update(row.id, total=1, completed=1)
        self._bars.stop()


# a context variable, because Prefect runs tasks in threads with a copy of the flow's context
display: ContextVar[Display] = ContextVar("display", default=SilentDisplay())  # noqa: B039 - it has no state


def display_for_terminal() -> Display:
    """Progress bars if standard error is a terminal, lines otherwise."""
    return BarDisplay() if sys.stderr.isatty() else LineDisplay()
