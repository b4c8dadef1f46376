"""Rendering of the report's content as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from markupsafe import Markup

from attlas.analysis.info import describe
from attlas.analysis.kinds import kinds_table
from attlas.analysis.manifest import section
from attlas.analysis.naming import corpus_title, model_title
from attlas.analysis.report import highlights
from attlas.analysis.report.content import NO_KIND, Content, has_values
from attlas.analysis.report.figures import RAMP, Cell, atlas, heat_map
from attlas.analysis.report.numbers import MISSING, count, estimate, format_number, half_width, interval, percent
from attlas.analysis.report.panels import (
    distance_panels,
    entropy_panels,
    layer_legend,
    residual_columns,
    residual_panels,
)
from attlas.analysis.residual import SITES
from attlas.extract.printable import printable
from attlas.extract.tables import TABLES

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent
# stops of the sequential scale, from shallow to deep as on a sea chart; reversed in brightness for the dark page
_LIGHT = ("#f3ead8", "#cfe0cf", "#8dc3b8", "#4795a6", "#235f8a", "#12325f")
_DARK = ("#1d2733", "#1f4257", "#20667a", "#35928f", "#86c39a", "#f2ecc6")


@dataclass(frozen=True)
class Map:
    """A column that the report shows as a heat map of heads."""

    column: str
    title: str
    subtitle: str
    unit: str
    highest: float | None = None  # upper end of the scale; None for the largest value


MAPS = (
    Map(
        "entropy_normalized",
        "Entropy",
        "how evenly a head spreads over the keys it may see",
        "of the maximum",
        1.0,
    ),
    Map("attended_keys", "Attended keys", "how many evenly attended keys would have that entropy", "keys"),
    Map("distance_patches", "Distance over the image", "how far the head looks, in patches", "patches"),
    Map("distance_tokens", "Distance", "how far the head looks, either way", "tokens"),
    Map("distance_vs_uniform", "Distance against an even head", "below 1 the head stays near", "times"),
    Map("mass_self", "Itself", "weight on the token itself", "share"),
    Map("mass_previous", "Previous token", "weight on the token before", "share"),
    Map("mass_next", "Next token", "weight on the token after", "share"),
    Map("mass_first", "First token", "weight on the sequence's first token", "share"),
    Map("mass_separator", "Separators", "weight on tokens that end or separate sequences", "share"),
    Map("mass_whitespace", "White space", "weight on line ends, tabs and runs of spaces", "share"),
    Map("mass_punctuation", "Punctuation", "weight on punctuation and symbols", "share"),
    Map("mass_word_start", "Words", "weight on words, or on their first pieces", "share"),
    Map("mass_subword", "Word pieces", "weight on the later pieces of words", "share"),
    Map("mass_same_token", "Same token", "weight on other copies of the query's token", "share"),
    Map("mass_induction", "Induction", "weight on what followed an earlier copy", "share"),
    Map("mutual_information_nats", "Mutual information", "how much the query decides where the head looks", "nats"),
    Map("received_max", "Strongest key", "largest mean weight that one key receives", "share"),
    Map("mass_massive", "Massive tokens", "weight on tokens with massive activations", "share"),
    Map("output_norm", "Write", "norm of what the head adds to the stream", "norm"),
    Map("value_ratio_first", "What the first token writes", "below 1: less than other tokens would", "times"),
)
TABLE_COLUMNS = (
    "entropy_normalized",
    "attended_keys",
    "distance_patches",
    "distance_tokens",
    "distance_vs_uniform",
    "mass_self",
    "mass_previous",
    "mass_next",
    "mass_first",
    "mass_separator",
    "mass_punctuation",
    "mass_same_token",
    "mass_induction",
    "value_ratio_first",
    "mutual_information_nats",
    "output_norm",
    "retrieval_score",
)


def render(content: Content) -> str:
    """The report as an HTML page."""
    return page_environment().get_template("page.html").render(_context(content))


def page_environment() -> Environment:
    """Templates in which everything from the data is escaped, control characters included."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(_HERE),
        undefined=StrictUndefined,
        finalize=_escape_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, name=_isolate_direction)
    return environment


