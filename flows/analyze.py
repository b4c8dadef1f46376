"""The task that writes the report of a finished dataset."""

from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from attlas.flows.places import Place

if TYPE_CHECKING:
    from attlas.analysis.report import Report

# the report that this process has written last, by its dataset: the terminal shows its key tables
_written: dict[Place, "Report"] = {}


@task(name="report", task_run_name="report", cache_policy=NO_CACHE)
def report(dataset: Place) -> Path | str:
    """Write the dataset's report beside its tables."""
    from attlas.analysis.report import save_report

    found, page = save_report(dataset)
    _written.clear()
    _written[dataset] = found
    return page


def written_report(dataset: Place) -> "Report":
    """The report of a dataset, without its analyses being run again if this process has just written it."""
    from attlas.analysis.report import report as open_report

    return _written.pop(dataset, None) or open_report(dataset)
