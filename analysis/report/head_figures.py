"""Figures with a mark for each head. They have a parameter `chosen`, the id of the head that the reader chose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import polars as pl

from attlas.analysis.kinds import REST_KINDS
from attlas.analysis.report.charts import TIP, chart_fragment
from attlas.analysis.report.content import Content
from attlas.analysis.report.figure import (
    WIDE,
    Figure,
    bin_text,
    colour_steps,
    dedent,
    doubling_axis,
    python,
    reach_of,
)
from attlas.analysis.report.head_columns import first_column

if TYPE_CHECKING:
    import altair as alt

SHARED = "heads"
_SMALLEST, _LARGEST = 8, 40  # cells of a map, in pixels
_WIDTH, _HEIGHT = 600, 680  # that a map keeps to, if its cells are not too small
_LABEL_WIDTH, _LABEL_HEIGHT = 26, 12  # of H10 and L10, in pixels
_LETTERS = 20  # cells of this size have room for letters
_OCTAVES = 6  # the scale of attention over opportunity reaches from 2^−6 to 2^6
NO_HEAD = -1
_KIND_TIPS = {"label": "head", "kind": "kind", "agreement": "agreement", "rest": "share at rest", "awake": "awake"}
KIND_COLOUR = "'var(--' + (datum.kind == 'none' ? 'mixed' : datum.kind) + ')'"  # an expression


def of_stacks(content: Content, name: str) -> Iterator[tuple[str, str, str]]:
    """Each stack, with what it adds to titles, and the name of its figure: there are several stacks, or its name says nothing."""
    several = len(content.stacks) > 1
    for number, stack in enumerate(content.stacks):
        yield stack, f", {stack}" if several else "", f"{name}-{number}" if several else name


def maps(content: Content, columns: pl.DataFrame) -> Iterator[Figure]:
    """For each stack a map of heads by layers. The page sets the parameters `column`, `low`, `high` and `palette`."""
    row = columns.row(by_predicate=pl.col("name") == first_column(columns), named=True)
    for stack, where, name in of_stacks(content, "map"):
        yield Figure(
            name,
            f"Heads by layer{where}",
            "",
            chart_fragment(
                _map(content, stack, row),
                {},
                shared=[SHARED],
                label=f"heads by layer{where}: the mean of the chosen column as colour",
                name=name,
                tips={"label": "head", "kind": "kind", "value": "mean", "half": "±"},
            ),
            python("from attlas.analysis.heads import head_estimates", rows='head_estimates(dataset, ["{column}"])'),
            dedent("""
                SELECT stack, layer, head, SUM({column} * query_rows) / SUM(query_rows) FILTER ({column} IS NOT NULL) AS {column}
                FROM heads GROUP BY ALL ORDER BY ALL"""),
        )


def _map(content: Content, stack: str, row: dict[str, Any]) -> alt.TopLevelMixin:
    import altair as alt

    value = "datum[column]"
    palette = "d" if row["signed"] else "r"
    params = [
        alt.param(name=name, value=given)
        for name, given in {"column": row["name"], "low": row["low"], "high": row["high"], "palette": palette}.items()
    ]
    colour = colour_steps("datum.value", "low", "high", letter="palette")
    base = _grid(content, stack).transform_calculate(value=value, half="datum[column + '_half']", colour=colour)
    cells = base.mark_rect(stroke="var(--card)", strokeWidth=0.5, tooltip=TIP).encode(
        color=alt.Color("colour:N", scale=None)
    )
    missing = base.transform_filter("!isValid(datum.value)").mark_text(color="var(--soft)", text="–")
    known = cells.transform_filter("isValid(datum.value)")
    return _sized(alt.layer(known, missing, _chosen(base)), content, stack).add_params(*params, chosen_head())


def _grid(content: Content, stack: str) -> alt.Chart:
    import altair as alt

    width, height = _cells(content, stack)
    labels, down = (
        alt.Axis(
            labelAngle=0,
            orient="top" if letter == "H" else "left",
            labelExpr=f"datum.value % {-(-room // size)} == 0 ? '{letter}' + datum.value : ''",
            ticks=False,
        )
        for letter, size, room in (("H", width, _LABEL_WIDTH), ("L", height, _LABEL_HEIGHT))
    )
    return (
        alt.Chart(alt.NamedData(SHARED))
        .transform_filter(alt.FieldEqualPredicate(field="stack", equal=stack))
        .encode(x=alt.X("head:O", title=None, axis=labels), y=alt.Y("layer:O", title=None, axis=down))
    )


def _cells(content: Content, stack: str) -> tuple[int, int]:
    """The width and height of the cells of a map."""
    heads = content.heads.filter(pl.col("stack") == stack)
    fits = (_WIDTH // heads["head"].n_unique(), _HEIGHT // heads["layer"].n_unique())
    return max(_SMALLEST, min(_LARGEST, fits[0])), max(_SMALLEST, min(_LARGEST, fits[1]))


def _sized(chart: Any, content: Content, stack: str) -> Any:
    import altair as alt

    width, height = _cells(content, stack)
    return chart.properties(width=alt.Step(width), height=alt.Step(height))


def chosen_head() -> alt.Parameter:
    """The parameter that the page sets to the id of the chosen head."""
    import altair as alt

    return alt.param(name="chosen", value=NO_HEAD)


def _chosen(base: alt.Chart) -> alt.Chart:
    return base.transform_filter("datum.id == chosen").mark_rect(fill=None, stroke="var(--accent)", strokeWidth=3)


def kind_maps(content: Content) -> Iterator[Figure]:
    """For each stack the kinds of heads, by layer; with two letters, where there is room, for those who can't tell the colours."""
    import altair as alt

    for stack, where, name in of_stacks(content, "kinds"):
        base = _grid(content, stack).transform_calculate(colour=KIND_COLOUR, letters="slice(datum.kind, 0, 2)")
        cells = base.mark_rect(stroke="var(--card)", strokeWidth=0.5, tooltip=TIP).encode(
            color=alt.Color("colour:N", scale=None)
        )
        layers = [cells, _chosen(base)]
        if min(_cells(content, stack)) >= _LETTERS:
            letters = base.transform_filter("datum.kind != 'none' && datum.kind != 'mixed'")
            layers.insert(1, letters.mark_text(fontSize=10, color="var(--paper)").encode(text="letters:N"))
        yield Figure(
            name,
            f"Kinds{where}",
            "",
            chart_fragment(
                _sized(alt.layer(*layers), content, stack).add_params(chosen_head()),
                {},
                shared=[SHARED],
                label=f"the kind of each head{where}",
                name=name,
                tips=_KIND_TIPS,
            ),
            python("from attlas.analysis.kinds import head_kinds", rows="head_kinds(dataset)"),
        )


