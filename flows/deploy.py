"""Scheduled runs: the same flow, started by a Prefect server, with a new dataset each time."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import available_timezones

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from attlas.extract.corpus.stored import UnreadableStore
from attlas.extract.errors import Refusal, first_line
from attlas.flows.api import refuse_unreachable_server
from attlas.flows.checks import refuse_bad_paths
from attlas.flows.config import Run
from attlas.flows.nights import Nights, run_at
from attlas.flows.places import name_of_place
from attlas.flows.sinks import sink_named
from attlas.flows.watching import Watch

if TYPE_CHECKING:
    from prefect.schedules import Schedule


def run_name() -> str:
    """The name of a scheduled run: its run file and its time, in UTC."""
    time = flow_run.scheduled_start_time.astimezone(UTC)
    return f"{Path(flow_run.parameters['run_file']).stem} {time:%Y-%m-%d %H:%M:%S}"


@flow(name="attlas-scheduled", flow_run_name=run_name)
def scheduled(run_file: Path, keep: int | None = None, watch: Watch | None = None) -> "State[Any]":
    """Run the current run file, into a folder named after the scheduled time, unless nothing has changed since the last run.

    keep: how many datasets to keep; all by default. watch: compare each night with a baseline. What is refused fails with one line.
    """
    try:
        run = run_at(run_file, flow_run.scheduled_start_time)
        refuse_bad_paths(run, run_file=run_file)
        return _unwatched(run, run_file, keep) if watch is None else _watched(run, run_file, watch, keep)
    except (Refusal, OSError, UnreadableStore) as error:  # a disk or store that fails is no fault of this program
        return Failed(message=first_line(error))


def _unwatched(run: Run, run_file: Path, keep: int | None) -> "State[Any]":
    """A scheduled run into a dataset of its own, unless nothing has changed."""
    from attlas.flows.inputs import inputs_digest

    nights, inputs = Nights.of(run), inputs_digest(run)
    before = nights.unchanged_since(inputs)
    if before is not None:
        return Completed(name="Unchanged", message=f"skipped: nothing has changed since {name_of_place(before)}")
    page = _measure(run, run_file.stem)
    nights.add(run.out, inputs)
    gone = nights.keep(keep)
    removed = f"; removed {', '.join(map(name_of_place, gone))}" if gone else ""
    said = [f"measured {run.corpus} with {run.model} into {run.out}{removed}", *nights.problems()]
    return Completed(message="; ".join(said), data=page)


def _watched(run: Run, run_file: Path, watch: Watch, keep: int | None) -> "State[Any]":
    """A scheduled night that is compared with a baseline."""
    from attlas.flows.artifacts import publish_drift
    from attlas.flows.watching import watch_night

    night = watch_night(run, watch, folder=run_file.parent, measure=lambda chosen: _measure(chosen, run_file.stem))
    said = "; ".join([night.message, *night.problems])
    if night.dataset is None:
        return Completed(name="Unchanged", message=f"skipped: {said}")
    Nights.of(run).keep(keep)
    if night.page is not None:
        publish_drift(run_file.stem, night.message, night.page, night.changed)
    return Completed(name="Drift" if night.has_drift else "Completed", message=said)


def _measure(run: Run, name: str) -> Path | str:
    # imported here, because Prefect pickles a flow with its globals, and the display of `attlas.flows.measure` can't be pickled
    from attlas.flows.analyze import written_report
    from attlas.flows.artifacts import PrefectDisplay, publish
    from attlas.flows.measure import measure, plan_run, release
    from attlas.flows.measuring import using_display

    show = PrefectDisplay(name)
    with using_display(show):
        try:
            plan_run(run)  # what is refused is so before there is a flow run
            page = measure(run)
        finally:
            release(run)
    publish(name, written_report(run.out), page, show.metrics())
    return page


def serve(run_file: Path, schedule: "Schedule", *, keep: int | None = None, watch: Watch | None = None) -> None:
    """Register the schedule with the Prefect server and execute its runs, until stopped. keep, watch: as of `scheduled`."""
    from prefect.types.entrypoint import EntrypointType

    refuse_no_server()
    run_file = run_file.resolve()
    run = run_at(run_file, datetime.now(UTC))
    refuse_bad_paths(run, run_file=run_file)
    for name in () if watch is None else watch.alerts:
        sink_named(name, folder=run_file.parent)  # raises Refusal
    scheduled.serve(
        name=run_file.stem,
        description=f"Measures {run.corpus} with {run.model}, as {run_file} says, into {Nights.of(run).root}.",
        tags=["attlas"],
        schedule=schedule,
        parameters={
            "run_file": str(run_file),
            "keep": keep,
            "watch": None if watch is None else watch.model_dump(mode="json"),
        },
        limit=1,  # two runs at the same time would only compete for the machine
        print_starting_message=False,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def schedule_of(*, cron: str | None, interval: float | None, timezone: str | None) -> "Schedule":
    """The Prefect schedule for these options. Raises Refusal if they are invalid."""
    from prefect.schedules import Cron, Interval

    if timezone is not None and timezone not in available_timezones():
        raise Refusal(f"--timezone must be a time zone such as Europe/Berlin; got {timezone!r}; use an existing one")
    if (cron is None) == (interval is None):
        number = "neither" if cron is None else "both"
        raise Refusal(f"a schedule is either --cron or --interval; got {number}; use one of them")
    if interval is not None:
        if interval < 1:
            raise Refusal(f"--interval must be at least 1 second; got {interval:g}; use a longer one")
        return Interval(interval, timezone=timezone)
    try:
        return Cron(str(cron), timezone=timezone)
    except ValueError:
        raise Refusal(
            f"--cron must have five fields (minute hour day month weekday); got {cron!r}; for 2 a.m. daily, use '0 2 * * *'"
        ) from None


def refuse_no_server() -> None:
    """Raise Refusal if no permanent Prefect server is configured or it does not answer."""
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        raise Refusal(
            "a schedule needs a permanent Prefect server; PREFECT_API_URL is not set; "
            "start one with `prefect server start` and export PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    refuse_unreachable_server()
