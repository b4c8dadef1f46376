"""The key tables of the report, for a terminal."""

from __future__ import annotations

from typing import Any

import polars as pl
from rich.console import Group, RenderableType
from rich.text import Text

from attlas.analysis.columns import Column, FittedTable, WrappedText
from attlas.analysis.kinds import FIRM_AGREEMENT
from attlas.analysis.manifest import section
from attlas.analysis.naming import corpus_title, model_title
from attlas.analysis.report import highlights
from attlas.analysis.report.content import Content
from attlas.analysis.report.numbers import estimate, half_width, percent, plural
from attlas.extract.printable import printable

_HEADS_PER_EXTREME = 3
_MASSES = ("mass_previous", "mass_first", "mass_separator")


def tables(content: Content) -> RenderableType:
    """Heads that stand out, head kinds, defects and findings, fitted to the terminal without truncating numbers."""
    parts: list[RenderableType] = [_title(content)]
    defects = _rules_table(content, "defect", title="Defects looked for", style="bold red")
    findings = _rules_table(content, "finding", title="Findings, normal in trained models", style="bold")
    extremes = [_extremes_table(content)] if content.awake.height else []
    for table in (*extremes, _kinds_table(content), defects, findings):
        parts += ["", table]
    notes = highlights.notes(content)
    parts += ["", *(WrappedText(Text(f"Note: {printable(note)}", style="dim")) for note in notes)] if notes else []
    return Group(*parts)


def _title(content: Content) -> WrappedText:
    tokens = section(content.manifest, "corpus").get("tokens") or 0
    counts = (plural(content.heads.height, "head"), plural(content.documents, "document"), plural(tokens, "token"))
    title = Text(model_title(content.manifest), style="bold")
    return WrappedText(title.append(f" on {corpus_title(content.manifest)}: {', '.join(counts)}", "not bold"))


def _extremes_table(content: Content) -> FittedTable:
    """The sharpest, broadest, nearest and farthest of the heads that are not at rest, with the half-widths of their 95 % intervals."""
    rows = []
    for name, column, largest in (
        ("sharpest", "entropy_normalized", False),
        ("broadest", "entropy_normalized", True),
        ("nearest", content.distance, False),
        ("farthest", content.distance, True),
    ):
        ranked = (
            content.awake.filter(pl.col(column).is_not_null()).sort(column, descending=largest).head(_HEADS_PER_EXTREME)
        )
        rows += [(name if i == 0 else "", row) for i, row in enumerate(ranked.iter_rows(named=True))]
    headings = {
        "entropy_normalized": "entropy of max",
        content.distance: f"{content.distance.removeprefix('distance_')} away",
    } | {mass: mass.removeprefix("mass_") for mass in _MASSES}
    return FittedTable(
        (
            Column("", [name for name, _ in rows]),
            Column("head", [printable(row["label"]) for _, row in rows]),
            Column("kind", [row["kind"] for _, row in rows]),
            *(
                Column(
                    heading,
                    [_estimate_and_half_width(row, column) for _, row in rows],
                    right=True,
                    breaks="at spaces",
                    optional=column in _MASSES,
                )
                for column, heading in headings.items()
            ),
        ),
        title="Heads that stand out, without those at rest (± half of the 95 % interval)",
    )


def _estimate_and_half_width(row: dict[str, Any], column: str) -> str:
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return f"{estimate(row[column], low, high)} {half_width(low, high)}".strip()


def _kinds_table(content: Content) -> FittedTable:
    counts = highlights.kind_counts(content)
    return FittedTable(
        (
            Column("kind", [kind for kind, _, _ in counts]),
            Column("heads", [str(number) for _, number, _ in counts], right=True),
            Column("firm", [_firm_count(content, kind) for kind, _, _ in counts], right=True),
            Column("", [meaning for _, _, meaning in counts], breaks="at spaces"),
        ),
        title="Head kinds",
        caption=_kinds_caption(content),
    )


def _kinds_caption(content: Content) -> str:
    if content.no_kinds:
        return ""
    awake = ", ".join(f"{kind} ({number})" for kind, number in highlights.awake_counts(content))
    firm = f"firm, on documents like these: at least {percent(FIRM_AGREEMENT)} of the replicates agree"
    return f"{firm}; awake, heads at rest are {awake}" if awake else firm


def _firm_count(content: Content, kind: str) -> str:
    agreement = content.heads.filter(pl.col("kind") == kind)["agreement"].drop_nulls()
    return str(int((agreement >= FIRM_AGREEMENT).sum())) if len(agreement) else "–"


def _rules_table(content: Content, type_: str, *, title: str, style: str) -> FittedTable:
    rules = content.judgement.rules.filter(pl.col("type") == type_).rows(named=True)
    counts = [("–" if row["found"] is None else str(row["found"]), style if row["found"] else "dim") for row in rules]
    return FittedTable(
        (
            Column(type_, [row["name"] for row in rules]),
            Column("found", [Text(text, style=s) for text, s in counts], right=True),
            Column("rule", [row["not_checked"] or row["rule"] for row in rules], breaks="at spaces"),
        ),
        title=title,
    )