def rest_figures(content: Content) -> Iterator[Figure]:
    """For each stack the share of attention at rest, a dot for each head."""
    for stack, where, name in of_stacks(content, "rest"):
        if not content.heads.filter(pl.col("stack") == stack)["rest"].is_not_null().any():
            continue
        yield Figure(
            name,
            f"Attention at rest{where}",
            "The share of each head's attention on the first token, or on massive ones, corrected for chance: attention with nothing "
            "to do. Above the dashed line a head counts as at rest. What it does with the rest of its attention is its second label.",
            chart_fragment(
                _rest_chart(content, stack),
                {"threshold": pl.DataFrame({"at": [REST_KINDS[0].threshold]})},
                shared=[SHARED],
                label=f"the share of attention at rest by layer{where}, a dot for each head",
                name=name,
                tips=_KIND_TIPS,
            ),
            python("from attlas.analysis.kinds import head_kinds", rows="head_kinds(dataset)"),
        )


def _rest_chart(content: Content, stack: str) -> alt.TopLevelMixin:
    import altair as alt

    heads = content.heads.filter(pl.col("stack") == stack)["head"].n_unique()
    base = (
        alt.Chart(alt.NamedData(SHARED))
        .transform_filter(alt.FieldEqualPredicate(field="stack", equal=stack))
        .transform_filter("isValid(datum.rest)")
        # heads of a layer side by side
        .transform_calculate(place=f"datum.layer + ((datum.head + 0.5) / {heads} - 0.5) * 0.6")
        .encode(
            x=alt.X("place:Q", title="layer", axis=alt.Axis(grid=False, tickMinStep=1, format="d")).scale(
                nice=False, padding=12
            ),
            y=alt.Y("rest:Q", title="share at rest").scale(domain=[0, 1]),
        )
    )
    dots = base.mark_circle(size=30, opacity=0.8, color="var(--previous)", tooltip=TIP)
    chosen = base.transform_filter("datum.id == chosen").mark_point(size=140, stroke="var(--accent)", strokeWidth=2.5)
    threshold = (
        alt.Chart(alt.NamedData("threshold")).mark_rule(stroke="var(--soft)", strokeDash=[4, 3]).encode(y="at:Q")
    )
    return alt.layer(threshold, dots, chosen).properties(width=WIDE, height=220).add_params(chosen_head())


