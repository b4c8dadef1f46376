"""The residual stream through depth."""

from __future__ import annotations

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import means_in_chunks, statistic_columns
from attlas.analysis.weighting import weighted_residual

SITES = ("embedding", "attention", "cross_attention", "mlp", "final_norm")  # in the order in which a block runs them
SITE = ("stack", "layer", "site")


def residual_through_depth(dataset: Dataset, columns: tuple[str, ...] | None = None) -> pl.DataFrame:
    """Token-weighted means with intervals, a row per stack, layer and site, in the order in which the model runs them.

    `depth` counts the sites of a stack from 0.
    """
    frame = weighted_residual(dataset)
    names = list(columns) if columns is not None else statistic_columns(dataset.table("residual"), frame)
    means = means_in_chunks(frame, names, SITE)
    order = pl.col("site").replace_strict(
        list(SITES), list(range(len(SITES))), default=len(SITES), return_dtype=pl.Int32
    )
    return (
        means.with_columns(order=order)
        .sort("stack", "layer", "order", "site")
        .with_columns(depth=pl.int_range(pl.len()).over("stack"))
        .drop("order")
    )
