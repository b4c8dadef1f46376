"""How well cheap statistics rank heads by what is lost without them: `python -m tests.proxies DATASET`, a run with `ablations`.

Spearman's rank correlation over heads, of the change of the final states with a head's output norm, its largest likeness to another
head, and its share of mass on the first token.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

from attlas.analysis.dataset import Dataset

_HEAD = ("stack", "layer", "head")


def rank_correlations(dataset: Dataset) -> pl.DataFrame:
    """One row: the correlation of each proxy with `final_change`, and the number of heads."""
    weight = pl.col("query_rows")
    proxies = dataset.scan("heads").group_by(_HEAD).agg(
        output_norm=(pl.col("output_norm") * weight).sum() / weight.sum(),
        sink_share=(pl.col("mass_first") * weight).sum() / weight.sum(),
    )  # fmt: skip
    pairs = dataset.scan("pairs").filter(
        (pl.col("layer") != pl.col("other_layer")) | (pl.col("head") != pl.col("other_head"))
    )
    other = pairs.select("stack", pl.col("other_layer").alias("layer"), pl.col("other_head").alias("head"),
                         pl.col("layer").alias("other_layer"), pl.col("head").alias("other_head"), "bhattacharyya", "rows")  # fmt: skip
    both = pl.concat([pairs.select(other.collect_schema().names()), other])
    alike = both.group_by(*_HEAD, "other_layer", "other_head").agg(pl.col("bhattacharyya").sum() / pl.col("rows").sum())
    redundancy = alike.group_by(_HEAD).agg(redundancy=pl.col("bhattacharyya").max())
    change = (
        dataset.scan("ablations").filter(pl.col("part") == "head").group_by(_HEAD).agg(pl.col("final_change").mean())
    )
    joined = proxies.join(redundancy, on=_HEAD).join(change, on=_HEAD)
    names = ("output_norm", "redundancy", "sink_share")
    correlations = (pl.corr(name, "final_change", method="spearman").round(2).alias(name) for name in names)
    return joined.select(*correlations, heads=pl.len()).collect()


if __name__ == "__main__":
    sys.stdout.write(f"{rank_correlations(Dataset.open(Path(sys.argv[1])))}\n")
