"""Figures of layers: entropy by position and by length, and the residual stream through depth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import polars as pl

from attlas.analysis.report.charts import TIP, chart_fragment
from attlas.analysis.report.content import Content, has_values
from attlas.analysis.report.figure import (
    NARROW,
    Figure,
    bin_text,
    dedent,
    doubling_axis,
    layer_colour,
    needs_logarithm,
    python,
    reach_of,
)
from attlas.analysis.report.head_figures import of_stacks
from attlas.analysis.residual import SITES

if TYPE_CHECKING:
    import altair as alt

_HEIGHT = 190
_LEGEND_LAYERS = 12
_INTERVAL = {"low": "from", "high": "to"}
# one massive token makes a mean of norms say nothing about the others: medians over tokens where these were measured
_MEDIANS = {
    "stream_norm_median": ("stream_norm", "Stream norm", "size of the stream before the sublayer"),
    "update_ratio_median": ("update_ratio", "Update ratio", "size of the update against the stream"),
}
_RESIDUAL = (
    ("update_cosine", "Update cosine", "writes something new (0), sharpens (+) or erases (−)"),
    ("anisotropy", "Anisotropy", "mean cosine between different tokens"),
    ("outlier_ratio", "Outlier ratio", "how much the largest dimension stands out"),
    ("max_abs", "Largest activation", "largest entry of the stream: of massive tokens, mean over sequences"),
)
_SITE_COLOURS = {
    "embedding": "var(--mixed)",
    "attention": "var(--first)",
    "cross_attention": "var(--self)",
    "mlp": "var(--previous)",
    "final_norm": "var(--next)",
}


def entropy_figures(content: Content) -> Iterator[Figure]:
    """For each stack entropy by the position of the query, and by the length of the sequence, a line for each layer."""
    for stack, where, name in of_stacks(content, "entropy-by-position"):
        rows = content.positions.filter(pl.col("stack") == stack)
        if rows.height:
            frame = rows.select(
                "layer", "bin", "entropy_nats", "rows", position=bin_text(pl.col("low"), pl.col("high"))
            )
            yield Figure(
                name,
                f"Entropy by position{where}",
                "mean over heads, in doubling bins of the query's position; a sequence's first token is at 0",
                chart_fragment(
                    _by_layer(
                        frame,
                        "bin",
                        "entropy_nats",
                        x_title="position of the query",
                        y_title="entropy in nats",
                        axis=doubling_axis(reach_of(rows["bin"]), signed=False),
                    ),
                    {"rows": frame},
                    label=f"entropy by position{where}, a line for each layer",
                    name=name,
                    tips={"layer": "layer", "position": "position", "entropy_nats": "entropy, nats", "rows": "rows"},
                ),
                python(
                    "from attlas.analysis.entropy import entropy_by_position",
                    rows='entropy_by_position(dataset, by=("stack", "layer")).collect()',
                ),
                dedent("""
                    SELECT stack, layer, bin, SUM("sum") / SUM("count") AS entropy_nats
                    FROM profiles WHERE profile = 'entropy_by_position'
                    GROUP BY stack, layer, bin ORDER BY stack, layer, bin"""),
            )
    for stack, where, name in of_stacks(content, "entropy-by-length"):
        rows = content.lengths.filter((pl.col("stack") == stack) & pl.col("entropy_normalized").is_not_null())
        if rows.height:
            frame = rows.sort("layer", "stratum").select(
                "layer",
                "stratum",
                "entropy_normalized",
                low="entropy_normalized_low",
                high="entropy_normalized_high",
                tokens=bin_text(pl.col("tokens_low"), pl.col("tokens_high")),
                longest="tokens_high",
                documents="documents",
            )
            yield Figure(
                name,
                f"Entropy by length{where}",
                "normalised by the keys that each row sees; strata of the sequence's length",
                chart_fragment(
                    _by_layer(
                        frame,
                        "stratum",
                        "entropy_normalized",
                        x_title="tokens in the sequence, up to",
                        y_title="normalised entropy",
                        axis=_length_axis(frame),
                    ),
                    {"rows": frame},
                    label=f"normalised entropy by length{where}, a line for each layer",
                    name=name,
                    tips={"layer": "layer", "tokens": "tokens", "entropy_normalized": "normalised entropy"} | _INTERVAL,
                ),
                python("from attlas.analysis.entropy import entropy_by_length", rows="entropy_by_length(dataset)"),
            )


def _length_axis(frame: pl.DataFrame) -> alt.Axis:
    import altair as alt

    strata = frame.select("stratum", "longest").unique().sort("stratum").rows()
    texts = {str(stratum): f"{longest:,}".replace(",", "\u202f") for stratum, longest in strata}
    label = " : ".join(f"datum.value == {stratum} ? '{text}'" for stratum, text in texts.items()) + " : ''"
    return alt.Axis(values=[stratum for stratum, _ in strata], labelExpr=label, labelOverlap=True, grid=False)


def _by_layer(frame: pl.DataFrame, x: str, y: str, *, x_title: str, y_title: str, axis: alt.Axis) -> alt.TopLevelMixin:
    """A line for each layer; a layer that has one point only has a dot."""
    import altair as alt

    layers = sorted(frame["layer"].unique())
    every = -(-len(layers) // _LEGEND_LAYERS)
    colour = alt.Color("layer:O", title="layer", legend=alt.Legend(values=[*layers[:-1:every], layers[-1]])).scale(
        domain=layers, range=[layer_colour(n, len(layers)) for n in range(len(layers))]
    )
    base = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X(f"{x}:Q", title=x_title, axis=axis).scale(nice=False, padding=8),
        y=alt.Y(f"{y}:Q", title=y_title, axis=alt.Axis(tickCount=5)).scale(zero=False),
        color=colour,
    )
    points = base.mark_circle(size=22, opacity=1, tooltip=TIP)
    return alt.layer(base.mark_line(strokeWidth=1.6), points).properties(width=NARROW, height=_HEIGHT)


def residual_columns(content: Content) -> list[tuple[str, str, str]]:
    """The columns of the residual panels that have values, with their titles and subtitles."""
    columns = []
    for median, (mean, title, subtitle) in _MEDIANS.items():
        if has_values(content.residual, median):
            columns.append((median, title, f"{subtitle}, median token"))
        else:
            massive = f"{subtitle}, mean over all tokens, massive ones too (--statistics {median})"
            columns.append((mean, title, massive))
    return [panel for panel in (*columns, *_RESIDUAL) if has_values(content.residual, panel[0])]


def residual_figures(content: Content) -> Iterator[Figure]:
    """For each stack and column the stream through depth, a line with its interval for each site."""
    for column, title, subtitle in residual_columns(content):
        values = content.residual.filter(pl.col(column).is_not_null())
        for stack, where, name in of_stacks(content, column.replace("_", "-")):
            rows = values.filter(pl.col("stack") == stack)
            if rows.height:
                frame = rows.select(
                    "layer",
                    pl.col("site").str.replace_all("_", " ", literal=True),
                    estimate=column,
                    low=f"{column}_low",
                    high=f"{column}_high",
                )
                yield Figure(
                    name,
                    f"{title}{where}",
                    subtitle,
                    chart_fragment(
                        _through_depth(frame),
                        {"rows": frame},
                        label=f"{title} by layer{where}, a line for each site, with 95 % intervals",
                        name=name,
                        tips={"layer": "layer", "site": "site", "estimate": "mean"} | _INTERVAL,
                    ),
                    python(
                        "from attlas.analysis.residual import residual_through_depth",
                        rows=f'residual_through_depth(dataset, ("{column}",))',
                    ),
                    dedent(f"""
                        SELECT stack, layer, site, SUM({column} * tokens) / SUM(tokens) FILTER ({column} IS NOT NULL) AS {column}
                        FROM residual JOIN sequences USING (sequence_id) GROUP BY ALL ORDER BY ALL"""),
                )


def _through_depth(frame: pl.DataFrame) -> alt.TopLevelMixin:
    import altair as alt

    present = [site for site in SITES if site.replace("_", " ") in set(frame["site"])]
    logarithmic = needs_logarithm(frame["estimate"])
    scale = alt.Scale(type="log", nice=True) if logarithmic else alt.Scale(zero=False)
    legend = alt.Legend(orient="top", columns=3, symbolOpacity=1)
    colour = alt.Color("site:N", title=None, legend=legend).scale(
        domain=[site.replace("_", " ") for site in present], range=[_SITE_COLOURS[site] for site in present]
    )
    axis = alt.Axis(tickCount=3, format="~g", grid=False) if logarithmic else alt.Axis(tickCount=5)
    base = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, tickCount=8, format="d", grid=False)).scale(
            nice=False, padding=8
        ),
        color=colour,
    )
    y = alt.Y("estimate:Q", title=None, axis=axis, scale=scale)
    area = base.transform_filter("isValid(datum.low)" + (" && datum.low > 0" if logarithmic else "")).mark_area(
        opacity=0.18
    )
    points = base.mark_point(size=18, filled=True, tooltip=TIP).encode(
        y=y,
        shape=alt.Shape("site:N", title=None, legend=legend).scale(domain=[site.replace("_", " ") for site in present]),
    )
    return alt.layer(
        area.encode(y=alt.Y("low:Q", title=None, axis=axis, scale=scale), y2="high:Q"),
        base.mark_line(strokeWidth=1.6).encode(y=y),
        points,
    ).properties(width=NARROW, height=_HEIGHT)
