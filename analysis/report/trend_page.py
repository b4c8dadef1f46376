"""A trend as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

import polars as pl

from attlas.analysis.alerts import RULES
from attlas.analysis.compare import CHANGED
from attlas.analysis.naming import model_title
from attlas.analysis.report.chart_page import render_chart_page
from attlas.analysis.report.numbers import THIN, count
from attlas.analysis.row_texts import difference_cells, interval_text, place_name, rounded
from attlas.analysis.trend import Trend
from attlas.analysis.trend_charts import trend_charts
from attlas.analysis.trend_overview import can_alert, column_overviews, largest_changes, sparkline

_CHANGES = 300


def render_trend(trend: Trend) -> str:
    """The page of a trend, with its charts."""
    return render_chart_page("trend.html", _context(trend))


def _context(trend: Trend) -> dict[str, Any]:
    last = trend.series.members[-1]
    changed = largest_changes(trend)
    confidence = f"{100 * (1 - trend.alpha):g}{THIN}%"
    return {
        "model": model_title(last.dataset.manifest),
        "count": len(trend.steps),
        "span": trend.notes[0],
        "tiles": _tiles(trend),
        "alerts": _alerts(trend),
        "no_alerts": "No entropy collapse, no large logits." if can_alert(trend) else "No alert.",
        "rules": [rule for rule in RULES if rule.column in trend.columns],
        "columns": _columns(trend),
        "charts": list(trend_charts(trend)),
        "changes": _changes(trend, changed.head(_CHANGES), confidence),
        "caption": f"the largest change of each place and column, {min(_CHANGES, changed.height)} of {changed.height}",
        "notes": trend.notes[1:],
        "confidence": confidence,
        "alpha": f"{trend.alpha:g}",
    }


def _tiles(trend: Trend) -> list[tuple[str, str]]:
    since = trend.counts(trend.changes_to(-1))
    return [
        (count(len(trend.steps)), "datasets"),
        (count(trend.alerts.height), "alert" if trend.alerts.height == 1 else "alerts"),
        *((count(number), f"{verdict} since the one before") for verdict, number in since.items()),
    ]


def _alerts(trend: Trend) -> dict[str, Any]:
    several = trend.rows["stack"].n_unique() > 1
    header = [
        ("alert", False),
        ("where", False),
        ("from", False),
        ("column", False),
        ("first", True),
        ("then", True),
        ("in the last", False),
    ]
    rows = [
        (
            row["alert"],
            place_name(row, several_stacks=several),
            row["dataset"],
            row["column"],
            rounded(row["first"]),
            interval_text(row),
            "still" if row["lasts"] else "no more",
        )
        for row in trend.alerts.iter_rows(named=True)
    ]
    return {"header": header, "rows": rows}


def _columns(trend: Trend) -> dict[str, Any]:
    header = [
        ("column", False),
        ("series", False),
        ("first", True),
        ("last", True),
        ("changed since the one before", True),
        ("since the first", True),
    ]
    rows = [
        (
            of.column,
            sparkline(of.means),
            rounded(of.means[0]),
            rounded(of.means[-1]),
            f"{of.changed} of {of.places}",
            f"{of.changed_from_first} of {of.places}",
        )
        for of in column_overviews(trend)
    ]
    return {"header": header, "rows": rows}


def _changes(trend: Trend, changes: pl.DataFrame, confidence: str) -> dict[str, Any]:
    several = trend.rows["stack"].n_unique() > 1
    names = ["column", "from", "to", "difference", f"{confidence} interval", "q", "÷ margin"]
    header = [("where", False), *((name, number > 2) for number, name in enumerate(names))]
    changed = changes.filter(verdict=CHANGED)
    datasets = changed.select("from_dataset", "dataset").rows()
    rows = [
        (row["where"], row["column"], *between, *(row[name] for name in ("difference", "interval", "q", "÷ margin")))
        for row, between in zip(difference_cells(changed, several_stacks=several), datasets, strict=True)
    ]
    return {"header": header, "rows": rows}
