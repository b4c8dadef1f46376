"""Margins: how large a difference of a statistic has to be to matter, in the statistic's own unit."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import polars as pl

from attlas.extract.store import Refusal
from attlas.extract.tables import Column

_OPTION = re.compile(r"(?P<number>[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(?P<unit>.*)")


@dataclass(frozen=True)
class Margin:
    """A difference, in the column's unit or as a share of the larger of the two means (by absolute value)."""

    value: float
    is_share: bool = False

    def of(self, a: pl.Expr, b: pl.Expr) -> pl.Expr:
        """The margin for two means."""
        return self.value * pl.max_horizontal(a.abs(), b.abs()) if self.is_share else pl.lit(self.value)

    def text(self, unit: str) -> str:
        return f"{self.value:.0%}" if self.is_share else f"{self.value:g} {unit}".strip()


# by unit; then by bounds: shares, cosines and other numbers of no unit within [-1, 1]; then all others
BY_UNIT: Mapping[str, Margin] = {
    "nats": Margin(0.05),
    "tokens": Margin(0.5),
    "patches": Margin(0.5),
    "radians": Margin(0.05),
}
BOUNDED = Margin(0.01)
OTHERS = Margin(0.05, is_share=True)


def default_margin(column: Column) -> Margin:
    """The margin of a column if none is given."""
    if column.unit in BY_UNIT:
        return BY_UNIT[column.unit]
    low, high = column.bounds
    return BOUNDED if not column.unit and low in (-1, 0, "1/n") and high == 1 else OTHERS


def margins_named(options: Iterable[str], columns: Mapping[str, Column]) -> dict[str, Margin]:
    """Margins from texts `COLUMN=VALUE`, with the column's unit or % behind the value if at all.

    Raises Refusal for an unknown column, another unit, and a value that is not above 0.
    """
    margins = {}
    for option in options:
        name, _, text = (part.strip() for part in option.partition("="))
        if name not in columns:
            raise Refusal(f"a margin is of a column that is compared; {name!r} is none; {nearest_names(name, columns)}")
        margins[name] = _margin(option, text, columns[name])
    return margins


def _margin(option: str, text: str, column: Column) -> Margin:
    match = _OPTION.fullmatch(text)
    unit = match["unit"] if match else ""
    rule = f"a margin is COLUMN=VALUE, VALUE a number above 0 in the column's unit ({column.unit or 'none'}), or a share such as 5%"
    if match is None or unit not in ("", "%", column.unit):
        raise Refusal(f"{rule}; got {option!r}; give such a value")
    try:
        value = float(match["number"]) / (100 if unit == "%" else 1)
    except ValueError as error:
        raise Refusal(f"{rule}; got {option!r}; give such a value") from error
    if not 0 < value < math.inf:
        raise Refusal(f"{rule}; got {option!r}; give a larger one")
    return Margin(value, is_share=unit == "%")


def nearest_names(name: str, names: Collection[str]) -> str:
    """A question that names the most similar names, or all of a few."""
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {', '.join(nearest)}?" if nearest else "attlas stats lists them"
