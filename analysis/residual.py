"""The residual stream through depth: how large it is, and how sublayers write into it.

Token-weighted means at each site with intervals clustered by document: `stream_norm`, the norm before the sublayer; `update_ratio`, ‖F(x)‖/‖x‖;
`update_cosine`, whether the update is new (0), sharpens what is there (+) or erases it (−). One massive token makes a mean of norms say nothing
about the others: measure `stream_norm_median` and `update_ratio_median` (`--statistics`) where `massive_activations` finds any.

    import attlas
    from attlas.analysis import residual_through_depth

    residual_through_depth(attlas.open_dataset("data/demo"), ("stream_norm", "update_ratio"))

Source: Elhage 2021; Xiong 2020 (growth with pre-norm); Sun 2024 (massive activations).
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.inference import estimates, wide
from attlas.analysis.summaries import averaged_columns, summaries

SITES = ("embedding", "attention", "cross_attention", "mlp", "final_norm")  # in the order in which a block runs them
SITE = ("stack", "layer", "site")


def residual_through_depth(
    dataset: Dataset, columns: tuple[str, ...] | None = None, *, found: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Token-weighted means with intervals, a row per stack, layer and site, in the order in which the model runs them.

    `depth` counts the sites of a stack from 0. found: the estimates of `site_estimates`, if they are at hand.
    """
    names = averaged_columns(dataset, "residual") if columns is None else list(columns)
    means = wide(site_estimates(dataset, names) if found is None else found, SITE, names)
    return in_order(means).with_columns(depth=pl.int_range(pl.len()).over("stack"))


def site_estimates(dataset: Dataset, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """The same means, a row for each site and column: `stack, layer, site, column` and ESTIMATES."""
    return estimates(summaries(dataset, "residual", columns), SITE, min_documents=dataset.min_documents).collect()


def in_order(sites: pl.DataFrame, *, before: tuple[str, ...] = ()) -> pl.DataFrame:
    """Rows of sites, sorted by stack, the columns `before`, and where in a stack the model runs them."""
    place = pl.col("site").replace_strict(
        list(SITES), list(range(len(SITES))), default=len(SITES), return_dtype=pl.Int32
    )
    return sites.sort("stack", *before, "layer", place, "site")
