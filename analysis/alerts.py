"""Alerts of a series: what is known to go wrong in training, found by explicit rules and shown with its evidence.

A change is an alert only if it passes a threshold that the first dataset did not, so attention that merely sharpens is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

COLLAPSE = "entropy collapse"
COLLAPSE_SHARE = 0.05  # of the largest entropy: sequences of any length have the same threshold
LARGE_LOGIT = 100.0
_PLACE = ("stack", "layer", "head", "site")
ALERT = {
    "alert": pl.String,
    "step": pl.Int64,
    "dataset": pl.String,
    "stack": pl.String,
    "layer": pl.Int16,
    "head": pl.Int16,
    "site": pl.String,
    "column": pl.String,
    "first": pl.Float64,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "lasts": pl.Boolean,
}


@dataclass(frozen=True)
class Rule:
    """What an alert looks at, its threshold in words, and the rows that are beyond it with their whole interval."""

    name: str
    column: str
    rule: str
    meaning: str
    is_beyond: Callable[[], pl.Expr]


RULES = (
    Rule(
        COLLAPSE,
        "entropy_normalized",
        f"changed from the first dataset, and the interval lies below {COLLAPSE_SHARE:g}; of a head that is not previous, next or self",
        "nearly every query attends to a single key, for no reason of position, which makes training unstable (Zhai 2023)",
        lambda: (pl.col("high") < COLLAPSE_SHARE) & (pl.col("first") >= COLLAPSE_SHARE),
    ),
    Rule(
        "large logits",
        "score_max",
        f"changed from the first dataset, and the interval lies above {LARGE_LOGIT:g}",
        "attention logits have grown beyond where they are clipped elsewhere (Kimi K2 2025); the softmax is near a hard maximum",
        lambda: (pl.col("low") > LARGE_LOGIT) & (pl.col("first") <= LARGE_LOGIT),
    ),
)


def find_alerts(rows: pl.DataFrame) -> pl.DataFrame:
    """A row for each rule and place that is beyond its threshold in any dataset of a trend: the values where it first is.

    `first` is the mean in the first dataset, `lasts` whether the place is still beyond in the last one.
    """
    frames = [_found(rule, rows.filter(column=rule.column)) for rule in RULES]
    return pl.concat(frames).sort("step", "alert", *_PLACE)


def _found(rule: Rule, rows: pl.DataFrame) -> pl.DataFrame:
    by = [*_PLACE, "column"]
    of_first = rows.sort("step").group_by(by).agg(first=pl.col("estimate").first(), last_step=pl.col("step").last())
    beyond = rows.join(of_first, on=by, nulls_equal=True).filter(
        rule.is_beyond() & (pl.col("change_from_first") == "changed")
    )
    return (
        beyond.sort("step")
        .group_by(by, maintain_order=True)
        .agg(
            pl.col("step", "dataset", "first", "low", "high").first(),
            value=pl.col("estimate").first(),
            lasts=pl.col("step").last() == pl.col("last_step").last(),
        )
        .with_columns(alert=pl.lit(rule.name))
        .select(pl.col(name).cast(kind) for name, kind in ALERT.items())
    )
