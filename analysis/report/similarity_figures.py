"""Figures of heads that are alike: the matrix of similarities, with like heads next to each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from attlas.analysis.heads import HEAD
from attlas.analysis.report.charts import TIP, chart_fragment
from attlas.analysis.report.content import Content
from attlas.analysis.report.figure import Figure, python
from attlas.analysis.report.head_figures import of_stacks
from attlas.analysis.report.numbers import count, plural
from attlas.analysis.similarity import SAME_CLUSTER, StackSimilarity

if TYPE_CHECKING:
    import altair as alt

_MOST_HEADS = 320  # of larger models the matrix is one of layers
_SIDE = 600  # of a matrix, in pixels
_LARGEST_CELL = 24
_SVG_CELLS = 2000
_TIPS_OF_HEADS = {
    "label": "head",
    "kind": "kind",
    "other_label": "and",
    "other_kind": "kind",
    "similarity": "similarity",
}
_TIPS_OF_LAYERS = {"layer": "layer", "other_layer": "and layer", "similarity": "mean similarity"}
_STRIP = 14  # the width of the strip of kinds, in pixels


def similarity_figures(content: Content) -> Iterator[Figure]:
    """For each stack a matrix of heads, in the order of their clusters, or of layers, if there are many heads."""
    similarity = {s.heads["stack"][0]: s for s in content.similarities if s.heads.height}
    for stack, where, name in of_stacks(content, "similarity"):
        if stack not in similarity or similarity[stack].heads.height < 2:
            continue
        of_heads = similarity[stack].heads.height <= _MOST_HEADS
        make = _matrix_of_heads if of_heads else _matrix_of_layers
        chart, data = make(content, similarity[stack])
        yield Figure(
            name,
            f"Similarity of {'heads' if of_heads else 'layers'}{where}",
            _reading(of_heads=of_heads),
            chart_fragment(
                chart,
                data,
                label=f"similarity of {'heads' if of_heads else 'layers'}{where}",
                name=name,
                tips=_TIPS_OF_HEADS if of_heads else _TIPS_OF_LAYERS,
                cross="order" if of_heads else None,
                on_canvas=data["rows"].height > _SVG_CELLS,
            ),
            python(
                "from attlas.analysis.similarity import head_similarity",
                rows=f'head_similarity(dataset, by="{content.similarity_by}")',
            ),
        )


def similarity_sentence(content: Content) -> str:
    """What is compared, and how many clusters there are."""
    what = (
        "the keys that they look at, row by row (Bhattacharyya coefficient of their patterns: 1 if equal, 0 without a common key)"
        if content.similarity_by == "pattern"
        else "how their attention is distributed over signed distance (Bhattacharyya coefficient, 1 if equal), because this dataset has no "
        "pairs, which compare patterns"
    )
    sizes = content.clusters.group_by("stack", "cluster").len().filter(pl.col("len") > 1)["len"]
    in_clusters = int(sizes.sum())
    return (
        f"Heads are compared by {what}. {count(in_clusters)} of {plural(content.heads.height, 'head')} lie in {plural(len(sizes), 'cluster')} of at least "
        f"two whose mean similarity is {SAME_CLUSTER:g} or more. Heads at rest are alike whatever they do awake, and so are heads that attend evenly."
    )


def _reading(*, of_heads: bool) -> str:
    if of_heads:
        return (
            "Like heads are next to each other (average linkage). The strip on the left has the colours of the kinds."
        )
    return f"The mean similarity of the heads of two layers; a matrix of heads has room for {_MOST_HEADS}."


def _matrix_of_heads(
    content: Content, similarity: StackSimilarity
) -> tuple[alt.TopLevelMixin, dict[str, pl.DataFrame]]:
    import altair as alt

    numbered = similarity.heads.with_row_index("|row")
    order = (
        numbered.join(content.clusters, on=HEAD)
        .sort("order")
        .join(content.heads.select(*HEAD, "id", "label", "kind"), on=HEAD, maintain_order="left")
    )
    places = order["|row"].to_numpy()
    matrix = similarity.matrix[np.ix_(places, places)]
    size = len(places)
    names = order.select("order", "id", "label", "kind", "cluster", end=pl.col("order") + 1)
    cell = max(1, min(_LARGEST_CELL, _SIDE // size))  # whole pixels, without seams between cells
    strip = -(-_STRIP // cell)
    axis = alt.Axis(labels=False, ticks=False, domain=False, grid=False)
    cells = (
        alt.Chart(alt.NamedData("rows"))
        .mark_rect(tooltip=TIP)
        .encode(
            x=alt.X("other_order:Q", title=None, axis=axis, scale=alt.Scale(domain=[-strip, size], nice=False)),
            x2="other_end:Q",
            y=alt.Y("order:Q", title=None, axis=axis, scale=alt.Scale(domain=[size, 0], nice=False)),
            y2="end:Q",
            color=_colour(),
        )
    )
    kinds = (
        alt.Chart(alt.NamedData("order"))
        .transform_calculate(start=f"-{strip}", stop=f"-{strip * 0.2}")
        .mark_rect(tooltip=TIP)
        .encode(
            x="start:Q",
            x2="stop:Q",
            y="order:Q",
            y2="end:Q",
            color=alt.Color("kind:N", legend=None).scale(
                domain=(kinds := sorted(names["kind"].unique())),
                range=[f"var(--{'mixed' if kind == 'none' else kind})" for kind in kinds],
            ),
        )
    )
    chart = (
        alt.layer(cells, kinds)
        .resolve_scale(color="independent")
        .properties(width=cell * (size + strip), height=cell * size)
    )
    return chart, {"rows": pl.DataFrame({"similarity": matrix.ravel()}), "order": names}


def _colour() -> alt.Color:
    import altair as alt

    legend = alt.Legend(orient="bottom", gradientLength=200, tickCount=3)
    return alt.Color("similarity:Q", title="similarity", legend=legend).scale(domain=[0, 1], scheme="viridis")


def _matrix_of_layers(
    content: Content, similarity: StackSimilarity
) -> tuple[alt.TopLevelMixin, dict[str, pl.DataFrame]]:
    import altair as alt

    del content
    rows = _means_of_layers(similarity)
    every = max(1, -(-rows["layer"].n_unique() // 16))
    axis = alt.Axis(labelAngle=0, labelExpr=f"datum.value % {every} == 0 ? 'L' + datum.value : ''", ticks=False)
    chart = (
        alt.Chart(alt.NamedData("rows"))
        .mark_rect(tooltip=TIP)
        .encode(
            x=alt.X("other_layer:O", title=None, axis=axis),
            y=alt.Y("layer:O", title=None, axis=axis),
            color=_colour(),
        )
        .properties(width=_SIDE, height=_SIDE)
    )
    return chart, {"rows": rows}


def _means_of_layers(similarity: StackSimilarity) -> pl.DataFrame:
    """The mean similarity of the heads of each two layers, without that of heads with themselves."""
    layers = similarity.heads["layer"].to_numpy()
    values, places = np.unique(layers, return_inverse=True)
    matrix = similarity.matrix.astype(np.float64).copy()
    np.fill_diagonal(matrix, np.nan)
    sums, counts = (_by_layer(part, places, len(values)) for part in (np.nan_to_num(matrix), ~np.isnan(matrix)))
    with np.errstate(invalid="ignore"):
        means = sums / counts
    one, other = np.indices(means.shape)
    return pl.DataFrame(
        {"layer": values[one.ravel()], "other_layer": values[other.ravel()], "similarity": means.ravel()}
    ).with_columns(pl.col("similarity").fill_nan(None))


def _by_layer(matrix: NDArray, places: NDArray[np.intp], layers: int) -> NDArray[np.float64]:
    """Sums over the heads of each two layers."""
    rows = np.zeros((layers, matrix.shape[1]))
    np.add.at(rows, places, matrix)
    sums = np.zeros((layers, layers))
    np.add.at(sums, places, rows.T)
    return sums
