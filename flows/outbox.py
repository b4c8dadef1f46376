"""The outbox of a schedule: alerts are written with the result that they are of, and delivered to each sink until it has taken them.

OUT/outbox/<key>.json            an alert, and the sinks that it is for
OUT/outbox/<key>.<sink>.sent     an empty file: the sink has taken it

An alert is known by its key, of the baseline, the current dataset and the finding. Written again it is the same alert, and is not delivered again. A
process that is killed between delivery and note delivers once more; a file has the line once all the same, a webhook gets the key as
`Idempotency-Key`, and Prefect the same event.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attlas.flows.sinks import Sink, SinkFailure

_PAUSES_S = (0.5, 2.0)  # between tries; what fails is tried again next time


@dataclass(frozen=True)
class Alert:
    """What was found of a dataset against its baseline. baseline and current: SHA-256 of their manifests."""

    baseline: str
    current: str
    finding: str
    summary: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """SHA-256 of what the alert is about."""
        about = json.dumps([self.baseline, self.current, self.finding])
        return hashlib.sha256(about.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Outbox:
    """The folder of a schedule's alerts."""

    root: Path

    def add(self, alerts: Sequence[Alert], sinks: Sequence[Sink]) -> list[Alert]:
        """Write alerts for these sinks; returns those that were not there."""
        from attlas.extract.files import put_if_absent

        new = []
        for alert in alerts:
            entry = {"alert": {"key": alert.key, **asdict(alert)}, "sinks": [sink.id for sink in sinks]}
            if put_if_absent(self.root / f"{alert.key}.json", json.dumps(entry, ensure_ascii=False, indent=1).encode()):
                new.append(alert)
        return new

    def deliver(self, sinks: Sequence[Sink], *, pause: Callable[[float], None] = time.sleep) -> list[str]:
        """Deliver what is waiting for these sinks; returns a sentence for each sink that did not take its alerts.

        One process at a time does so; another one leaves it to that.
        """
        from attlas.extract.store.flock import flock

        if not self.root.is_dir():
            return []
        release = flock(self.root / "lock")
        if release is None:
            return []
        try:
            return [problem for sink in sinks for problem in self._deliver_to(sink, pause)]
        finally:
            release()

    def waiting(self, sink: Sink) -> Iterator[Mapping[str, Any]]:
        """The alerts that a sink has not taken, the oldest first. What is damaged is passed over."""
        files = [file for file in self.root.glob("*.json") if not self._note(file.stem, sink).exists()]
        for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name)):
            try:
                entry = json.loads(file.read_bytes())
                is_for_sink, alert = sink.id in entry["sinks"], entry["alert"]
                is_whole = alert["key"] == file.stem
            except (ValueError, KeyError, TypeError):
                continue
            if is_for_sink and is_whole:
                yield alert

    def _deliver_to(self, sink: Sink, pause: Callable[[float], None]) -> Iterator[str]:
        from attlas.extract.files import put_if_absent

        for alert in self.waiting(sink):
            problem = _send(sink, alert, pause)
            if problem is not None:  # a dead sink is not waited for again and again
                yield f"{problem}; its alerts wait in {self.root}"
                return
            put_if_absent(self._note(alert["key"], sink), b"")

    def _note(self, key: str, sink: Sink) -> Path:
        return self.root / f"{key}.{sink.id}.sent"


def _send(sink: Sink, alert: Mapping[str, Any], pause: Callable[[float], None]) -> str | None:
    """Send an alert, with retries; returns what went wrong, or None."""
    problem = ""
    for wait_s in (*_PAUSES_S, None):
        try:
            sink.send(alert)
        except SinkFailure as failure:
            problem = str(failure)
        except Exception as failure:  # a sink never fails the run
            problem = f"{sink.name} has failed ({type(failure).__name__})"
        else:
            return None
        if wait_s is not None:
            pause(wait_s)
    return problem
