"""The nightly comparison: measure what is new, compare it with a pinned baseline, and alert on what has changed."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from attlas.extract.errors import AnotherRun, Refusal, first_line
from attlas.flows.config import Run
from attlas.flows.inputs import inputs_digest
from attlas.flows.interrupts import Stopped
from attlas.flows.nights import Generation, Nights
from attlas.flows.outbox import Alert, Outbox
from attlas.flows.places import Place, absolute, inside, name_of_place, place_named
from attlas.flows.sinks import Sink, sink_named

FAILED_NIGHT = "failed night"
_CHANGES_SHOWN = 50


class Watch(BaseModel, frozen=True, extra="forbid"):
    """What nights are compared with, and how."""

    baseline: str | None = Field(None, description="DIR or DIR@GENERATION; that of the last time by default")
    accept: bool = Field(False, description="make this night the baseline of the next ones")
    columns: tuple[str, ...] | None = Field(None, description="the columns to compare; all by default")
    margins: tuple[str, ...] = Field((), description="COLUMN=VALUE, the smallest difference that matters")
    alpha: float = Field(0.05, description="the level of tests and of the false discovery rate")
    alerts: tuple[str, ...] = Field((), description="where alerts go: a file, webhook:VARIABLE or prefect")


@dataclass(frozen=True)
class Night:
    """What a night has found.

    dataset: the generation that was compared; None if nothing is new. changed: the rows of the comparison that changed most. problems: with sinks and
    the clock.
    """

    message: str
    dataset: Generation | None = None
    page: Path | str | None = None
    changed: Sequence[Mapping[str, Any]] = ()
    has_drift: bool = False
    problems: tuple[str, ...] = ()


def watch_night(
    run: Run,
    watch: Watch,
    *,
    folder: Path,
    measure: Callable[[Run], Any],
) -> Night:
    """Measure a run whose output is the place of this night, compare it with the baseline, and deliver alerts.

    A run on the same model and settings as the last night's makes the next generation of its dataset, another one a dataset of its
    own. Nothing is measured if nothing has changed. folder: to which files of alerts are relative. Raises Refusal. A night that fails is an alert, too.
    """
    nights = Nights.of(run)
    sinks = [sink_named(name, folder=folder) for name in watch.alerts]
    held = _held(nights, watch)
    baseline = _pinned(nights, watch, held)
    watching = _Watching(run, watch, nights, Outbox(inside(nights.root, "outbox")), sinks, baseline)
    try:
        found = watching.night(measure, is_other_baseline=baseline != held)
    except Stopped:  # by Ctrl-C
        raise
    except Exception as error:
        with suppress(OSError):  # of a store that is gone
            watching.tell_of_failure(error)
        raise
    return replace(found, problems=(*watching.deliver(), *nights.problems()))


@dataclass(frozen=True)
class _Watching:
    """A night, what it is compared with, and where its alerts go."""

    run: Run
    watch: Watch
    nights: Nights
    outbox: Outbox
    sinks: Sequence[Sink]
    baseline: Generation | None

    def night(self, measure: Callable[[Run], Any], *, is_other_baseline: bool) -> Night:
        nights, inputs = self.nights, inputs_digest(self.run)
        before = nights.unchanged_since(inputs)
        if before is not None and not is_other_baseline and not self.watch.accept:
            return Night(message=f"nothing is new since {name_of_place(before)}")
        missed = self._missed_comparison()
        dataset = before or self._measured(measure)
        nights.add(dataset, None)
        current = Generation.now(dataset)
        result = missed if missed is not None and missed.dataset == current else self._compared(current)
        if missed is not None and missed is not result:
            result = replace(result, message=f"{result.message}; made up for: {missed.message}")
        # not before: after a kill in between, the next night compares instead of finding nothing new
        nights.add(dataset, inputs)
        if self.watch.accept and nights.is_newest(dataset):
            nights.set_baseline(current)
            result = replace(result, message=f"{result.message}; it is the baseline from now on")
        return result

    def _missed_comparison(self) -> Night | None:
        """The comparison of the newest dataset, if a night that was killed has left it without one; tonight's may be another dataset."""
        newest = None if self.baseline is None else self.nights.newest
        current = None if newest is None else Generation.now(newest)
        if current is None or current == self.baseline or self.nights.is_compared(current):
            return None
        try:
            return self._compared(current)
        except (Refusal, OSError) as error:  # tonight's is measured all the same
            self.tell_of_failure(error, night=current.dataset)
            return None

    def _measured(self, measure: Callable[[Run], Any]) -> Place:
        """The dataset of a night: the next generation of the newest one if its run is the same, and this is no late night."""
        run, newest = self.run, self.nights.newest
        if newest is not None and newest != run.out and self.nights.is_newest(run.out):
            try:
                measure(run.model_copy(update={"out": newest}))
                return newest
            except AnotherRun:  # another model or setting
                pass
        measure(run)
        return run.out

    def _compared(self, current: Generation) -> Night:
        """Compare a dataset with the baseline, and write alerts."""
        if self.baseline is None:
            return Night(message=f"{current.name} is measured", dataset=current)
        from attlas.analysis.compare import CHANGED, compare
        from attlas.analysis.comparison_output import save_comparison
        from attlas.analysis.dataset import Dataset
        from attlas.analysis.drift import find_drift

        watch, old, new = self.watch, Dataset.open(str(self.baseline)), Dataset.open(str(current))
        comparison = compare(old, new, columns=watch.columns, margins=watch.margins, alpha=watch.alpha)
        page = save_comparison(comparison, current.dataset)
        changed = comparison.rows.filter(verdict=CHANGED)
        message = (
            f"{current.name} against {self.baseline.name}: {changed.height:,} of {comparison.rows.height:,} changed"
        )
        if self.nights.is_newest(current.dataset):
            digests = (digest_of(old.manifest), digest_of(new.manifest))
            names = {"baseline": self.baseline.name, "current": current.name, "page": str(page)}
            found = find_drift(comparison, old, new)
            self._write([Alert(*digests, drift.name, drift.summary, names | dict(drift.details)) for drift in found])
            self.nights.note_compared(current)
        else:
            message += "; it is late, and a later night stands: no alert"
        largest = changed.head(_CHANGES_SHOWN).to_dicts()
        return Night(message, current, page, changed=largest, has_drift=comparison.has_drift)

    def tell_of_failure(self, error: Exception, *, night: Place | None = None) -> None:
        """Alert that a night failed, tonight by default: once for the same reason, until a night has succeeded."""
        reason = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {first_line(error)}"
        since = hashlib.sha256(f"{self.nights.last_success} {reason}".encode()).hexdigest()
        details = {"night": name_of_place(night or self.run.out)}
        self._write([Alert(str(self.baseline), since, FAILED_NIGHT, reason, details)])
        self.deliver()

    def _write(self, alerts: Sequence[Alert]) -> None:
        self.outbox.add(alerts, self.sinks)

    def deliver(self) -> list[str]:
        """Deliver what waits; returns what is wrong with the sinks."""
        return self.outbox.deliver(self.sinks)


