"""What Prefect's own page shows of a run: progress, the dataset, what was found, and the report."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import MissingContextError
from prefect.logging import get_logger

from attlas.extract.printable import printable
from attlas.flows.progress import STAGES, Pace, PeriodicDisplay, Work
from attlas.flows.telemetry import peak_memory

if TYPE_CHECKING:
    from attlas.analysis.report import Report

_SHOWN = ("type", "name", "found", "rule")
_SHOWN_OF_CHANGES = ("stack", "layer", "head", "site", "column", "a", "b", "difference", "low", "high", "q")


class PrefectDisplay(PeriodicDisplay):
    """Shows stages and notes in Prefect's log, and progress as an artifact that is updated every few seconds."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._artifact: UUID | None = None
        self._failures = 0
        self._tokens_per_second = 0.0

    def stage(self, name: str, done: int, total: int | None) -> None:  # noqa: ARG002 - a log has no bar
        if name != self._stage:
            _logger().info(STAGES.get(name, name))
        self._stage = name

    def start_measuring(self, *, total: Work, before: Work) -> None:
        super().start_measuring(total=total, before=before)
        description = Pace(total, before).text
        artifact = create_progress_artifact(0.0, key=f"{slug(self._name)}-progress", description=description)
        self._artifact = cast(UUID, artifact)  # no coroutine outside of one

    def _show(self, pace: Pace) -> None:
        if self._artifact is not None:
            share = 100.0 * pace.done.tokens / max(1, pace.total.tokens)
            update_progress_artifact(self._artifact, min(share, 100.0), description=pace.text)

    def advance(self, work: Work) -> None:
        super().advance(work)
        if self._pace is not None:
            self._tokens_per_second = self._pace.tokens_per_second

    def failed(self, error: BaseException) -> None:  # noqa: ARG002 - Prefect shows it
        self._failures += 1

    def note(self, text: str) -> None:
        _logger().warning(printable(text))

    def metrics(self) -> dict[str, int]:
        """What this process has measured, how fast, and what it took; nothing if all was there."""
        if self._pace is None:
            return {}
        measured = self._pace.done - self._pace.before
        return {
            "shards measured": measured.shards,
            "documents measured": measured.documents,
            "tokens measured": measured.tokens,
            "tokens per second": round(self._tokens_per_second),
            "attempts at a shard that failed": self._failures,
            "peak memory, MiB": peak_memory() >> 20,
        }


def publish(name: str, report: "Report", page: Path | str, metrics: Mapping[str, int]) -> None:
    """Make artifacts of a finished dataset: what it is, what was found, what measuring it took, and a link to the report."""
    from attlas.analysis.info import describe

    title = slug(name)
    if metrics:
        create_table_artifact(
            [{"metric": metric, "value": f"{value:,}"} for metric, value in metrics.items()],
            key=f"{title}-metrics",
            description="What this run measured and took; the share of padding is in the table of the dataset.",
        )
    rows = [
        f"| {_cell(label)} | {_cell(value)} |"
        for _, facts in describe(report.dataset.manifest)
        for label, value in facts
    ]
    table = "\n".join(["| | |", "|---|---|", *rows])
    create_markdown_artifact(table, key=f"{title}-dataset", description="The dataset that was measured.")
    rules = report.content.judgement.rules.select(_SHOWN)
    create_table_artifact(
        [{column: _cell(value) for column, value in row.items()} for row in rules.to_dicts()],
        key=f"{title}-findings",
        description="Defects, where something is wrong, and findings, which are normal in trained models: how many there are.",
    )
    create_link_artifact(
        _link(page), link_text="the report", key=f"{title}-report", description="The analyses as a page."
    )


def publish_drift(name: str, message: str, page: Path | str, changed: Sequence[Mapping[str, Any]]) -> None:
    """Make artifacts of the comparison of a night with its baseline: a link to it, and what changed most."""
    title, description = slug(name), printable(message)
    create_link_artifact(_link(page), link_text="the comparison", key=f"{title}-drift", description=description)
    rows = [{column: _cell(row[column]) for column in _SHOWN_OF_CHANGES} for row in changed]
    create_table_artifact(rows, key=f"{title}-changes", description=f"What changed most. {description}")


def _link(page: Path | str) -> str:
    return page.resolve().as_uri() if isinstance(page, Path) else page


def _logger() -> Any:
    """The logger of the flow run or task run; libraries also warn in threads that have neither."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("attlas")


def slug(name: str) -> str:
    """A name as the key of an artifact: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"


def _cell(value: Any) -> str:
    """A value as the text of a cell, in which nothing is markup."""
    text = "" if value is None else printable(str(value))
    return re.sub(r"([\\|`*_{}\[\]<>#])", r"\\\1", text)
