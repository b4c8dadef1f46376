"""Charts of a trend: small multiples, a line with its interval for each place, with changes and alerts marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import polars as pl
from markupsafe import Markup

from attlas.analysis.compare import CHANGED
from attlas.analysis.report.charts import chart_fragment
from attlas.analysis.trend import PLACE, Trend

if TYPE_CHECKING:
    import altair as alt

_WIDTH = 900  # of all columns of small multiples together, in pixels
_SMALLEST, _LARGEST = 62, 260
# the tables of a trend, by the part of a place that only they have
_KINDS = {"head": "Heads", "site": "Sites of the residual stream", "": "Layers"}


def trend_charts(trend: Trend) -> Iterator[tuple[str, Markup]]:
    """For heads, sites and layers of each stack: a title, and a chart in which the column is chosen."""
    several = trend.rows["stack"].n_unique() > 1
    alerts = trend.alerts.group_by(*PLACE, "column", "step").agg(alert=pl.col("alert").first())
    rows = trend.rows.join(alerts, on=[*PLACE, "column", "step"], how="left", nulls_equal=True)
    for kind, name in _KINDS.items():
        of_kind = rows.filter(_is_of(kind))
        for stack in of_kind["stack"].unique(maintain_order=True):
            title = f"{name}, {stack}" if several else name
            frame = _frame(of_kind.filter(stack=stack), kind)
            chart = _chart(trend, frame, kind)
            yield title, chart_fragment(chart, {"rows": frame}, label=f"{title}: a line for each through the series")


def _is_of(kind: str) -> pl.Expr:
    has = {name: pl.col(name).is_not_null() for name in ("head", "site")}
    return has[kind] if kind else ~has["head"] & ~has["site"]


def _frame(rows: pl.DataFrame, kind: str) -> pl.DataFrame:
    """What a chart shows, with the texts of its tips."""
    where = pl.format("L{}", "layer")
    if kind == "head":
        where = pl.format("L{}H{}", "layer", "head")
    elif kind == "site":
        where = pl.format("L{} {}", "layer", pl.col("site").str.replace_all("_", " "))
    return rows.select(
        "step",
        "dataset",
        "layer",
        pl.col(kind) if kind else pl.lit("").alias("across"),
        "column",
        "estimate",
        "low",
        "high",
        pl.col("difference", "q").round_sig_figs(3),
        "change",
        "alert",
        where=where,
    ).rename({kind: "across"} if kind else {})


def _chart(trend: Trend, frame: pl.DataFrame, kind: str) -> alt.FacetChart:
    """Small multiples of layers by heads, or by sites. The scale is the same in all."""
    import altair as alt

    columns = [name for name in trend.columns if name in set(frame["column"])]
    across = frame["across"].n_unique()
    width = max(_SMALLEST, min(_LARGEST, _WIDTH // across - 8))
    chosen = alt.param(name="column", value=columns[0], bind=alt.binding_select(options=columns, name="column "))
    title = "training step" if trend.series.has_steps else "dataset"
    x = alt.X("step:Q", title=None, axis=_axis(trend)).scale(nice=False)
    y = alt.Y("estimate:Q", title=None, axis=alt.Axis(tickCount=3, format=".4~g")).scale(zero=False)
    base = alt.Chart().encode(x=x)
    layers = (
        base.mark_area(opacity=0.2, color="var(--previous)")
        .encode(y=y.copy(), y2="high:Q")
        .encode(y=alt.Y("low:Q", title=None)),
        base.mark_line(strokeWidth=1.5, color="var(--previous)").encode(y=y),
        _marks(base, y, f"datum.change == '{CHANGED}'", shape="circle", size=22, color="var(--previous)"),
        _marks(base, y, "isValid(datum.alert)", shape="triangle-up", size=90, color="var(--accent)"),
        base.mark_rule(opacity=0, strokeWidth=max(4, min(24, width / max(1, len(trend.steps))))).encode(
            tooltip=_tips(title)
        ),
    )
    facet: dict[str, Any] = {
        "row": alt.Row(
            "layer:O", title=None, header=alt.Header(labelExpr="'L' + datum.value", labelAngle=0, labelAlign="left")
        )
    }
    if kind:
        label = "'H' + datum.value" if kind == "head" else "replace(datum.value, '_', ' ')"
        facet["column"] = alt.Column(
            "across:N" if kind == "site" else "across:O", title=None, sort=None, header=alt.Header(labelExpr=label)
        )
    return (
        alt.layer(*layers)
        .properties(width=width, height=max(44, min(120, int(width * 0.62))))
        .transform_filter("datum.column == column")
        .facet(data=alt.NamedData("rows"), spacing=8, **facet)
        .add_params(chosen)
    )


def _marks(base: alt.Chart, y: alt.Y, condition: str, **mark: Any) -> alt.Chart:
    return base.mark_point(filled=True, opacity=1, **mark).encode(y=y).transform_filter(condition)


def _axis(trend: Trend) -> alt.Axis:
    import altair as alt

    return (
        alt.Axis(tickCount=3, format="~s", grid=False, labelFlush=True)
        if trend.series.has_steps
        else alt.Axis(tickMinStep=1, tickCount=3, format="d", grid=False)
    )


def _tips(title: str) -> list[alt.Tooltip]:
    """What a tip shows: names from the data are escaped by Vega."""
    import altair as alt

    numbers = {"estimate": "mean", "low": "from", "high": "to", "difference": "since the one before"}
    return [
        alt.Tooltip("where:N", title="where"),
        alt.Tooltip("dataset:N", title="dataset"),
        alt.Tooltip("step:Q", title=title, format="d"),
        *(alt.Tooltip(f"{name}:Q", title=shown, format=".4~g") for name, shown in numbers.items()),
        alt.Tooltip("q:Q", title="q", format=".2~g"),
        alt.Tooltip("change:N", title="verdict"),
        alt.Tooltip("alert:N", title="alert"),
    ]
