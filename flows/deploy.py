"""The schedule: the same flow, started by a Prefect server, a new dataset each time."""

import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import available_timezones

from prefect import flow
from prefect.runtime import flow_run

from extract.errors import Refusal
from flows.api import refuse_silent_api
from flows.checks import refuse_bad_paths
from flows.config import Run, read_run

if TYPE_CHECKING:
    from prefect.schedules import Schedule


@flow(name="attlas-scheduled")
def scheduled(run_file: Path) -> Path | str:
    """One scheduled run: the run file as it is now, into a folder named after the scheduled time."""
    # Prefect pickles a flow with all that it names; the display that `flows.measure` holds cannot be pickled
    from flows.measure import forget, measure

    run = run_at(run_file, flow_run.scheduled_start_time)
    refuse_bad_paths(run, run_file=run_file)
    try:
        return measure(run)
    finally:
        forget(run)


def run_at(run_file: Path, moment: datetime) -> Run:
    """The run of that moment. A dataset never changes, so each goes to OUT/<time>; a retry finds its own again."""
    run = read_run(run_file, {})
    key = run.digest_key or digest_key_beside(run_file)
    return run.model_copy(update={"out": run.out / folder_name(moment), "digest_key": key})


def folder_name(moment: datetime) -> str:
    """The time as a folder's name, in UTC: sorted by name is sorted by time."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")


def digest_key_beside(run_file: Path) -> Path:
    """The run file's own digest key, made at first use, readable by its owner alone."""
    key = run_file.with_suffix(".digest-key")
    try:
        descriptor = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return key
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return key


def serve(run_file: Path, schedule: "Schedule") -> None:
    """Hand the schedule to the Prefect server and run what it starts, until stopped."""
    from prefect.types.entrypoint import EntrypointType

    refuse_no_server()
    run_file = run_file.resolve()
    refuse_bad_paths(run_at(run_file, datetime.now(UTC)), run_file=run_file)
    scheduled.serve(
        name=run_file.stem,
        schedule=schedule,
        parameters={"run_file": str(run_file)},
        limit=1,  # two runs at once would only take the machine from each other
        print_starting_message=False,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def schedule_of(*, cron: str | None, interval: float | None, timezone: str | None) -> "Schedule":
    """The schedule, or a refusal of one that Prefect would not understand."""
    from prefect.schedules import Cron, Interval

    if timezone is not None and timezone not in available_timezones():
        raise Refusal(f"--timezone is a zone such as Europe/Berlin; got {timezone!r}; give one that exists")
    if (cron is None) == (interval is None):
        came = "neither" if cron is None else "both"
        raise Refusal(f"a schedule is --cron or --interval; got {came}; give one of them")
    if interval is not None:
        if interval < 1:
            raise Refusal(f"--interval must be at least 1 second; got {interval:g}; give a longer one")
        return Interval(interval, timezone=timezone)
    try:
        return Cron(str(cron), timezone=timezone)
    except ValueError:
        raise Refusal(
            f"--cron is five fields (minute hour day month weekday); got {cron!r}; for every night at two: '0 2 * * *'"
        ) from None


def refuse_no_server() -> None:
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        raise Refusal(
            "a schedule needs a Prefect server that keeps running; PREFECT_API_URL is not set; "
            "start one with `prefect server start` and export PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    refuse_silent_api()
