"""A comparison of two datasets as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import polars as pl
from markupsafe import Markup

from attlas.analysis.compare import CHANGED, UNCHANGED, UNDECIDED, Comparison
from attlas.analysis.report.chart_page import render_chart_page
from attlas.analysis.report.charts import chart_fragment
from attlas.analysis.report.numbers import THIN, count
from attlas.analysis.residual import SITES
from attlas.analysis.row_texts import difference_cells, place_name, rounded

if TYPE_CHECKING:
    import altair as alt

_CHANGES = 300
_CELL = 26  # pixels
_FARTHEST = 5  # multiples of the margin at which the colours end
# what is on each side of a map, by the part of a place that only its rows have
_MAPS = {"head": "Heads", "site": "Sites of the residual stream", "": "Layers"}


def render_comparison(comparison: Comparison) -> str:
    """The page of a comparison, with its maps."""
    rows, verdicts = comparison.rows, comparison.counts()
    changed = rows.filter(verdict=CHANGED)
    models, corpora = zip(*comparison.names, strict=True)
    context = {
        "models": models if models[0] != models[1] else [" on ".join(name) for name in comparison.names],
        "lead": f"{_on(corpora)}. {comparison.notes[2]}",
        "tiles": [(count(number), verdict) for verdict, number in verdicts.items()],
        "columns": _columns(rows),
        "charts": list(_maps(rows)),
        "changes": _changes(changed.head(_CHANGES), comparison),
        "caption": f"the largest effects first, {min(_CHANGES, changed.height)} of {changed.height}",
        "notes": comparison.notes,
        "alpha": f"{comparison.alpha:g}",
    }
    return render_chart_page("comparison.html", context)


def _on(corpora: tuple[str, str]) -> str:
    return f"Both on {corpora[0]}" if corpora[0] == corpora[1] else f"On {corpora[0]}, and on {corpora[1]}"


def _columns(rows: pl.DataFrame) -> dict[str, Any]:
    """A row for each column, the one with the largest effect first."""
    counted = [(pl.col("verdict") == verdict).sum().alias(verdict) for verdict in (CHANGED, UNDECIDED, UNCHANGED)]
    found = (
        rows.group_by("column").agg(*counted, pl.col("effect").max()).sort("effect", "column", descending=[True, False])
    )
    header = [("column", False), *((name, True) for name in (CHANGED, UNDECIDED, UNCHANGED, "largest ÷ margin"))]
    cells = [
        (
            row["column"],
            *(count(row[verdict]) for verdict in (CHANGED, UNDECIDED, UNCHANGED)),
            rounded(row["effect"], digits=3),
        )
        for row in found.iter_rows(named=True)
    ]
    return {"header": header, "rows": cells}


def _changes(changed: pl.DataFrame, comparison: Comparison) -> dict[str, Any]:
    cells = difference_cells(changed, several_stacks=comparison.rows["stack"].n_unique() > 1)
    interval = f"{100 * (1 - comparison.alpha):g}{THIN}% interval"
    names = ("where", "column", "a", "b", "difference", interval, "q", "÷ margin")
    rows = [
        (
            row["where"],
            row["column"],
            rounded(a),
            rounded(b),
            row["difference"],
            row["interval"],
            row["q"],
            row["÷ margin"],
        )
        for row, a, b in zip(cells, changed["a"], changed["b"], strict=True)
    ]
    return {"header": [(name, number > 1) for number, name in enumerate(names)], "rows": rows}


def _maps(rows: pl.DataFrame) -> Iterator[tuple[str, Markup]]:
    """For heads, sites and layers of each stack: a title, and a map whose column is chosen."""
    several = rows["stack"].n_unique() > 1
    is_of = {name: pl.col(name).is_not_null() for name in ("head", "site")}
    is_of[""] = ~is_of["head"] & ~is_of["site"]
    down = "depth" if "depth" in rows.columns else "layer"
    for kind, name in _MAPS.items():
        for (stack,), of_stack in rows.filter(is_of[kind]).group_by("stack", maintain_order=True):
            title = f"{name}, {stack}" if several else name
            frame = _frame(of_stack, kind, down)
            yield (
                title,
                chart_fragment(_map(frame, kind, down), {"rows": frame}, label=f"{title}: differences ÷ margin"),
            )


def _frame(rows: pl.DataFrame, kind: str, down: str) -> pl.DataFrame:
    """What a map shows, with the texts of its tips."""
    several = rows["stack"].n_unique() > 1
    where = [place_name(row, several_stacks=several) for row in rows.iter_rows(named=True)]
    across = pl.col(kind).cast(pl.String).str.replace_all("_", " ") if kind else pl.lit("")
    signed = pl.col("effect") * pl.col("difference").sign()
    numbers = pl.col("a", "b", "difference", "low", "high", "q", "margin").round_sig_figs(4)
    return rows.with_columns(where=pl.Series(where, dtype=pl.String)).select(
        down, "column", "where", "verdict", numbers, across=across, effect=signed.round_sig_figs(4)
    )


def _map(frame: pl.DataFrame, kind: str, down: str) -> alt.TopLevelMixin:
    import altair as alt

    largest = (
        frame.group_by("column")
        .agg(pl.col("effect").abs().max())
        .sort("effect", "column", descending=[True, False], nulls_last=True)
    )
    columns = largest["column"].to_list()
    chosen = alt.param(name="column", value=columns[0], bind=alt.binding_select(options=columns, name="column "))
    numbers = ("a", "b", "difference", "low", "high", "q", "margin", "effect")
    tips = [alt.Tooltip("where:N"), alt.Tooltip("verdict:N")] + [
        alt.Tooltip(f"{n}:Q", title="÷ margin" if n == "effect" else n) for n in numbers
    ]
    sites = [site.replace("_", " ") for site in SITES]
    order = sites if kind == "site" else sorted(frame["across"].unique(), key=lambda name: (len(name), name))
    x = alt.X(
        "across:N", title=kind or None, sort=order, axis=alt.Axis(labelAngle=0 if kind == "head" else -40, orient="top")
    )
    y = alt.Y(f"{down}:O", title=down, axis=alt.Axis(format=".0%") if down == "depth" else alt.Axis())
    colour = alt.Color("effect:Q", title="÷ margin").scale(
        scheme="blueorange", domain=[-_FARTHEST, _FARTHEST], domainMid=0, clamp=True
    )
    base = alt.Chart(alt.NamedData("rows")).transform_filter("datum.column == column").encode(x=x, y=y, tooltip=tips)
    border = base.transform_filter(f"datum.verdict == '{CHANGED}'").mark_rect(
        fill=None, stroke="var(--ink)", strokeWidth=2
    )
    return (
        alt.layer(base.mark_rect().encode(color=colour), border)
        .properties(width=alt.Step(_CELL if kind == "head" else 2 * _CELL), height=alt.Step(_CELL))
        .add_params(chosen)
    )
