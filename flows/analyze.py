"""The task that writes the report of a finished dataset."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE


@task(name="report", cache_policy=NO_CACHE)
def report(dataset: Path) -> Path | str:
    """Write the dataset's report beside its tables."""
    from attlas.analysis.report import write_report

    return write_report(dataset, None)
