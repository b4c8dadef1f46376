"""The report: one page that opens anywhere, and key tables for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def write_report(folder: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a finished dataset as one self-contained HTML page; by default FOLDER/report.html."""
    from analysis.damage import damage_refused
    from analysis.dataset import Dataset
    from analysis.report.content import gather
    from analysis.report.page import render
    from extract.store import Refusal, write_atomically

    dataset = Dataset.open(folder)
    path = Path(out) if out is not None else dataset.root / "report.html"
    if path.is_dir():
        raise Refusal(f"a report is a file; {path} is a folder; give the name of a file in it")
    with damage_refused(dataset):
        page = render(gather(dataset))
    write_atomically(path, page.encode())
    return path


def summary(folder: Path | str) -> RenderableType:
    """What the report finds, as tables for a terminal."""
    from analysis.damage import damage_refused
    from analysis.dataset import Dataset
    from analysis.report.content import gather
    from analysis.report.terminal import tables

    dataset = Dataset.open(folder)
    with damage_refused(dataset):
        return tables(gather(dataset))
