"""Attention distance: how far heads look, compared with how far they could look.

`distance_tokens` is the mean over rows of Σ_j p_ij |i − j|; `distance_vs_uniform` divides it by that of a head that attends evenly to the
same keys: 1 says that the head has no preference, however long the sequences are. `offset_profile` has the whole distribution over signed
distances against the opportunity to look there.

    import attlas
    from attlas.analysis import distance_ranking, offset_profile

    dataset = attlas.open_dataset("data/demo")
    distance_ranking(dataset).head(10)  # the nearest heads
    offset_profile(dataset).filter(layer=0, head=2).collect()

Source: Vig & Belinkov 2019, §4.3 (mean distance); Kovaleva 2019.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from attlas.analysis.dataset import Dataset
from attlas.analysis.entropy import bin_edges, is_reached, position_means
from attlas.analysis.heads import HEAD, head_means

_BINS = range(-32, 33)  # of the profile offset
COLUMNS = ("distance_tokens", "distance_vs_uniform", "offset_tokens", "offset_std_tokens")


def distance_ranking(dataset: Dataset) -> pl.DataFrame:
    """Distance columns with intervals, a row per head, from nearest to farthest."""
    return head_means(dataset, COLUMNS).sort("distance_tokens", "stack", "layer", "head", nulls_last=True)


def offset_profile(dataset: Dataset, *, by: tuple[str, ...] = HEAD) -> pl.LazyFrame:
    """Attention relative to opportunity, by signed distance.

    `mass` = sum/Σ sum is the share of the attention at a distance, `opportunity` = count/Σ count the share of the
    visible (query, key) pairs, and `ratio` = mass/opportunity. The ratio is 1 for a head that attends evenly, if all
    sequences have the same length; otherwise long ones spread their rows thinner and alone fill the far bins.
    """
    merged = (
        dataset.scan("profiles")
        .filter(pl.col("profile") == "offset")
        .group_by(*by, "bin")
        .agg(pl.col("sum").sum(), pl.col("count").sum())
    )
    shares = merged.with_columns(
        mass=(pl.col("sum") / pl.col("sum").sum().over(by)).fill_nan(None),
        opportunity=(pl.col("count") / pl.col("count").sum().over(by)).fill_nan(None),
    )
    return (
        shares.filter(pl.col("count") > 0)
        .join(bin_edges(), on="bin")
        .filter(is_reached(dataset))
        .select(
            *by,
            "bin",
            "low",
            "high",
            "mass",
            "opportunity",
            ratio=pl.col("mass") / pl.col("opportunity"),
            pairs="count",
        )
        .sort(*by, "bin")
    )


def offset_shares(dataset: Dataset, heads: pl.DataFrame) -> NDArray[np.float64]:
    """The share of the attention of each of the heads, rows of HEAD, at each signed distance: [head, bin]; 0 if nothing is known."""
    shares = np.zeros((heads.height, len(_BINS)))
    numbers = heads.select(HEAD).with_row_index("|head")
    rows = offset_profile(dataset).collect().join(numbers, on=HEAD).filter(pl.col("mass").is_not_null())
    shares[rows["|head"].to_numpy(), rows["bin"].to_numpy() - _BINS[0]] = rows["mass"].to_numpy()
    return shares


def distance_by_position(dataset: Dataset, *, by: tuple[str, ...] = HEAD) -> pl.LazyFrame:
    """Mean distance by the query's position, in doubling bins."""
    return position_means(dataset, "distance_by_position", by=by).rename({"mean": "distance_tokens"})
