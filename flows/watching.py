"""The nightly comparison: measure what is new, compare it with a pinned baseline, and alert on what has changed."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from attlas.extract.errors import AnotherRun, Refusal
from attlas.flows.config import Run
from attlas.flows.inputs import inputs_digest
from attlas.flows.nights import Nights
from attlas.flows.outbox import Alert, Outbox
from attlas.flows.places import folder_of_schedule
from attlas.flows.sinks import Sink, sink_named

if TYPE_CHECKING:
    from attlas.analysis.compare import Comparison

_EXAMPLES = 5  # rows of an alert, those with the largest effects
_PLACE = ("stack", "layer", "head", "site")
_SHOWN = (*_PLACE, "column", "a", "b", "difference", "low", "high", "q")


class Watch(BaseModel, frozen=True, extra="forbid"):
    """What nights are compared with, and how."""

    baseline: str | None = Field(None, description="DIR or DIR@GENERATION; that of the last time by default")
    accept: bool = Field(False, description="make this night the baseline of the next ones")
    columns: tuple[str, ...] | None = Field(None, description="the columns to compare; all by default")
    margins: tuple[str, ...] = Field((), description="COLUMN=VALUE, the smallest difference that matters")
    alpha: float = Field(0.05, description="the level of tests and of the false discovery rate")
    alerts: tuple[str, ...] = Field((), description="where alerts go: a file, webhook:VARIABLE or prefect")


class Night(BaseModel, frozen=True, arbitrary_types_allowed=True):
    """What a night has found. dataset: the generation that was compared, as DIR@NUMBER; None if nothing is new."""

    message: str
    dataset: str | None = None
    page: Path | None = None
    has_drift: bool = False
    problems: tuple[str, ...] = ()  # with sinks


def watch_night(
    run: Run,
    watch: Watch,
    *,
    folder: Path,
    measure: Callable[[Run], Any],
) -> Night:
    """Measure a run whose output is the folder of this night, compare it with the baseline, and deliver alerts.

    A run on the same model and settings as the last night's makes the next generation of its dataset, another one a dataset of its
    own. Nothing is measured if nothing has changed. folder: to which files of alerts are relative. Raises Refusal.
    """
    night = folder_of_schedule(run.out)
    nights = Nights(night.parent)
    sinks = [sink_named(name, folder=folder) for name in watch.alerts]
    outbox = Outbox(nights.root / "outbox")
    compared_before = nights.baseline
    baseline = _pinned(nights, watch)
    inputs = inputs_digest(run)
    before = nights.unchanged_since(inputs)
    if before is not None and baseline == compared_before and not watch.accept:
        return Night(message=f"nothing is new since {before.name}", problems=tuple(outbox.deliver(sinks)))
    dataset = before or _measured(run, nights, night, measure)
    nights.add(dataset, inputs)
    current = _with_generation(dataset)
    result = _compared(baseline, current, watch, nights, outbox, sinks)
    if watch.accept and nights.is_newest(dataset):
        nights.set_baseline(dataset, int(current.rpartition("@")[2]))
        result = result.model_copy(update={"message": f"{result.message}; it is the baseline from now on"})
    return result


def _pinned(nights: Nights, watch: Watch) -> str | None:
    """The generation to compare with; one that is given is remembered. Raises Refusal if there is none, unless this night is to be it."""
    held = nights.baseline
    if watch.baseline is None or _is_folder_of(watch.baseline, held):
        if held is None and not watch.accept:
            raise Refusal(
                f"a night is compared with a baseline; {nights.root} has none yet; give --baseline DIR, or --accept to make this "
                "night the first"
            )
        return held if held is None else _with_generation(held)
    named = Path(watch.baseline)
    if named.is_symlink():
        raise Refusal(
            f"a baseline is a dataset that stays the same; {named} is a link, which may point elsewhere tomorrow; give {named.resolve()}"
        )
    folder, _, generation = _with_generation(watch.baseline).rpartition("@")
    nights.set_baseline(Path(folder), int(generation))
    return nights.baseline


def _is_folder_of(given: str, held: str | None) -> bool:
    """Whether a baseline that is given without a generation is the one that is held, of whatever generation."""
    return held is not None and Path(given).absolute() == Path(held.rpartition("@")[0]).absolute()


def _with_generation(location: Path | str) -> str:
    """A dataset with the number of the generation that it has now. Raises Refusal if there is none."""
    from attlas.extract.store import generation_of, open_dataset

    storage, manifest = open_dataset(location)
    return f"{storage.place()}@{generation_of(manifest)}"


def _measured(run: Run, nights: Nights, night: Path, measure: Callable[[Run], Any]) -> Path:
    """The dataset of a night: the next generation of the newest one if its run is the same, and this is no late night."""
    finished = nights.finished
    if finished and night not in finished and night.name > finished[-1].name:
        try:
            measure(run.model_copy(update={"out": finished[-1]}))
            return finished[-1]
        except AnotherRun:  # another model or setting
            pass
    measure(run)
    return night


def _compared(
    baseline: str | None, current: str, watch: Watch, nights: Nights, outbox: Outbox, sinks: Sequence[Sink]
) -> Night:
    """Compare a night with the baseline, write alerts and deliver them."""
    name = Path(current).name
    if baseline is None:
        return Night(message=f"{name} is measured", dataset=current, problems=tuple(outbox.deliver(sinks)))
    from attlas.analysis.compare import compare
    from attlas.analysis.comparison_output import save_comparison

    comparison = compare(baseline, current, columns=watch.columns, margins=watch.margins, alpha=watch.alpha)
    page = Path(save_comparison(comparison, current.rpartition("@")[0]))
    changed = comparison.counts()["changed"]
    message = f"{name} against {Path(baseline).name}: {changed:,} of {comparison.rows.height:,} changed"
    dataset = Path(current.rpartition("@")[0])
    if nights.is_newest(dataset):
        outbox.add(list(_alerts(baseline, current, comparison, page)), sinks)
    else:
        message += "; it is late, and a later night stands: no alert"
    problems = tuple(outbox.deliver(sinks))
    return Night(message=message, dataset=current, page=page, has_drift=comparison.has_drift, problems=problems)


def _alerts(baseline: str, current: str, comparison: "Comparison", page: Path) -> Iterator[Alert]:
    """An alert for heads, for sites of the residual stream and for layers if some have changed, and for each defect that is new."""
    import polars as pl

    digests = (_digest(baseline), _digest(current))
    names = {"baseline": Path(baseline).name, "current": Path(current).name, "page": str(page)}
    is_head, is_site = pl.col("head").is_not_null(), pl.col("site").is_not_null()
    for what, chosen in {"heads": is_head, "sites": is_site, "layers": ~is_head & ~is_site}.items():
        rows = comparison.rows.filter(chosen)
        changed = rows.filter(verdict="changed")
        if changed.height:
            places = changed.group_by(_PLACE, maintain_order=True).len("columns")
            of = rows.select(_PLACE).n_unique()
            listed = ", ".join(_place_name(row) for row in places.head(_EXAMPLES).to_dicts())
            more = f" and {places.height - _EXAMPLES} more" if places.height > _EXAMPLES else ""
            summary = f"{places.height:,} of {of:,} {what} changed: {listed}{more}"
            largest = changed.head(_EXAMPLES).select(_SHOWN).fill_nan(None).to_dicts()
            yield Alert(*digests, f"drift: {what}", summary, {**names, "places": places.to_dicts(), "largest": largest})
    before, after = _defects(baseline), _defects(current)
    for rule, found in after.items():
        if found > before.get(rule, 0):
            summary = f"{rule}: {found:,}, in the baseline {before.get(rule, 0):,}"
            yield Alert(*digests, f"defect: {rule}", summary, {**names, "found": found})


def _place_name(row: dict[str, Any]) -> str:
    """A place and the number of its columns that have changed."""
    head = "" if row["head"] is None else f"H{row['head']}"
    site = "" if row["site"] is None else f" {row['site']}"
    return f"{row['stack']} L{row['layer']}{head}{site} ({row['columns']:,} columns)"


def _defects(location: str) -> dict[str, int]:
    """How much each rule of defects finds in a dataset."""
    from attlas.analysis.dataset import Dataset
    from attlas.analysis.judge import judge

    rules = judge(Dataset.open(location)).rules
    return {row["name"]: row["found"] or 0 for row in rules.to_dicts() if row["type"] == "defect"}


def _digest(location: str) -> str:
    """SHA-256 of the manifest of a generation: the same dataset has the same, wherever and whenever it was measured."""
    from attlas.extract.store import open_dataset
    from attlas.extract.store.sealed import as_json

    return hashlib.sha256(as_json(open_dataset(location)[1])).hexdigest()


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
