"""The report of a dataset: a self-contained HTML page, and a summary for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attlas.extract.store import Location


def write_report(location: Location, out: Path | str | None = None) -> Path | str:
    """Write the report of a finished dataset as one self-contained HTML page, by default report.html in its folder.

    Returns the path of the page, or its URL in an object store.
    """
    from attlas.analysis.damage import refuse_if_damaged
    from attlas.analysis.dataset import Dataset
    from attlas.analysis.report.content import gather
    from attlas.analysis.report.page import render
    from attlas.extract.store import REPORT, LocalFolder, Refusal, write_atomically

    dataset = Dataset.open(location)
    storage = dataset.storage
    if out is None:
        storage.refuse_obstacle(REPORT)
    elif Path(out).is_dir():
        raise Refusal(f"a report is a file; {out} is a folder; give the name of a file in it")
    with refuse_if_damaged(dataset):
        page = render(gather(dataset)).encode()
    if out is not None:
        write_atomically(Path(out), page)
        return Path(out)
    storage.put(REPORT, page)
    place = storage.place(REPORT)
    return Path(place) if isinstance(storage, LocalFolder) else place


def summary(location: Location) -> RenderableType:
    """The key tables of the report, for a terminal."""
    from attlas.analysis.damage import refuse_if_damaged
    from attlas.analysis.dataset import Dataset
    from attlas.analysis.report.content import gather
    from attlas.analysis.report.terminal import tables

    dataset = Dataset.open(location)
    with refuse_if_damaged(dataset):
        return tables(gather(dataset))
