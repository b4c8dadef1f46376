"""The columns of `heads` that the report shows: what they mean, and the scale of their map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from attlas.extract.tables import TABLES

FIRST = "entropy_normalized"
_OTHERS = "others"
_QUANTILE = 0.01  # a few outliers don't decide the scale


def shown_columns(heads: pl.DataFrame, manifest: Mapping[str, Any]) -> pl.DataFrame:
    """A row for each column with values, in the dictionary's order: `name, group, unit, formula, meaning, reference`, and its scale.

    The scale is `low` to `high`; `signed`: it has both signs, and 0 in the middle; `beyond`: some values are outside of it.
    """
    facts = [
        {
            "name": c.name,
            "group": c.group or _OTHERS,
            "unit": c.unit,
            "formula": c.formula,
            "meaning": c.meaning,
            "reference": c.reference,
        }
        for c in TABLES["heads"].facts
    ]
    facts += [
        {
            **{key: c.get(key) or "" for key in ("name", "unit", "formula", "meaning")},
            "group": "your own",
            "reference": c["origin"],
        }
        for c in manifest.get("own_statistics", ())
        if c["table"] == "heads"
    ]
    present = [f for f in facts if f["name"] in heads.columns and heads[f["name"]].is_not_null().any()]
    return pl.DataFrame([{**f, **_scale(heads[f["name"]])} for f in present])


def first_column(columns: pl.DataFrame) -> str:
    """The column that the page begins with."""
    names = columns["name"].to_list()
    return FIRST if FIRST in names else names[0]


def _scale(values: pl.Series) -> dict[str, Any]:
    known = values.drop_nulls().cast(pl.Float64)
    lowest, highest = _number(known.quantile(_QUANTILE, "lower")), _number(known.quantile(1 - _QUANTILE, "higher"))
    smallest, largest = _number(known.min()), _number(known.max())
    signed = smallest < 0 < largest
    if signed:
        highest = max(-lowest, highest)
        lowest = -highest
    elif 0 <= lowest < highest / 2:
        lowest = 0.0
    elif highest / 2 < lowest <= 0:
        highest = 0.0
    beyond = smallest < lowest - 1e-12 or largest > highest + 1e-12
    return {"low": lowest, "high": highest, "signed": signed, "beyond": beyond}


def _number(value: Any) -> float:
    assert isinstance(value, float), "a column with values has quantiles"
    return value


def heads_frame(heads: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    """The heads as the page has them: names, labels, and of each column the mean and half of its interval, `<column>_half`."""
    halves = [((pl.col(f"{name}_high") - pl.col(f"{name}_low")) / 2).alias(f"{name}_half") for name in columns]
    both = [item for name, half in zip(columns, halves, strict=True) for item in (pl.col(name), half)]
    names = ("id", "stack", "layer", "head", "label", "kind", "awake", "agreement", "rest")
    return heads.select(*names, *both)