def _escape_controls(value: object) -> object:
    """Escape control characters in text from the data; leave markup and numbers unchanged."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _isolate_direction(text: object) -> Markup:
    """A name from the data, escaped and with its text direction isolated."""
    return Markup("<bdi>{}</bdi>").format(printable(text))


def _context(content: Content) -> dict[str, Any]:
    return {
        "model": model_title(content.manifest),
        "corpus": corpus_title(content.manifest),
        "tiles": _tiles(content),
        "facts": _facts(content),
        "notes": highlights.notes(content),
        "highlights": highlights.highlights(content),
        "kind_sentence": highlights.kind_sentence(content),
        "kind_counts": highlights.kind_counts(content),
        "kinds": kinds_table().rows(named=True),
        "atlases": [
            (stack, _stack_atlas(content, stack), _missing_shape_reason(content, stack)) for stack in content.stacks
        ],
        "maps": list(_maps(content)),
        "steps": range(RAMP),
        "distance": list(distance_panels(content)),
        "charts": list(entropy_panels(content)),
        "residual": list(residual_panels(content)),
        "sites": [s for s in SITES if s in set(content.residual["site"])],
        "layer_steps": layer_legend(content),
        "table": _heads_table(content),
        "chance": content.chance.rows(named=True),
        "defects": _rule_sections(content, "defect"),
        "findings": _rule_sections(content, "finding"),
        "formulas": _formulas(content),
        "provenance": describe(content.manifest),
        "several": len(content.stacks) > 1,
        "light": _color_ramp(_LIGHT),
        "dark": _color_ramp(_DARK),
        "style": Markup((_HERE / "style.css").read_text("utf-8")),
        "script": Markup((_HERE / "page.js").read_text("utf-8")),
    }


def _tiles(content: Content) -> list[tuple[str, str]]:
    corpus = section(content.manifest, "corpus")
    layers = content.heads.select(pl.struct("stack", "layer").n_unique()).item() if content.heads.height else 0
    numbers = {
        "layer": layers,
        "head": content.heads.height,
        "document": content.documents,
        "sequence": corpus.get("sequences") or 0,
        "token": corpus.get("tokens") or 0,
    }
    return [(count(number), noun if number == 1 else f"{noun}s") for noun, number in numbers.items()]


def _facts(content: Content) -> str:
    manifest = content.manifest
    parts = [section(manifest, "model").get("architecture"), manifest.get("dtype"), manifest.get("device")]
    engine = manifest.get("engine")
    return " · ".join([str(p) for p in parts if p] + ([f"engine {engine}"] if engine else []))


def _maps(content: Content) -> list[dict[str, Any]]:
    maps = []
    for item in MAPS:
        if not has_values(content.heads, item.column):
            continue
        top = content.heads[item.column].max()
        high = item.highest or (float(top) if isinstance(top, (int, float)) and top > 0 else 1.0)
        figures = []
        for stack in content.stacks:
            cells = [_cell(row, item.column) for row in _stack_rows(content.heads, stack)]
            figures.append(
                (stack, heat_map(cells, title=f"{item.title} by layer and head, {stack}", low=0.0, high=high))
            )
        maps.append({"map": item, "low": "0", "high": format_number(high), "figures": figures})
    return maps


def _stack_rows(frame: pl.DataFrame, stack: str) -> list[dict[str, Any]]:
    return frame.filter(pl.col("stack") == stack).rows(named=True)


def _cell(row: dict[str, Any], column: str) -> Cell:
    value = row[column]
    text = (
        f"{format_number(value)} ({interval(row[f'{column}_low'], row[f'{column}_high'])})"
        if value is not None
        else "undefined"
    )
    return Cell(row["id"], row["label"], row["layer"], row["head"], value, f"{row['label']}: {column} {text}")


def _stack_atlas(content: Content, stack: str) -> Markup:
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
            f"{row['label']}: {_kinds_of(row)}, "
            f"entropy {percent(row['entropy_normalized'])}, distance {format_number(row['distance_tokens'])} tokens",
            row["kind"],
            profiles.get(row["id"], ()),
        )
        for row in _stack_rows(content.heads, stack)
    ]
    return atlas(cells, title=f"Every head of {stack} as the shape of its attention over signed distance")


def _kinds_of(row: dict[str, Any]) -> str:
    """A head's labels in words."""
    kind = f"{row['kind']} ({percent(row['agreement'])} of replicates agree)"
    return f"{kind}, awake {row['awake'] or MISSING}" if row["is_at_rest"] and row["kind"] != NO_KIND else kind