def distance_figures(content: Content) -> Iterator[Figure]:
    """For each stack attention over opportunity by signed distance, a line for each head of a layer."""
    for stack, where, name in of_stacks(content, "distance"):
        rows = content.offsets.filter(pl.col("stack") == stack)
        if not rows.height:
            continue
        yield Figure(
            name,
            f"Attention over opportunity by distance{where}",
            "",
            chart_fragment(
                _distance_chart(rows),
                {"rows": _distance_frame(rows), "even": pl.DataFrame({"octaves": [0]})},
                label=f"attention over opportunity by signed distance{where}, a line for each head of a layer",
                name=name,
                tips={
                    "label": "head",
                    "kind": "kind",
                    "distance": "distance",
                    "ratio": "attention ÷ opportunity",
                    "mass": "share of attention",
                    "opportunity": "share of pairs",
                },
                part="layer",
            ),
            python("from attlas.analysis.distance import offset_profile", rows="offset_profile(dataset).collect()"),
            dedent("""
                SELECT stack, layer, head, bin,
                  SUM("sum") / SUM(SUM("sum")) OVER head AS mass,
                  SUM("count") / SUM(SUM("count")) OVER head AS opportunity
                FROM profiles WHERE profile = 'offset' GROUP BY stack, layer, head, bin
                WINDOW head AS (PARTITION BY stack, layer, head) ORDER BY stack, layer, head, bin"""),
        )


def _distance_frame(rows: pl.DataFrame) -> pl.DataFrame:
    octaves = pl.col("ratio").log(2).clip(-_OCTAVES, _OCTAVES)  # values beyond the scale are drawn at its edge
    return rows.select(
        "id",
        "layer",
        "label",
        "kind",
        "bin",
        "mass",
        "opportunity",
        "ratio",
        octaves=octaves,
        distance=bin_text(pl.col("low"), pl.col("high")),
    )


def _distance_chart(rows: pl.DataFrame) -> alt.TopLevelMixin:
    import altair as alt

    layers = sorted(rows["layer"].unique())
    bound = alt.binding_range(min=layers[0], max=layers[-1], step=1, name="layer ")
    layer = (
        alt.param(name="layer", value=layers[0], bind=bound)
        if len(layers) > 1
        else alt.param(name="layer", value=layers[0])
    )
    times = "datum.value == 0 ? '1' : datum.value > 0 ? pow(2, datum.value) + '×' : '1/' + pow(2, -datum.value)"
    base = (
        alt.Chart(alt.NamedData("rows"))
        .transform_filter("isValid(datum.octaves)")
        .transform_calculate(colour=KIND_COLOUR)
        .encode(
            x=alt.X(
                "bin:Q",
                title="signed distance in tokens, doubling bins",
                axis=doubling_axis(reach_of(rows["bin"]), signed=True),
            ).scale(nice=False, domain=[min(rows["bin"]), max(rows["bin"])], padding=6),
            y=alt.Y(
                "octaves:Q",
                title="attention ÷ opportunity",
                axis=alt.Axis(values=list(range(-_OCTAVES, _OCTAVES + 1, 2)), labelExpr=times),
            ).scale(domain=[-_OCTAVES, _OCTAVES]),
            detail="id:N",
        )
    )
    lines = base.mark_line(strokeWidth=1.4, opacity=0.8).encode(color=alt.Color("colour:N", scale=None))
    chosen = (
        base.transform_filter("datum.id == chosen")
        .mark_line(strokeWidth=4)
        .encode(color=alt.Color("colour:N", scale=None))
    )
    points = base.mark_circle(size=50, opacity=0, tooltip=TIP)
    even = alt.Chart(alt.NamedData("even")).mark_rule(stroke="var(--soft)").encode(y=alt.Y("octaves:Q"))
    return alt.layer(even, lines, chosen, points).properties(width=WIDE, height=300).add_params(layer, chosen_head())
