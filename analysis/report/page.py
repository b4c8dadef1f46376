"""From the content to one HTML page with everything in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from analysis.info import describe
from analysis.kinds import kinds_table
from analysis.report import findings
from analysis.report.content import Content
from analysis.report.figures import RAMP, Cell, Curve, atlas, chart, heat_map
from analysis.report.numbers import count, estimate, half_width, interval, percent, plural, shown
from analysis.residual import SITES
from extract.schema import TABLES

_HERE = Path(__file__).parent
# stops of the sequential scale, shallow to deep, as a sea chart has them; the dark page begins in the dark
_LIGHT = ("#f3ead8", "#cfe0cf", "#8dc3b8", "#4795a6", "#235f8a", "#12325f")
_DARK = ("#1d2733", "#1f4257", "#20667a", "#35928f", "#86c39a", "#f2ecc6")


@dataclass(frozen=True)
class Map:
    """A column that is shown as a map of heads."""

    column: str
    title: str
    says: str
    unit: str
    highest: float | None = None  # the end of the scale where it is a fixed one


MAPS = (
    Map(
        "entropy_normalized",
        "Entropy",
        "how evenly a head spreads over the keys it may see",
        "share of the maximum",
        1.0,
    ),
    Map("attended_keys", "Attended keys", "how many evenly attended keys would have that entropy", "keys"),
    Map("distance_tokens", "Distance", "how far the head looks, either way", "tokens"),
    Map("distance_vs_uniform", "Distance against an even head", "below 1 the head stays near", "times"),
    Map("mass_self", "Itself", "weight on the token itself", "share"),
    Map("mass_previous", "Previous token", "weight on the token before", "share"),
    Map("mass_next", "Next token", "weight on the token after", "share"),
    Map("mass_first", "First token", "weight on the sequence's first token", "share"),
    Map("mass_separator", "Separators", "weight on tokens that end or part sequences", "share"),
    Map("mass_punctuation", "Punctuation", "weight on punctuation and symbols", "share"),
    Map("mass_same_token", "Same token", "weight on other copies of the query's token", "share"),
    Map("mass_induction", "Induction", "weight on what followed an earlier copy", "share"),
    Map("mutual_information_nats", "Mutual information", "how much the query decides where the head looks", "nats"),
    Map("received_max", "Strongest key", "largest mean weight that one key receives", "share"),
    Map("update_norm", "Write", "norm of what the head adds to the stream", "norm"),
    Map("value_weighted_first", "Written from the first token", "its share of what the head writes", "share"),
)
TABLE_COLUMNS = (
    "entropy_normalized",
    "attended_keys",
    "distance_tokens",
    "distance_vs_uniform",
    "mass_self",
    "mass_previous",
    "mass_next",
    "mass_first",
    "mass_separator",
    "mass_punctuation",
    "mass_same_token",
    "mutual_information_nats",
    "update_norm",
)
RESIDUAL_PANELS = (
    ("stream_norm", "Stream norm", "size of the stream before the sublayer"),
    ("update_ratio", "Update ratio", "size of the update against the stream"),
    ("update_cosine", "Update cosine", "writes something new (0), sharpens (+) or erases (−)"),
    ("anisotropy", "Anisotropy", "mean cosine between different tokens"),
    ("outlier_ratio", "Outlier ratio", "how far the largest dimension stands out"),
    ("max_abs", "Largest activation", "largest entry of the stream, mean over sequences"),
)
_MOST_NUMBERS = 400  # heads up to which every distance panel has its table beside it
_OCTAVES = 6  # attention against opportunity is shown from 2^−6 to 2^6 times
_LEGEND_LAYERS = 16


def render(content: Content) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(_HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=shown, percent=percent, count=count)
    return environment.get_template("page.html").render(_context(content))


def _context(content: Content) -> dict[str, Any]:
    model, corpus = content.manifest.get("model", {}), content.manifest.get("corpus", {})
    return {
        "model": model.get("name", "model"),
        "corpus": corpus.get("name", "corpus"),
        "tiles": _tiles(content),
        "facts": _facts(content),
        "notes": findings.notes(content),
        "highlights": findings.highlights(content),
        "kind_sentence": findings.kind_sentence(content),
        "kind_counts": findings.kind_counts(content),
        "kinds": kinds_table().rows(named=True),
        "atlases": [(stack, _atlas(content, stack)) for stack in content.stacks],
        "maps": list(_maps(content)),
        "steps": range(RAMP),
        "distance": list(_distance_panels(content)),
        "charts": list(_entropy_panels(content)),
        "residual": list(_residual_panels(content)),
        "sites": [s for s in SITES if s in set(content.residual["site"])],
        "layer_steps": _some_layers(content),
        "table": _table(content),
        "defects": _defects(content),
        "formulas": _formulas(content),
        "provenance": describe(content.manifest),
        "several": len(content.stacks) > 1,
        "light": _ramp(_LIGHT),
        "dark": _ramp(_DARK),
        "style": Markup((_HERE / "style.css").read_text("utf-8")),
        "script": Markup((_HERE / "page.js").read_text("utf-8")),
    }


def _tiles(content: Content) -> list[tuple[str, str]]:
    corpus = content.manifest.get("corpus", {})
    layers = content.heads.select(pl.struct("stack", "layer").n_unique()).item() if content.heads.height else 0
    return [
        (count(layers), "layers"),
        (count(content.heads.height), "heads"),
        (count(content.documents), "documents"),
        (count(corpus.get("sequences", 0)), "sequences"),
        (count(corpus.get("tokens", 0)), "tokens"),
    ]


def _facts(content: Content) -> str:
    manifest = content.manifest
    parts = [manifest.get("model", {}).get("architecture"), manifest.get("dtype"), manifest.get("device")]
    engine = manifest.get("engine")
    return " · ".join([str(p) for p in parts if p] + ([f"engine {engine}"] if engine else []))


def _maps(content: Content) -> list[dict[str, Any]]:
    shown_maps = []
    for item in MAPS:
        if item.column not in content.heads.columns or not content.heads[item.column].is_not_null().any():
            continue
        top = content.heads[item.column].max()
        high = item.highest or (float(top) if isinstance(top, (int, float)) and top > 0 else 1.0)
        drawn = []
        for stack in content.stacks:
            cells = [_cell(row, item.column) for row in _of_stack(content.heads, stack)]
            drawn.append((stack, heat_map(cells, title=f"{item.title} by layer and head, {stack}", low=0.0, high=high)))
        shown_maps.append({"map": item, "low": "0", "high": shown(high), "drawn": drawn})
    return shown_maps


def _of_stack(frame: pl.DataFrame, stack: str) -> list[dict[str, Any]]:
    return frame.filter(pl.col("stack") == stack).rows(named=True)


def _cell(row: dict[str, Any], column: str) -> Cell:
    value = row[column]
    said = (
        f"{shown(value)} ({interval(row[f'{column}_low'], row[f'{column}_high'])})"
        if value is not None
        else "undefined"
    )
    return Cell(row["id"], row["label"], row["layer"], row["head"], value, f"{row['label']}: {column} {said}")


def _atlas(content: Content, stack: str) -> Markup:
    profiles = {
        key[0]: list(zip(rows["bin"].to_list(), rows["mass"].fill_null(0).to_list(), strict=True))
        for key, rows in content.offsets.filter(pl.col("stack") == stack).group_by("id", maintain_order=True)
    }
    cells = [
        Cell(
            row["id"],
            row["label"],
            row["layer"],
            row["head"],
            row["entropy_normalized"],
            f"{row['label']}: {row['kind']} ({percent(row['agreement'])} of replicates agree), "
            f"entropy {percent(row['entropy_normalized'])}, distance {shown(row['distance_tokens'])} tokens",
            row["kind"],
            profiles.get(row["id"], ()),
        )
        for row in _of_stack(content.heads, stack)
    ]
    return atlas(cells, title=f"Every head of {stack} as the shape of its attention over signed distance")


def _distance_panels(content: Content) -> Iterator[dict[str, Any]]:
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
            "table": _distance_table(rows) if content.heads.height <= _MOST_NUMBERS else None,
        }


def _times(octaves: int) -> str:
    return "1" if octaves == 0 else f"{2**octaves}×" if octaves > 0 else f"1/{2**-octaves}"


def _head_curves(rows: pl.DataFrame) -> list[Curve]:
    # what lies beyond the scale is drawn on its edge
    octaves = pl.col("ratio").log(2).clip(-_OCTAVES, _OCTAVES)
    return [
        Curve(
            f"{own['label'][0]} ({own['kind'][0]})",
            own.filter(pl.col("ratio").is_not_null()).select("bin", octaves).rows(),
            f"headline k-{own['kind'][0]}",
            id=own["id"][0],
        )
        for own in rows.partition_by("id", maintain_order=True)
    ]


def _distance_table(rows: pl.DataFrame) -> dict[str, Any]:
    """Attention over opportunity, a row per distance bin and a column per head."""
    wide = rows.pivot("label", index=["bin", "low", "high"], values="ratio").sort("bin")
    spans = [shown_span(low, high) for low, high in wide.select("low", "high").iter_rows()]
    labels = wide.columns[3:]
    return {
        "header": ["distance", *labels],
        "rows": [
            [span, *map(shown, values)] for span, values in zip(spans, wide.select(labels).iter_rows(), strict=True)
        ],
    }


def shown_span(low: int, high: int) -> str:
    """A bin of distances or positions: 5 to 8."""
    text = f"{low}" if low == high else f"{low} to {high}"
    return text.replace("-", "−")


def _distance_ticks(reach: int) -> list[tuple[float, str]]:
    """Bin numbers under the distances at which they end: ±1, ±4, ±16, ±64 …"""
    numbers = [0, *range(1, reach + 1, 2)]
    return [
        (sign * b, "0" if b == 0 else f"{'−' if sign < 0 else ''}{1 if b == 1 else 2 ** (b - 1)}")
        for b in numbers
        for sign in ((1,) if b == 0 else (1, -1))
    ]


def _layer_step(layer: int, layers: int) -> int:
    """Layers take the deeper half of the scale, so that the first is visible on the page."""
    return 6 + round((RAMP - 7) * layer / max(layers - 1, 1))


def _layer_legend(content: Content) -> list[tuple[int, int]]:
    highest = content.heads["layer"].max()
    last = highest if isinstance(highest, int) else 0
    return [(layer, _layer_step(layer, last + 1)) for layer in range(last + 1)]


def _some_layers(content: Content) -> list[tuple[int, int]]:
    """The legend of a deep model names some layers only, the first and the last among them."""
    layers = _layer_legend(content)
    every = math.ceil(len(layers) / _LEGEND_LAYERS)
    return [*layers[:-1:every], layers[-1]]


def _entropy_panels(content: Content) -> list[dict[str, Any]]:
    panels = []
    steps = dict(_layer_legend(content))
    for stack in content.stacks:
        where = f", {stack}" if len(content.stacks) > 1 else ""
        positions = content.positions.filter(pl.col("stack") == stack)
        curves = [
            Curve(
                f"Layer {layer}",
                rows.select("bin", "entropy_nats").rows(),
                f"s{steps[layer]}",
                titles=[
                    f"layer {layer}, positions {low}–{high}: {shown(value)} nats"
                    for low, high, value in rows.select("low", "high", "entropy_nats").iter_rows()
                ],
            )
            for (layer,), rows in positions.group_by("layer", maintain_order=True)
        ]
        ticks = positions.select("bin", "low").unique().sort("bin").rows()
        panels.append(
            {
                "title": f"Entropy by position{where}",
                "says": "nats, mean over heads; positions in doubling bins",
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
        "says": "share of the maximum, with 95 % bands; strata of length, so that like meets like",
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
    """The numbers of a chart, for those who read them rather than see them."""
    values = [dict(curve.points) for curve in curves]
    return {
        "header": [label, *(curve.label for curve in curves)],
        "rows": [[count(name), *(shown(v.get(x)) for v in values)] for x, name in ticks],
    }


def _residual_panels(content: Content) -> list[dict[str, Any]]:
    panels = []
    for column, title, says in RESIDUAL_PANELS:
        known = content.residual.filter(pl.col(column).is_not_null())
        if not known.height:
            continue
        for (stack,), rows in known.group_by("stack", maintain_order=True):
            where = f", {stack}" if known["stack"].n_unique() > 1 else ""
            curves = [_site_curve(column, site, own) for (site,), own in rows.group_by("site", maintain_order=True)]
            layers = sorted(set(rows["layer"].to_list()))
            every = max(1, len(layers) // 8)
            panels.append(
                {
                    "title": f"{title}{where}",
                    "says": says,
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


def _table(content: Content) -> dict[str, Any]:
    units = {c.name: c.unit for c in TABLES["heads"].facts}
    columns = [c for c in TABLE_COLUMNS if c in content.heads.columns and content.heads[c].is_not_null().any()]
    rows = [
        {
            "id": row["id"],
            "label": row["label"],
            "kind": row["kind"],
            "agreement": row["agreement"],
            "cells": [_table_cell(row, column) for column in columns],
        }
        for row in content.heads.iter_rows(named=True)
    ]
    header = [(c, c.removesuffix("_nats").removesuffix("_tokens").replace("_", " "), units.get(c, "")) for c in columns]
    return {"columns": header, "rows": rows}


def _table_cell(row: dict[str, Any], column: str) -> dict[str, Any]:
    value, low, high = row[column], row[f"{column}_low"], row[f"{column}_high"]
    return {
        "sort": "" if value is None else f"{value:.9g}",
        "value": estimate(value, low, high),
        "half": "" if value is None else half_width(low, high),
        "title": "undefined" if value is None else interval(low, high),
    }


def _defects(content: Content) -> list[dict[str, Any]]:
    found = []
    for rule in content.rules.iter_rows(named=True):
        own = content.defects.filter(pl.col("defect") == rule["defect"])
        found.append(
            {**rule, "places": [_place(row, several=len(content.stacks) > 1) for row in own.iter_rows(named=True)]}
        )
    return sorted(found, key=lambda d: (d["found"] is None, not d["found"]))


def _place(row: dict[str, Any], *, several: bool) -> tuple[str, str, str]:
    """Where a defect is, what shows it, and the interval of its value."""
    name = (
        f"L{row['layer']}H{row['head']}" if row["head"] is not None else f"L{row['layer']} {row['site'] or ''}".strip()
    )
    where = f"{row['stack']} {name}" if several else name
    return where, row["evidence"], "" if row["low"] is None else interval(row["low"], row["high"])


def _formulas(content: Content) -> list[tuple[str, str, str, str, str]]:
    used = {m.column for m in MAPS} | set(TABLE_COLUMNS)
    heads = [("heads", c) for c in TABLES["heads"].facts if c.name in used and c.name in content.heads.columns]
    panels = {column for column, _, _ in RESIDUAL_PANELS}
    residual = [("residual", c) for c in TABLES["residual"].facts if c.name in panels]
    return [(f"{table}.{c.name}", c.formula, c.unit, c.meaning, c.reference) for table, c in heads + residual]


def _ramp(stops: Sequence[str]) -> list[str]:
    """The sequential scale: RAMP colours evenly along the stops."""
    colours = [tuple(int(stop[i : i + 2], 16) for i in (1, 3, 5)) for stop in stops]
    found = []
    for i in range(RAMP):
        place = i / (RAMP - 1) * (len(colours) - 1)
        at = min(int(place), len(colours) - 2)
        mixed = [round(a + (b - a) * (place - at)) for a, b in zip(colours[at], colours[at + 1], strict=True)]
        found.append("#{:02x}{:02x}{:02x}".format(*mixed))
    return found
