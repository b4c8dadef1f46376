"""The charts of the report, each with a table of its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from attlas.analysis.report.content import Content, has_values
from attlas.analysis.report.figures import RAMP, Curve, chart
from attlas.analysis.report.numbers import count, estimate, format_number, interval, plural
from attlas.analysis.residual import SITES

# one massive token makes a mean of norms say nothing about the others: medians over tokens where these were measured
_MEDIAN_PANELS = {
    "stream_norm_median": ("stream_norm", "Stream norm", "size of the stream before the sublayer"),
    "update_ratio_median": ("update_ratio", "Update ratio", "size of the update against the stream"),
}
_RESIDUAL_PANELS = (
    ("update_cosine", "Update cosine", "writes something new (0), sharpens (+) or erases (−)"),
    ("anisotropy", "Anisotropy", "mean cosine between different tokens"),
    ("outlier_ratio", "Outlier ratio", "how much the largest dimension stands out"),
    ("max_abs", "Largest activation", "largest entry of the stream: of massive tokens, mean over sequences"),
)
_MAX_HEADS_WITH_TABLES = 400  # models with more heads have no tables beside their distance panels
_OCTAVES = 6  # the scale of attention over opportunity reaches from 2^−6 to 2^6
_LEGEND_LAYERS = 16


def distance_panels(content: Content) -> Iterator[dict[str, Any]]:
    ticks = [(float(o), _times(o)) for o in range(-_OCTAVES, _OCTAVES + 1, 2)]
    for (stack, layer), rows in content.offsets.group_by("stack", "layer", maintain_order=True):
        name = f"{stack} layer {layer}" if len(content.stacks) > 1 else f"Layer {layer}"
        reach = max((abs(b) for b in rows["bin"]), default=1)
        yield {
            "title": name,
            "figure": chart(
                _head_curves(rows),
                title=f"{name}: attention over opportunity by signed distance, a line per head",
                x_ticks=_distance_ticks(reach),
                x_label="signed distance in tokens (doubling bins)",
                y_ticks=ticks,
                baseline=0.0,
                markers=False,
            ),
            "table": _distance_table(rows) if content.heads.height <= _MAX_HEADS_WITH_TABLES else None,
        }


def _times(octaves: int) -> str:
    return "1" if octaves == 0 else f"{2**octaves}×" if octaves > 0 else f"1/{2**-octaves}"


def _head_curves(rows: pl.DataFrame) -> list[Curve]:
    # values beyond the scale are drawn at its edge
    octaves = pl.col("ratio").log(2).clip(-_OCTAVES, _OCTAVES)
    return [
        Curve(
            f"{head['label'][0]} ({head['kind'][0]})",
            head.filter(pl.col("ratio").is_not_null()).select("bin", octaves).rows(),
            f"headline k-{head['kind'][0]}",
            id=head["id"][0],
        )
        for head in rows.partition_by("id", maintain_order=True)
    ]


def _distance_table(rows: pl.DataFrame) -> dict[str, Any]:
    """Attention over opportunity, a row per distance bin and a column per head."""
    wide = rows.pivot("label", index=["bin", "low", "high"], values="ratio").sort("bin")
    spans = [_span(low, high) for low, high in wide.select("low", "high").iter_rows()]
    labels = wide.columns[3:]
    return {
        "header": ["distance", *labels],
        "rows": [
            [span, *map(format_number, values)]
            for span, values in zip(spans, wide.select(labels).iter_rows(), strict=True)
        ],
    }


def _span(low: int, high: int) -> str:
    """A bin of distances or positions as text: `5 to 8`."""
    text = f"{low}" if low == high else f"{low} to {high}"
    return text.replace("-", "−")


def _distance_ticks(reach: int) -> list[tuple[float, str]]:
    """Ticks at bins, labelled with the distance at which each ends: ±1, ±4, ±16, ±64 …"""
    numbers = [0, *range(1, reach + 1, 2)]
    return [
        (sign * b, "0" if b == 0 else f"{'−' if sign < 0 else ''}{1 if b == 1 else 2 ** (b - 1)}")
        for b in numbers
        for sign in ((1,) if b == 0 else (1, -1))
    ]


def _layer_step(layer: int, layers: int) -> int:
    """The colour step of a layer, from the deeper part of the scale so that the first layer is visible on the page."""
    return 6 + round((RAMP - 7) * layer / max(layers - 1, 1))


def _layer_steps(content: Content) -> list[tuple[int, int]]:
    highest = content.heads["layer"].max()
    last = highest if isinstance(highest, int) else 0
    return [(layer, _layer_step(layer, last + 1)) for layer in range(last + 1)]


def layer_legend(content: Content) -> list[tuple[int, int]]:
    """(layer, colour step) of the layers in the legend: of a deep model only some, the first and last included."""
    layers = _layer_steps(content)
    every = math.ceil(len(layers) / _LEGEND_LAYERS)
    return [*layers[:-1:every], layers[-1]]


def entropy_panels(content: Content) -> list[dict[str, Any]]:
    panels = []
    steps = dict(_layer_steps(content))
    for stack in content.stacks:
        where = f", {stack}" if len(content.stacks) > 1 else ""
        positions = content.positions.filter(pl.col("stack") == stack)
        curves = [
            Curve(
                f"Layer {layer}",
                rows.select("bin", "entropy_nats").rows(),
                f"s{steps[layer]}",
                titles=[
                    f"layer {layer}, positions {low}–{high}: {format_number(value)} nats"
                    for low, high, value in rows.select("low", "high", "entropy_nats").iter_rows()
                ],
            )
            for (layer,), rows in positions.group_by("layer", maintain_order=True)
        ]
        ticks = positions.select("bin", "low").unique().sort("bin").rows()
        panels.append(
            {
                "title": f"Entropy by position{where}",
                "subtitle": "nats, mean over heads; positions in doubling bins",
                "figure": chart(
                    curves,
                    title=f"Entropy in nats by position, a line per layer{where}",
                    x_ticks=[(b, count(low)) for b, low in ticks],
                    x_label="position of the query (first of its bin)",
                ),
                "table": _curve_table("position", ticks, curves),
            }
        )
        panels.append(_length_panel(content, stack, where, steps))
    return panels


def _length_panel(content: Content, stack: str, where: str, steps: dict[int, int]) -> dict[str, Any]:
    lengths = content.lengths.filter((pl.col("stack") == stack) & pl.col("entropy_normalized").is_not_null())
    column = "entropy_normalized"
    curves = [
        Curve(
            f"Layer {layer}",
            rows.select("stratum", column).rows(),
            f"s{steps[layer]}",
            band=rows.select(f"{column}_low", f"{column}_high").rows(),
            titles=[
                f"layer {layer}, {low}–{high} tokens: {estimate(value, bottom, top)} ({interval(bottom, top)}; {plural(documents, 'document')})"
                for low, high, value, bottom, top, documents in rows.select(
                    "tokens_low", "tokens_high", column, f"{column}_low", f"{column}_high", "documents"
                ).iter_rows()
            ],
        )
        for (layer,), rows in lengths.group_by("layer", maintain_order=True)
    ]
    ticks = lengths.select("stratum", "tokens_high").unique().sort("stratum").rows()
    return {
        "title": f"Entropy by sequence length{where}",
        "subtitle": "share of the maximum, with 95 % bands; in strata of length, which bounds entropy",
        "figure": chart(
            curves,
            title=f"Normalised entropy by sequence length, a line per layer{where}",
            x_ticks=[(s, f"≤ {count(high)}") for s, high in ticks],
            x_label="tokens in the sequence",
            pad=0.2,
        ),
        "table": _curve_table("tokens up to", ticks, curves),
    }


def _curve_table(label: str, ticks: Sequence[tuple[int, int]], curves: Sequence[Curve]) -> dict[str, Any]:
    """The numbers of a chart as a table."""
    values = [dict(curve.points) for curve in curves]
    return {
        "header": [label, *(curve.label for curve in curves)],
        "rows": [[count(name), *(format_number(v.get(x)) for v in values)] for x, name in ticks],
    }


def residual_columns(content: Content) -> list[tuple[str, str, str]]:
    """(column, title, subtitle) of the panels of the stream that this dataset can show."""
    columns = []
    for median, (mean, title, subtitle) in _MEDIAN_PANELS.items():
        if has_values(content.residual, median):
            columns.append((median, title, f"{subtitle}, median token"))
        else:
            columns.append((mean, title, f"{subtitle}, mean over all tokens, massive ones too (--statistics {median})"))
    return [panel for panel in (*columns, *_RESIDUAL_PANELS) if has_values(content.residual, panel[0])]


def residual_panels(content: Content) -> list[dict[str, Any]]:
    panels = []
    for column, title, subtitle in residual_columns(content):
        values = content.residual.filter(pl.col(column).is_not_null())
        for (stack,), rows in values.group_by("stack", maintain_order=True):
            where = f", {stack}" if values["stack"].n_unique() > 1 else ""
            sites = rows.group_by("site", maintain_order=True)
            curves = [_site_curve(column, site, site_rows) for (site,), site_rows in sites]
            layers = sorted(set(rows["layer"].to_list()))
            every = max(1, len(layers) // 8)
            panels.append(
                {
                    "title": f"{title}{where}",
                    "subtitle": subtitle,
                    "figure": chart(
                        curves,
                        title=f"{title} by layer, a line per site, with 95 % intervals{where}",
                        x_ticks=[(layer, str(layer)) for layer in layers[::every]],
                        x_label="layer",
                        pad=0.2,
                    ),
                    "table": _curve_table("layer", [(layer, layer) for layer in layers], curves),
                }
            )
    return panels


def _site_curve(column: str, site: str, rows: pl.DataFrame) -> Curve:
    low, high = f"{column}_low", f"{column}_high"
    return Curve(
        site.replace("_", " "),
        rows.select("layer", column).rows(),
        f"site-{site if site in SITES else 'other'}",
        band=rows.select(low, high).rows(),
        titles=[
            f"layer {layer} {site}: {estimate(value, bottom, top)} ({interval(bottom, top)})"
            for layer, value, bottom, top in rows.select("layer", column, low, high).iter_rows()
        ],
    )
