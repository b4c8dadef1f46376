"""Attention entropy: how sharp heads are, by head, by layer, by position in the sequence and by sequence length.

`entropy_nats` is the mean over rows of H_i = −Σ_j p_ij ln p_ij; `entropy_normalized` divides it by ln of the number of keys that the row
sees: 0 for a head that looks at one key, 1 for one that looks evenly at all. Early positions and short sequences see few keys, which bounds
entropy: compare heads by the normalised column, and models by position or by stratum of length. Intervals are clustered by document.

    import attlas
    from attlas.analysis import entropy_by_head, entropy_by_length

    dataset = attlas.open_dataset("data/demo")
    entropy_by_head(dataset).head(10)  # the sharpest heads
    entropy_by_length(dataset).filter(layer=0)

Source: Clark 2019, §3.2; Voita 2019.
"""

from __future__ import annotations

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD, head_means
from attlas.analysis.inference import estimates, wide
from attlas.analysis.summaries import Grouping, summarize_together
from attlas.extract.tables import doubling_bin_edges

COLUMNS = ("entropy_nats", "entropy_normalized", "attended_keys", "max_weight")
_LAYER, _STRATUM = ("stack", "layer"), ("stack", "layer", "stratum")
_SHORTEST, _LONGEST = 3, 24  # length strata are (2^k, 2^(k+1)]; sequences of up to 8 tokens form one


def entropy_by_head(dataset: Dataset) -> pl.DataFrame:
    """Entropy columns with intervals, a row per head, the sharpest head first."""
    return head_means(dataset, COLUMNS).sort("entropy_normalized", "stack", "layer", "head", nulls_last=True)


def entropy_by_layer(dataset: Dataset, heads: pl.DataFrame | None = None) -> pl.DataFrame:
    """Entropy columns with intervals, a row per layer, pooled over its heads. heads: those to pool, all by default."""
    (sums,) = summarize_together(dataset, "heads", [layer_grouping(heads)])
    return means_by_layer(sums, min_documents=dataset.min_documents)


def layer_grouping(heads: pl.DataFrame | None = None) -> Grouping:
    """What `means_by_layer` needs."""
    chosen = None if heads is None else heads.select(HEAD).lazy()
    return Grouping(COLUMNS, _LAYER, lambda rows: rows if chosen is None else rows.join(chosen, on=HEAD, how="semi"))


def means_by_layer(sums: pl.LazyFrame, *, comparisons: int = 1, min_documents: int = 1) -> pl.DataFrame:
    """Of sums by `layer_grouping`. comparisons: how many of the intervals of a column hold together (Bonferroni)."""
    found = estimates(sums, _LAYER, comparisons=comparisons, min_documents=min_documents)
    return wide(found.collect(), _LAYER, COLUMNS)


def entropy_by_length(dataset: Dataset) -> pl.DataFrame:
    """Entropy columns by layer and stratum of sequence length, `tokens_low` to `tokens_high`.

    The length of a sequence bounds its entropy, so means are only comparable between sequences of similar length.
    """
    (sums,) = summarize_together(dataset, "heads", [length_grouping(dataset)])
    return means_by_length(sums, min_documents=dataset.min_documents)


def length_grouping(dataset: Dataset) -> Grouping:
    """What `means_by_length` needs."""
    stratum = pl.sum_horizontal([pl.col("tokens") > 2**k for k in range(_SHORTEST, _LONGEST)]).cast(pl.Int32)
    lengths = dataset.scan("sequences").select("sequence_id", stratum=stratum).collect().lazy()
    return Grouping(COLUMNS, _STRATUM, lambda rows: rows.join(lengths, on="sequence_id"))


def means_by_length(sums: pl.LazyFrame, *, min_documents: int = 1) -> pl.DataFrame:
    upper = pl.lit(2).pow(pl.col("stratum") + _SHORTEST).cast(pl.Int64)
    return wide(estimates(sums, _STRATUM, min_documents=min_documents).collect(), _STRATUM, COLUMNS).with_columns(
        tokens_low=pl.when(pl.col("stratum") == 0).then(1).otherwise(upper // 2 + 1), tokens_high=upper
    )


def entropy_by_position(dataset: Dataset, *, by: tuple[str, ...] = HEAD) -> pl.LazyFrame:
    """Mean row entropy by the query's position, in doubling bins; `rows` is the number of rows in the mean."""
    return position_means(dataset, "entropy_by_position", by=by).rename({"mean": "entropy_nats"})


def position_means(dataset: Dataset, profile: str, *, by: tuple[str, ...]) -> pl.LazyFrame:
    """sum/count of a positional profile, with the first and last position of each bin."""
    merged = (
        dataset.scan("profiles")
        .filter(pl.col("profile") == profile)
        .group_by(*by, "bin")
        .agg(pl.col("sum").sum(), rows=pl.col("count").sum())
        .filter(pl.col("rows") > 0)
    )
    return (
        merged.join(bin_edges(), on="bin")
        .filter(is_reached(dataset))
        .select(*by, "bin", "low", "high", (pl.col("sum") / pl.col("rows")).alias("mean"), "rows")
        .sort(*by, "bin")
    )


def is_reached(dataset: Dataset) -> pl.Expr:
    """Whether a bin of positions or signed distances, `low` to `high`, lies within sequences of min_documents documents."""
    if dataset.min_documents == 1:
        return pl.lit(True)
    return pl.min_horizontal(pl.col("low").abs(), pl.col("high").abs()) < sequence_tokens(dataset)[1]


def sequence_tokens(dataset: Dataset) -> tuple[int, int]:
    """The tokens of the shortest and the longest sequence; or as few and as many as min_documents documents have in one. 0 without any."""
    tokens = pl.col("tokens")
    of_documents = dataset.scan("sequences").group_by("document_id").agg(low=tokens.min(), high=tokens.max()).collect()
    if not of_documents.height:
        return 0, 0
    lows, highs = of_documents["low"].sort(), of_documents["high"].sort(descending=True)
    return lows[dataset.min_documents - 1], highs[dataset.min_documents - 1]


def bin_edges() -> pl.LazyFrame:
    """First and last position (or signed distance) of every doubling bin."""
    bins = range(-32, 33)
    edges = [doubling_bin_edges(b) for b in bins]
    return pl.LazyFrame(
        {"bin": list(bins), "low": [e[0] for e in edges], "high": [e[1] for e in edges]},
        schema={"bin": pl.Int16, "low": pl.Int64, "high": pl.Int64},
    )