def _held(nights: Nights, watch: Watch) -> Generation | None:
    """The baseline of the last time. Raises Refusal if its note is damaged, unless another one is given."""
    try:
        return nights.baseline
    except Refusal:
        if watch.baseline is None:
            raise
        return None


def _pinned(nights: Nights, watch: Watch, held: Generation | None) -> Generation | None:
    """What to compare with; one that is given is remembered. Raises Refusal if there is none, unless this night is to be it."""
    if watch.baseline is None or _is_dataset_of(watch.baseline, held):
        if held is None and not watch.accept:
            raise Refusal(
                f"a night is compared with a baseline; {nights.root} has none yet; give --baseline DIR, or --accept to make this "
                "night the first"
            )
        return held if held is None else Generation.now(str(held))
    named = Path(watch.baseline)
    if named.is_symlink():
        raise Refusal(
            f"a baseline is a dataset that stays the same; {named} is a link, which may point elsewhere tomorrow; give {named.resolve()}"
        )
    nights.set_baseline(Generation.now(watch.baseline))
    return nights.baseline


def _is_dataset_of(given: str, held: Generation | None) -> bool:
    """Whether a baseline that is given without a generation is the one that is held, of whatever generation."""
    return held is not None and absolute(place_named(given)) == absolute(held.dataset)


def digest_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest: the same dataset has the same, wherever and whenever it was measured."""
    from attlas.extract.store.sealed import as_json

    return hashlib.sha256(as_json(manifest)).hexdigest()


def night_named(text: str | None) -> datetime:
    """The time of a night, such as 2026-11-20 or 2026-11-20T02:00; now by default. Times without a zone are UTC. Raises Refusal."""
    now = datetime.now(UTC)
    if text is None:
        return now
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise Refusal(
            f"--night is a time such as 2026-11-20 or 2026-11-20T02:00; got {text!r}; write it like that"
        ) from None
    time = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    if time > now:
        raise Refusal(f"--night is a night that has been; got {text!r}, which is to come; give an earlier time")
    return time
