"""The report's key tables, for a terminal."""

from __future__ import annotations

from typing import Any

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from analysis.report import findings
from analysis.report.content import Content
from analysis.report.numbers import estimate, half_width, percent

_RANKED = 3
_MASSES = ("mass_previous", "mass_first", "mass_separator")


def tables(content: Content) -> RenderableType:
    """Heads that stand out, head kinds and defects."""
    parts: list[RenderableType] = [_title(content), _extremes(content), _kinds(content), _defects(content)]
    parts += [Text(f"Note: {note}", style="dim") for note in findings.notes(content)]
    return Group(*parts)


def _title(content: Content) -> Text:
    corpus = content.manifest.get("corpus", {})
    title = Text(str(content.manifest.get("model", {}).get("name", "model")), style="bold")
    title.append(f" on {corpus.get('name', 'corpus')}: ", style="not bold")
    title.append(
        f"{content.heads.height} heads, {content.documents} documents, {corpus.get('tokens', 0):,} tokens", "not bold"
    )
    return title


def _table(title: str, *columns: tuple[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify)
    return table


def _extremes(content: Content) -> Table:
    """The sharpest, broadest, nearest and farthest heads, with half-widths of their 95 % intervals."""
    table = _table(
        "Heads that stand out (± half of the 95 % interval)",
        ("", "left"),
        ("head", "left"),
        ("kind", "left"),
        ("entropy of max", "right"),
        (f"{content.distance.removeprefix('distance_')} away", "right"),
        ("previous", "right"),
        ("first", "right"),
        ("separator", "right"),
    )
    for name, column, largest in (
        ("sharpest", "entropy_normalized", False),
        ("broadest", "entropy_normalized", True),
        ("nearest", content.distance, False),
        ("farthest", content.distance, True),
    ):
        ranked = content.heads.filter(pl.col(column).is_not_null()).sort(column, descending=largest).head(_RANKED)
        for i, row in enumerate(ranked.iter_rows(named=True)):
            values = [_with_half(row, c) for c in ("entropy_normalized", content.distance, *_MASSES)]
            table.add_row(name if i == 0 else "", Text(row["label"]), row["kind"], *values)
    return table


def _with_half(row: dict[str, Any], column: str) -> str:
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return f"{estimate(row[column], low, high)} {half_width(low, high)}".strip()


def _kinds(content: Content) -> Table:
    table = _table("Head kinds", ("kind", "left"), ("heads", "right"), ("firm", "right"), ("", "left"))
    for kind, number, meaning in findings.kind_counts(content):
        own = content.heads.filter(pl.col("kind") == kind)["agreement"].drop_nulls()
        firm = str(int((own >= findings.FIRM).sum())) if len(own) else "–"
        table.add_row(kind, str(number), firm, meaning)
    table.caption = f"firm: at least {percent(findings.FIRM)} of bootstrap replicates over documents agree"
    table.caption_justify = "left"
    return table


def _defects(content: Content) -> Table:
    table = _table("Defects looked for", ("defect", "left"), ("found", "right"), ("rule", "left"))
    for row in content.rules.iter_rows(named=True):
        found = "not measured" if row["found"] is None else str(row["found"])
        table.add_row(row["defect"], Text(found, style="bold red" if row["found"] else "dim"), Text(row["rule"]))
    return table
