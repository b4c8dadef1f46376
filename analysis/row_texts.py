"""Places and numbers of rows as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl


def place_name(row: Mapping[str, Any], *, several_stacks: bool) -> str:
    """The name of a head, a site, a layer, or a band of depth."""
    depth = row.get("depth")
    where = f"L{row['layer']}" if depth is None else f"depth {depth:.0%}"
    if row["head"] is not None:
        where += f"H{row['head']}"
    if row["site"] is not None:
        where += f" {row['site'].replace('_', ' ')}"
    if row.get("other_head") is not None:
        where += f" and L{row['other_layer']}H{row['other_head']}"
    return f"{row['stack']} {where}" if several_stacks else where


def rounded(value: float | None, *, digits: int = 4) -> str:
    """A number with a few significant digits."""
    return "null" if value is None else f"{value:.{digits}g}".replace("-", "−")


def difference_cells(rows: pl.DataFrame, *, several_stacks: bool) -> list[dict[str, str]]:
    """Of each tested difference where it is, its `column`, the `difference`, its `interval`, `q`, and the effect `÷ margin`."""
    return [
        {
            "where": place_name(row, several_stacks=several_stacks),
            "column": row["column"],
            "difference": rounded(row["difference"]),
            "interval": interval_text(row),
            "q": rounded(row["q"], digits=2),
            "÷ margin": rounded(row["effect"], digits=3),
        }
        for row in rows.iter_rows(named=True)
    ]


def interval_text(row: Mapping[str, Any]) -> str:
    return f"{rounded(row['low'])} to {rounded(row['high'])}"
