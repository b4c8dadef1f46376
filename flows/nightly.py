"""One night of `attlas watch`, started by hand or by cron instead of a Prefect schedule. Without anything new, Prefect is not even loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from attlas.flows.checks import refuse_bad_paths
from attlas.flows.config import Run
from attlas.flows.nights import Nights, run_at
from attlas.flows.watching import Night, Watch, night_named, watch_night


def watch_once(
    run_file: Path, watch: Watch, *, night: str | None, keep: int | None, measure: Callable[[Run], Any]
) -> Night:
    """Measure what is new of a run file, compare it with the baseline, and deliver alerts. night: its time, now by default."""
    run = run_at(run_file.resolve(), night_named(night))
    refuse_bad_paths(run, run_file=run_file)
    found = watch_night(run, watch, folder=Path.cwd(), measure=measure)
    Nights.of(run).keep(keep)
    return found
