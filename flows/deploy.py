"""Scheduled runs: the same flow, started by a Prefect server, with a new dataset each time."""

import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import available_timezones

from prefect import flow
from prefect.runtime import flow_run

from attlas.extract.errors import Refusal
from attlas.flows.api import refuse_unreachable_server
from attlas.flows.checks import refuse_bad_paths
from attlas.flows.config import Run, read_run

if TYPE_CHECKING:
    from prefect.schedules import Schedule


@flow(name="attlas-scheduled")
def scheduled(run_file: Path) -> Path | str:
    """Run the current run file, into a folder named after the scheduled time."""
    # imported here, because Prefect pickles a flow with its globals, and the display of `attlas.flows.measure` can't be pickled
    from attlas.flows.measure import measure, release

    run = run_at(run_file, flow_run.scheduled_start_time)
    refuse_bad_paths(run, run_file=run_file)
    try:
        return measure(run)
    finally:
        release(run)


def run_at(run_file: Path, time: datetime) -> Run:
    """The run for a scheduled time, with its own folder OUT/<time>, which a retry uses again."""
    run = read_run(run_file, {})
    key = run.digest_key or digest_key_beside(run_file)
    return run.model_copy(update={"out": run.out / folder_name(time), "digest_key": key})


def folder_name(time: datetime) -> str:
    """The time in UTC as a folder name; the order of names is that of times."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")


def digest_key_beside(run_file: Path) -> Path:
    """The digest key beside a run file, created on first use and readable by its owner only."""
    key = run_file.with_suffix(".digest-key")
    try:
        descriptor = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return key
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return key


def serve(run_file: Path, schedule: "Schedule") -> None:
    """Register the schedule with the Prefect server and execute its runs, until stopped."""
    from prefect.types.entrypoint import EntrypointType

    refuse_no_server()
    run_file = run_file.resolve()
    refuse_bad_paths(run_at(run_file, datetime.now(UTC)), run_file=run_file)
    scheduled.serve(
        name=run_file.stem,
        schedule=schedule,
        parameters={"run_file": str(run_file)},
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
