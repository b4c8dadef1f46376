"""Massive activations: a few entries of the residual stream that dwarf all others, on few tokens and in few dimensions.

An entry is massive if its size is at least 100, and at least 1,000 times the median size of the stream's entries there (Sun 2024). A
dataset has no median of entries. It is taken to be 0.6745·m/√d, where m is the median norm of the tokens at that site, after the update
(from the counts `token_norm` of `residual_profiles`), and d the width: the median size of a normal variable with the stream's norm. The
profile `massive` counts tokens by another ratio, that to the token's own median, which a massive token raises itself.

    import attlas
    from attlas.analysis import massive_activations

    massive_activations(attlas.open_dataset("data/demo"))

Source: Sun et al. 2024, Massive Activations in Large Language Models, §2.
"""

from __future__ import annotations

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.manifest import section
from attlas.analysis.residual import SITE, in_order

MASSIVE_SIZE, MASSIVE_TIMES = 100.0, 1000.0
HALF_NORMAL_MEDIAN = 0.6745  # of |z|, z standard normal
_BINS_PER_OCTAVE = 4  # of the profile token_norm
SCHEMA = {
    "stack": pl.String,
    "dimension": pl.Int64,
    "layer": pl.Int16,
    "last_layer": pl.Int16,
    "site": pl.String,
    "last_site": pl.String,
    "size": pl.Float64,
    "times": pl.Float64,
    "sequences": pl.Int64,
    "positions": pl.Int64,
    "first_position": pl.Int64,
    "last_position": pl.Int64,
}


def massive_activations(dataset: Dataset) -> pl.DataFrame:
    """A row for each dimension and run of consecutive layers with a massive activation in it.

    `layer`, `site` to `last_layer`, `last_site`: where the run begins and ends. `size`: the largest entry, `times` the median there.
    `sequences`: in how many sequences, at most, at a site. `positions`: on how many different positions, from `first_position` to
    `last_position`; null if max_abs_token was not measured. Of each sequence and site only the largest entry is known.
    """
    if reason_unknown(dataset):
        return pl.DataFrame(schema=SCHEMA)
    sites = _massive_sites(dataset, typical_entries(dataset, section(dataset.manifest, "model")["width"]))
    if not sites.height:
        return pl.DataFrame(schema=SCHEMA)
    ordered = in_order(sites, before=("dimension",))
    is_new = (pl.col("layer") - pl.col("layer").shift(1) > 1).fill_null(True).over("stack", "dimension")
    begins = ordered.with_columns(is_new=is_new)
    runs = begins.with_columns(run=pl.col("is_new").cum_sum().over("stack", "dimension"))
    largest = pl.col("size").arg_max()
    merged = runs.group_by("stack", "dimension", "run", maintain_order=True).agg(
        pl.col("layer", "site").first(),
        last_layer=pl.col("layer").last(),
        last_site=pl.col("site").last(),
        size=pl.col("size").max(),
        times=pl.col("times").get(largest),
        sequences=pl.col("sequences").max(),
        positions=pl.col("positions").explode().drop_nulls().n_unique(),
        first_position=pl.col("positions").explode().min(),
        last_position=pl.col("positions").explode().max(),
    )
    known = pl.when(pl.col("first_position").is_not_null()).then(pl.col("positions"))
    return (
        merged.with_columns(positions=known)
        .select(pl.col(n).cast(t) for n, t in SCHEMA.items())
        .sort("stack", "layer", "dimension")
    )


def typical_entries(dataset: Dataset, width: int) -> pl.DataFrame:
    """`typical`, the stand-in for the median size of an entry of the stream after each site's update."""
    bins = (
        dataset.scan("residual_profiles")
        .filter(pl.col("profile") == "token_norm")
        .group_by(*SITE, "bin")
        .agg(pl.col("count").sum())
        .sort(*SITE, "bin")
    )
    below = (pl.col("count").cum_sum() - pl.col("count")).over(SITE)
    half = pl.col("count").sum().over(SITE) / 2
    # within a bin the logarithms of norms are taken to be spread evenly
    place = pl.col("bin") + (pl.col("half") - pl.col("below")) / pl.col("count")
    median = pl.lit(2.0) ** (place / _BINS_PER_OCTAVE)
    return (
        bins.with_columns(below=below, half=half)
        .filter(pl.col("half").is_between(pl.col("below"), pl.col("below") + pl.col("count"), closed="right"))
        .select(*SITE, typical=HALF_NORMAL_MEDIAN * median / width**0.5)
        .collect()
    )


def reason_unknown(dataset: Dataset) -> str | None:
    """Why massive activations cannot be found in a dataset; None if they can."""
    if not isinstance(section(dataset.manifest, "model").get("width"), int):
        return "the manifest does not say how wide the stream is"
    has_norms = dataset.scan("residual_profiles").select((pl.col("profile") == "token_norm").any()).collect().item()
    return None if has_norms else "residual_profiles has no token_norm, from which typical entries follow"


def _massive_sites(dataset: Dataset, typical: pl.DataFrame) -> pl.DataFrame:
    """A row for each site and dimension with a massive activation, of one pass over the rows."""
    rows = dataset.scan("residual").filter(pl.col("max_abs") >= MASSIVE_SIZE)
    return (
        rows.join(typical.lazy(), on=SITE)
        .with_columns(times=pl.col("max_abs").cast(pl.Float64) / pl.col("typical"))
        .filter(pl.col("times") >= MASSIVE_TIMES)
        .group_by(*SITE, pl.col("outlier_dim").alias("dimension"))
        .agg(
            size=pl.col("max_abs").max(),
            times=pl.col("times").max(),
            sequences=pl.len(),
            positions=(pl.col("max_abs_token") if has_positions(dataset) else pl.lit(None, pl.Int32)).unique(),
        )
        .collect(engine="streaming")
    )


def has_positions(dataset: Dataset) -> bool:
    """Whether the positions of the largest entries were measured."""
    return "max_abs_token" in dataset.scan("residual").collect_schema().names()
