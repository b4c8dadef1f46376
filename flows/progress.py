"""What a run shows while it works: stages, documents, tokens per second, time left."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from extract.printable import printable
from flows.streams import say

STAGES = {
    "server": "starting Prefect's temporary server",
    "model": "loading the model",
    "engine": "compiling the engine, once per machine (about half a minute)",
    "plan": "cutting documents into sequences",
    "check": "checking what an earlier run left",
    "finish": "writing the manifest",
    "report": "writing the report",
}
_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class Work:
    """How much there is, or how much of it is done."""

    shards: int = 0
    documents: int = 0
    tokens: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.shards + other.shards, self.documents + other.documents, self.tokens + other.tokens)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.shards - other.shards, self.documents - other.documents, self.tokens - other.tokens)


@dataclass
class Pace:
    """Work done since a moment, and from it the speed and the time left; work of an earlier run is not speed."""

    total: Work
    before: Work
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


def counted(number: int, noun: str) -> str:
    """1 shard, 2,000 shards."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """A length of time for people: 8 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Display(AbstractContextManager[Any], Protocol):
    """Where a run's progress goes."""

    def stage(self, name: str, done: int, total: int | None) -> None: ...
    def measuring(self, *, total: Work, before: Work) -> None: ...
    def advance(self, work: Work) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class Silence:
    """Shows nothing: scheduled runs and workers speak through Prefect's log."""

    def stage(self, name: str, done: int, total: int | None) -> None: ...
    def measuring(self, *, total: Work, before: Work) -> None: ...
    def advance(self, work: Work) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Lines(Silence):
    """Plain lines on standard error, for logs and pipes: a line when a stage begins, then one every few seconds."""

    def __init__(self) -> None:
        self._stage, self._last, self._pace = "", 0.0, None

    def stage(self, name: str, done: int, total: int | None) -> None:
        finished = total is not None and done >= total
        if name != self._stage or (self._due() and not finished):
            reached = f": {done:,}" + (f" of {total:,}" if total else "") if done else ""
            self._say(STAGES.get(name, name) + reached)
        self._stage = name

    def measuring(self, *, total: Work, before: Work) -> None:
        self._pace = Pace(total, before)
        amounts = ", ".join([counted(total.documents, "document"), counted(total.tokens, "token")])
        self._say(f"measuring: {amounts} in {counted(total.shards, 'shard')}")

    def advance(self, work: Work) -> None:
        if self._pace is None:
            return
        self._pace.done += work
        if self._due() or self._pace.done.shards == self._pace.total.shards:
            self._say(f"measuring: {self._pace.text}")

    def note(self, text: str) -> None:
        self._say(printable(text))

    def _due(self) -> bool:
        return time.monotonic() - self._last >= _LINE_EVERY_S

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        say(text)


class Bars(Silence):
    """Bars on a terminal."""

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

    def measuring(self, *, total: Work, before: Work) -> None:
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


# a context variable, since Prefect's task threads run in a copy of the flow's context
display: ContextVar[Display] = ContextVar("display", default=Silence())  # noqa: B039 - Silence holds nothing


def display_for_terminal() -> Display:
    """Bars where somebody watches, plain lines otherwise."""
    return Bars() if sys.stderr.isatty() else Lines()
