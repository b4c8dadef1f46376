"""Progress for programs: a line of JSON for each event, and metrics that Prometheus reads."""

import json
import re
import resource
import sys
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from attlas.extract.errors import Refusal
from attlas.flows.progress import Display, Pace, PeriodicDisplay, SilentDisplay, Work
from attlas.flows.streams import print_message

_ADDRESS = re.compile(r"(?:(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):)?(?P<port>\d{1,5})", re.ASCII)
_MIB = 1 << 20
_UNIT_OF_MAXRSS = 1 if sys.platform == "darwin" else 1024  # bytes


def event(name: str, **facts: Any) -> str:
    """An event as a line of JSON."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "event": name, **facts}, ensure_ascii=False)


class JsonDisplay(PeriodicDisplay):
    """A line of JSON on standard error for each event: `stage`, `measuring`, `progress`, `failed`, `note`."""

    def stage(self, name: str, done: int, total: int | None) -> None:
        if name != self._stage or self._is_due():
            self._print("stage", stage=name, done=done, total=total)
        self._stage = name

    def start_measuring(self, *, total: Work, before: Work) -> None:
        super().start_measuring(total=total, before=before)
        self._print("measuring", **_amounts(total), before=_amounts(before))

    def failed(self, error: BaseException) -> None:
        self._print("failed", error=type(error).__name__, message=str(error))

    def note(self, text: str) -> None:
        self._print("note", message=text)

    def _show(self, pace: Pace) -> None:
        left = pace.seconds_left
        self._print(
            "progress",
            **_amounts(pace.done),
            tokens_per_second=round(pace.tokens_per_second, 1),
            seconds_left=None if left is None else round(left),
            peak_memory_mib=round(peak_memory() / _MIB),
        )

    def _print(self, name: str, **facts: Any) -> None:
        self._last = time.monotonic()
        print_message(event(name, **facts))


class MeteredDisplay(SilentDisplay):
    """Shows progress on another display, and keeps it as metrics, which an HTTP server gives to Prometheus."""

    def __init__(self, shown: Display, address: str) -> None:
        """address: PORT, for this machine alone, or HOST:PORT. Raises Refusal."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, start_http_server

        found = _ADDRESS.fullmatch(address)
        if found is None or not 0 < int(found["port"]) < 1 << 16:
            raise Refusal(f"--metrics is PORT or HOST:PORT; got {address!r}; use 9100, for example")
        self._shown = shown
        self._pace: Pace | None = None
        registry, names = CollectorRegistry(), ("shards", "documents", "tokens")
        ProcessCollector(registry=registry)  # memory and processor time
        self._planned = {
            name: Gauge(f"attlas_planned_{name}", f"{name} of the run", registry=registry) for name in names
        }
        self._measured = {
            name: Gauge(f"attlas_measured_{name}", f"{name} that are measured", registry=registry) for name in names
        }
        self._speed = Gauge("attlas_tokens_per_second", "mean speed of this process", registry=registry)
        self._left = Gauge("attlas_seconds_left", "time left at this speed", registry=registry)
        self._failures = Counter("attlas_failed_shards", "attempts at a shard that have failed", registry=registry)
        try:
            host = (found["host"] or "127.0.0.1").strip("[]")
            self._server, _ = start_http_server(int(found["port"]), addr=host, registry=registry)
        except OSError as error:
            raise Refusal(
                f"metrics are served at an address of this machine that is free; {address}: {error.strerror or error}; use another port"
            ) from error

    def stage(self, name: str, done: int, total: int | None) -> None:
        self._shown.stage(name, done, total)

    def start_measuring(self, *, total: Work, before: Work) -> None:
        self._pace = Pace(total, before)
        for name, amount in _amounts(total).items():
            self._planned[name].set(amount)
        self._update()
        self._shown.start_measuring(total=total, before=before)

    def advance(self, work: Work) -> None:
        if self._pace is not None:
            self._pace.done += work
            self._update()
        self._shown.advance(work)

    def failed(self, error: BaseException) -> None:
        self._failures.inc()
        self._shown.failed(error)

    def note(self, text: str) -> None:
        self._shown.note(text)

    def close(self) -> None:
        self._shown.close()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        self._shown.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.__exit__(kind, error, trace)
        self.close()

    def _update(self) -> None:
        assert self._pace is not None, "the run measures"
        for name, amount in _amounts(self._pace.done).items():
            self._measured[name].set(amount)
        self._speed.set(self._pace.tokens_per_second)
        self._left.set(self._pace.seconds_left or 0.0)


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT_OF_MAXRSS


def _amounts(work: Work) -> dict[str, int]:
    return {"shards": work.shards, "documents": work.documents, "tokens": work.tokens}
