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
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from attlas.extract.errors import Damaged
from attlas.extract.store import Storage, open_storage
from attlas.flows.places import Place
from attlas.flows.sinks import Sink, SinkFailure

_ENTRY = ".json"
_LOCK = "lock"
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
    """The alerts of a schedule, in a folder or an object store."""

    root: Place

    @cached_property
    def _storage(self) -> Storage:
        return open_storage(self.root)

    def add(self, alerts: Sequence[Alert], sinks: Sequence[Sink]) -> list[Alert]:
        """Write alerts for these sinks; returns those that were not there."""
        new = []
        for alert in alerts:
            entry = {
                "written": datetime.now(UTC).isoformat(),
                "alert": {"key": alert.key, **asdict(alert)},
                "sinks": [sink.id for sink in sinks],
            }
            content = json.dumps(entry, ensure_ascii=False, indent=1).encode()
            if self._storage.put_if_absent(f"{alert.key}{_ENTRY}", content):
                new.append(alert)
        return new

    def deliver(self, sinks: Sequence[Sink], *, pause: Callable[[float], None] = time.sleep) -> list[str]:
        """Deliver what is waiting for these sinks; returns a sentence for each sink that did not take its alerts.

        One process at a time does so; another one leaves it to that. In an object store it can be one that has been killed on another machine,
        so it is said.
        """
        if self._storage.names() is None:
            return []
        release = self._storage.try_lock(_LOCK)
        if release is None:
            return self._held_up() if isinstance(self.root, str) and any(map(self.waiting, sinks)) else []
        try:
            return [problem for sink in sinks for problem in self._deliver_to(sink, pause)]
        finally:
            release()

    def _held_up(self) -> list[str]:
        return [f"alerts wait in {self.root} until {self._storage.lock_holder(_LOCK)} has delivered its own"]

    def waiting(self, sink: Sink) -> list[Mapping[str, Any]]:
        """The alerts that a sink has not taken, the oldest first. What is damaged is passed over."""
        names = set(self._storage.names() or ())
        keys = [name.removesuffix(_ENTRY) for name in names if name.endswith(_ENTRY)]
        entries = [self._entry(key) for key in keys if self._note(key, sink) not in names]
        for_sink = [entry for entry in entries if entry is not None and sink.id in entry["sinks"]]
        return [e["alert"] for e in sorted(for_sink, key=lambda e: (e.get("written", ""), e["alert"]["key"]))]

    def _entry(self, key: str) -> Mapping[str, Any] | None:
        """An alert with its sinks; None if it is damaged."""
        try:
            entry = json.loads(self._storage.get(f"{key}{_ENTRY}") or b"")
            is_whole = entry["alert"]["key"] == key and isinstance(entry["sinks"], list)
        except (ValueError, KeyError, TypeError, Damaged):
            return None
        return entry if is_whole else None

    def _deliver_to(self, sink: Sink, pause: Callable[[float], None]) -> Iterator[str]:
        for alert in self.waiting(sink):
            note = self._note(alert["key"], sink)
            if self._storage.size(note) is not None:  # a store may list it later
                continue
            problem = _send(sink, alert, pause)
            if problem is not None:  # a dead sink is not waited for again and again
                yield f"{problem}; its alerts wait in {self.root}"
                return
            self._storage.put_if_absent(note, b"")

    def _note(self, key: str, sink: Sink) -> str:
        return f"{key}.{sink.id}.sent"


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
