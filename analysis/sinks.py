"""Attention sinks: which heads rest on the first token or on massive ones, how much, and whether that writes anything.

A head with nothing to do attends to a key that every query sees: mostly the first token, in some models other tokens with massive
activations (`mass_massive`). `at_rest` is the larger of the two masses; `rest` is the same corrected for chance, (mass − even)/(1 − even)
with row 0 of causal heads left out, and a head is at rest from 0.3 on (`attlas.analysis.kinds`). Resting adds the first token's value to
every position; it matters if that is large: `value_ratio_first`, ‖v_0 W_O^h‖ over the mean of the other tokens, is mostly well below 1
(value drain). Sinks are normal in trained models, above all causal ones.

    import attlas
    from attlas.analysis import attention_sinks

    attention_sinks(attlas.open_dataset("data/demo")).filter("is_at_rest").sort("rest", descending=True)

Source: Xiao 2024 (sinks); Gu 2025 (threshold, when they appear); Kobayashi 2020 (what they write); Sun 2024 (massive activations).
"""

from __future__ import annotations

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.evidence import Evidence
from attlas.analysis.heads import HEAD

WRITES = 1.0  # least value_ratio_first of a sink that writes
_OPTIONAL = ("mass_massive", "value_ratio_first")
_ENDS = ("", "_low", "_high")
FIRST, MASSIVE = "first", "massive"


def attention_sinks(dataset: Dataset, *, evidence: Evidence | None = None) -> pl.DataFrame:
    """A row for each head, in the model's order: how much of its attention is at rest, and whether that writes.

    Columns: HEAD; `at_rest`, with `_low` and `_high` clustered by document; `rests_on`, `first` or `massive`; `rest`, corrected for
    chance; `is_at_rest`, null where sequences are too short to tell; `value_ratio_first`, with `_low` and `_high`, null if it was not
    measured; `writes`, whether a head that rests on the first token has a value_ratio_first of at least 1. evidence: if it is at hand.
    """
    known = Evidence(dataset) if evidence is None else evidence
    rows, is_first = with_rest(known), pl.col("is_first")
    is_at_rest = pl.when(pl.lit(known.shares.refusal is None)).then("is_at_rest")
    return rows.select(
        *HEAD,
        *(f"at_rest{end}" for end in _ENDS),
        rests_on=pl.when(is_first).then(pl.lit(FIRST)).otherwise(pl.lit(MASSIVE)),
        rest="rest",
        is_at_rest=is_at_rest,
        **{f"value_ratio_first{end}": pl.col(f"value_ratio_first{end}") for end in _ENDS},
        writes=is_at_rest & is_first & (pl.col("value_ratio_first") >= WRITES),
    )


def with_rest(evidence: Evidence) -> pl.DataFrame:
    """The heads of the evidence with `at_rest`, the attention on the first token or on massive ones, and its interval."""
    heads = evidence.heads
    missing = [
        pl.lit(None, pl.Float64).alias(name + end) for name in _OPTIONAL for end in _ENDS if name not in heads.columns
    ]
    is_massive = pl.col("mass_massive").fill_null(-1) > pl.col("mass_first").fill_null(-1)
    rest = {
        f"at_rest{end}": pl.when(is_massive).then(f"mass_massive{end}").otherwise(f"mass_first{end}") for end in _ENDS
    }
    return heads.with_columns(missing).with_columns(**rest)
