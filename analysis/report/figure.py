"""A figure of the report: a chart, how to read it, and the code that makes its numbers."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from markupsafe import Markup

if TYPE_CHECKING:
    import altair as alt

# stops of the sequential scale, from shallow to deep as on a sea chart; reversed in brightness for the dark page
_LIGHT = ("#f3ead8", "#cfe0cf", "#8dc3b8", "#4795a6", "#235f8a", "#12325f")
_DARK = ("#1d2733", "#1f4257", "#20667a", "#35928f", "#86c39a", "#f2ecc6")
# of the scale for values of both signs
_SIGNED_LIGHT = ("#8c4a12", "#d99a4e", "#f3ead8", "#5c9ac0", "#174a7c")
_SIGNED_DARK = ("#f5b56c", "#a8672a", "#1d2733", "#3878a8", "#a5d4f5")
STEPS = 20
_PALETTES = {"r": (_LIGHT, _DARK), "d": (_SIGNED_LIGHT, _SIGNED_DARK)}
_UNEQUAL = 30
NARROW, WIDE = 300, 620  # of charts, in pixels


@dataclass(frozen=True)
class Figure:
    """A chart and what belongs to it.

    text: how to read it. code: Python, run in the dataset's folder, that leaves the numbers in `rows`. sql: a query for the estimates.
    """

    name: str
    title: str
    text: str
    chart: Markup
    code: str
    sql: str = ""


def python(*imports: str, rows: str) -> str:
    """Code for a figure: imports, the dataset in the current folder, and an expression for `rows`."""
    lines = [
        "import attlas",
        *sorted(imports),
        "",
        'dataset = attlas.open_dataset(".")',
        f"rows = {rows}",
        "print(rows)",
    ]
    return "\n".join(lines)


def dedent(sql: str) -> str:
    return textwrap.dedent(sql).strip()


def palette_styles() -> str:
    """CSS variables of the colour scales: --r0 to --r19 sequential, --d0 to --d19 for values of both signs."""
    rules = []
    for letter, (light, dark) in _PALETTES.items():
        shades = zip(_mixed(light), _mixed(dark), strict=True)
        rules += [f"--{letter}{n}: light-dark({day}, {night});" for n, (day, night) in enumerate(shades)]
    return ":root { " + " ".join(rules) + " }"


def _mixed(stops: tuple[str, ...]) -> list[str]:
    """STEPS colours, evenly spaced along the stops."""
    colours = [tuple(int(stop[i : i + 2], 16) for i in (1, 3, 5)) for stop in stops]
    mixed = []
    for step in range(STEPS):
        place = step / (STEPS - 1) * (len(colours) - 1)
        at = min(int(place), len(colours) - 2)
        pairs = zip(colours[at], colours[at + 1], strict=True)
        mixed.append("#{:02x}{:02x}{:02x}".format(*(round(a + (b - a) * (place - at)) for a, b in pairs)))
    return mixed


def layer_colour(layer: int, layers: int) -> str:
    """The colour of a layer, from the deeper part of the scale, so that the first is visible on the page."""
    return f"var(--r{6 + round((STEPS - 7) * layer / max(layers - 1, 1))})"


def colour_steps(value: str, low: str, high: str, *, letter: str) -> str:
    """An expression for the colour of a value between two others, all three expressions themselves."""
    share = f"({value} - {low}) / max({high} - {low}, 1e-30)"
    return f"'var(--' + {letter} + clamp(floor({share} * {STEPS}), 0, {STEPS - 1}) + ')'"


def doubling_axis(reach: int, *, signed: bool) -> alt.Axis:
    """The axis of doubling bins of distances or positions, labelled with the last of each, so few that all stay inside."""
    import altair as alt

    every = max(1, -(-reach // 6))
    bins = [0, *range(1, reach + 1, every)]
    values = sorted({sign * b for b in bins for sign in ((1, -1) if signed else (1,))})
    label = "datum.value == 0 ? '0' : (datum.value < 0 ? '−' : '') + format(pow(2, max(0, abs(datum.value) - 1)), '~s')"
    return alt.Axis(values=values, labelExpr=label, labelOverlap=True, labelFlush=True, grid=False)


def bin_text(low: pl.Expr, high: pl.Expr) -> pl.Expr:
    """A bin of distances or positions as text: 5 to 8."""
    text = pl.when(low == high).then(pl.format("{}", low)).otherwise(pl.format("{} to {}", low, high))
    return text.str.replace_all("-", "−", literal=True)


def reach_of(bins: pl.Series) -> int:
    largest = bins.abs().max()
    return int(largest) if isinstance(largest, int) else 1


def needs_logarithm(values: pl.Series) -> bool:
    """Whether values are so unequal that on a linear scale the largest would flatten most others."""
    known = values.drop_nulls().to_numpy()
    return len(known) > 0 and known.min() > 0 and known.max() > _UNEQUAL * np.quantile(known, 0.1)