def _missing_shape_reason(content: Content, stack: str) -> str:
    """Why the plates of a stack show no shape; empty if they do."""
    if (content.offsets["stack"] == stack).any():
        return ""
    return "Queries and keys come from different sequences: there is no distance between them, hence no shape."


def _heads_table(content: Content) -> dict[str, Any]:
    own = [c for c in content.manifest.get("own_statistics", ()) if c["table"] == "heads"]
    units = {c.name: c.unit for c in TABLES["heads"].facts} | {c["name"]: c["unit"] for c in own}
    columns = [c for c in (*TABLE_COLUMNS, *(c["name"] for c in own)) if has_values(content.heads, c)]
    rows = [
        {
            "id": row["id"],
            "label": row["label"],
            "kind": row["kind"],
            "agreement": row["agreement"],
            "rest": row["rest"],
            "awake": row["awake"] or "",
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


def _rule_sections(content: Content, type_: str) -> list[dict[str, Any]]:
    """The rules for defects or findings with what they found, those that found something first."""
    judgement = content.judgement
    sections = []
    for rule in judgement.rules.filter(pl.col("type") == type_).iter_rows(named=True):
        rows = judgement.found.filter(pl.col("name") == rule["name"]).iter_rows(named=True)
        places = [(row["place"], row["evidence"], _interval_or_nothing(row)) for row in rows]
        sections.append({**rule, "places": places})
    return sorted(sections, key=lambda d: (d["found"] is None, not d["found"]))


def _interval_or_nothing(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else interval(row["low"], row["high"])


def _formulas(content: Content) -> list[tuple[str, str, str, str, str]]:
    used = {m.column for m in MAPS} | set(TABLE_COLUMNS)
    heads = [("heads", c) for c in TABLES["heads"].facts if c.name in used and has_values(content.heads, c.name)]
    panels = {column for column, _, _ in residual_columns(content)}
    residual = [("residual", c) for c in TABLES["residual"].facts if c.name in panels]
    formulas = [(f"{table}.{c.name}", c.formula, c.unit, c.meaning, c.reference) for table, c in heads + residual]
    own = content.manifest.get("own_statistics", ())
    return formulas + [(f"{c['table']}.{c['name']}", c["formula"], c["unit"], c["meaning"], c["origin"]) for c in own]


def _color_ramp(stops: Sequence[str]) -> list[str]:
    """The sequential scale: RAMP colours, evenly spaced along the stops."""
    stops_rgb = [tuple(int(stop[i : i + 2], 16) for i in (1, 3, 5)) for stop in stops]
    ramp = []
    for i in range(RAMP):
        place = i / (RAMP - 1) * (len(stops_rgb) - 1)
        at = min(int(place), len(stops_rgb) - 2)
        mixed = [round(a + (b - a) * (place - at)) for a, b in zip(stops_rgb[at], stops_rgb[at + 1], strict=True)]
        ramp.append("#{:02x}{:02x}{:02x}".format(*mixed))
    return ramp
