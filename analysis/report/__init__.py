"""The report of a dataset: a self-contained HTML page, its numbers, and a summary for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attlas.analysis.dataset import Dataset
    from attlas.analysis.report.content import Content
    from attlas.extract.store import Location


@dataclass(frozen=True)
class Report:
    """The analyses of a dataset. A notebook shows the page."""

    dataset: Dataset
    content: Content

    @cached_property
    def html(self) -> str:
        """The page, with everything that it needs. Raises Refusal for a damaged dataset."""
        from attlas.analysis.damage import refuse_if_damaged
        from attlas.analysis.report.page import render

        with refuse_if_damaged(self.dataset):
            return render(self.content)

    def _repr_html_(self) -> str:
        from html import escape

        return f'<iframe srcdoc="{escape(self.html)}" style="width: 100%; height: 80vh; border: 0"></iframe>'

    def save(self, out: Path | str | None = None) -> Path | str:
        """Write the page, by default to report.html in the dataset's folder. Returns its path, or its URL in an object store.

        That of an earlier generation is written to report-000005.html.
        """
        from attlas.extract.store import LocalFolder, report_key, write_atomically

        page = self.html.encode()
        if out is not None:
            write_atomically(Path(out), page)
            return Path(out)
        storage = self.dataset.storage
        key = report_key(storage, self.dataset.manifest)
        storage.put(key, page)
        place = storage.place(key)
        return Path(place) if isinstance(storage, LocalFolder) else place

    def terminal(self) -> RenderableType:
        """The key tables, for a terminal. Raises Refusal for a damaged dataset."""
        from attlas.analysis.damage import refuse_if_damaged
        from attlas.analysis.report.terminal import tables

        with refuse_if_damaged(self.dataset):
            return tables(self.content)

    def numbers(self) -> dict[str, Any]:
        """The numbers of the page, as JSON has them: lists of rows by what they are of."""
        from attlas.analysis.report.content import numbers_of

        return numbers_of(self.content)


def report(location: Location, *, min_documents: int = 1) -> Report:
    """Run the analyses of a finished dataset. `.save()` writes them as a page; a notebook shows it.

    min_documents: numbers of fewer documents are not shown. Raises Refusal for a damaged dataset, and one of fewer documents.
    """
    from attlas.analysis.damage import refuse_if_damaged
    from attlas.analysis.dataset import Dataset
    from attlas.analysis.report.content import gather

    dataset = Dataset.open(location, min_documents=min_documents)
    with refuse_if_damaged(dataset):
        return Report(dataset, gather(dataset))


def save_report(
    location: Location, out: Path | str | None = None, *, min_documents: int = 1
) -> tuple[Report, Path | str]:
    """Write the report of a finished dataset as one self-contained HTML page, by default report.html in its folder.

    Returns the report, and the path of the page, or its URL in an object store. Raises Refusal before the analyses are run if the page
    can't be written there.
    """
    _refuse_page(location, out)
    found = report(location, min_documents=min_documents)
    return found, found.save(out)


def write_report(location: Location, out: Path | str | None = None) -> Path | str:
    """The same; returns only where the page is."""
    return save_report(location, out)[1]


def _refuse_page(location: Location, out: Path | str | None) -> None:
    """Raise Refusal if the page can't be written there."""
    from attlas.analysis.dataset import Dataset
    from attlas.extract.store import Refusal, report_key

    if out is None:
        dataset = Dataset.open(location)
        dataset.storage.refuse_obstacle(report_key(dataset.storage, dataset.manifest))
    elif Path(out).is_dir():
        raise Refusal(f"a report is a file; {out} is a folder; give the name of a file in it")
