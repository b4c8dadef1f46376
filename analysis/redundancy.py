"""Redundancy: which heads have a near copy elsewhere in their stack.

For each head the other head with the largest similarity, the mean Bhattacharyya coefficient of their patterns (`attlas.analysis.similarity`).
A head with a near copy looks at the same keys, but may write something else, so redundancy is a proxy of what can be pruned, not an
effect: check it with `ablations` (`attlas.analysis.pruning`). Heads at rest on the first token, and heads that attend evenly, are
near copies of each other, too. There are no intervals, as of similarities.

    import attlas
    import polars as pl
    from attlas.analysis import head_redundancy

    head_redundancy(attlas.open_dataset("data/demo")).filter(~pl.col("is_same_layer"))

Source: Michel 2019 and Voita 2019 (most heads can be pruned); Clark 2019 (heads of a layer are alike).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD
from attlas.analysis.similarity import SCHEMA as PAIRS
from attlas.analysis.similarity import By, StackSimilarity, check_similarity, stack_similarities

ALIKE = 0.9  # patterns so alike differ on average in at most 0.44 of their weight
SCHEMA = {
    **{name: PAIRS[name] for name in HEAD},
    "nearest_layer": pl.Int16,
    "nearest_head": pl.Int16,
    "bhattacharyya": pl.Float64,
    "is_same_layer": pl.Boolean,
    "alike": pl.Int64,
}


def head_redundancy(
    dataset: Dataset,
    *,
    by: By = "pattern",
    threshold: float = ALIKE,
    similarities: Sequence[StackSimilarity] | None = None,
) -> pl.DataFrame:
    """The nearest other head of each head, the most redundant first: a row per head, SCHEMA.

    `bhattacharyya`: similarity to the nearest head, from 0 to 1; null, like what is said of that head, if there is none that it was compared
    with. `alike`: how many other heads of the stack are at least as similar as `threshold`. by: as of `head_similarity`. similarities: if they
    are at hand. Raises Refusal for another threshold than one from 0 to 1, and if there is nothing to compare.
    """
    check_similarity(threshold)
    stacks = stack_similarities(dataset, by=by) if similarities is None else similarities
    frames = [_nearest(stack, threshold) for stack in stacks]
    return pl.concat([pl.DataFrame(schema=SCHEMA), *frames]).sort(
        "bhattacharyya", *HEAD, descending=[True, False, False, False], nulls_last=True
    )


def _nearest(stack: StackSimilarity, threshold: float) -> pl.DataFrame:
    others = np.where(np.isfinite(stack.matrix), stack.matrix, -np.inf)
    np.fill_diagonal(others, -np.inf)
    nearest, largest = others.argmax(1), others.max(1)
    is_known = pl.Series(np.isfinite(largest))
    of_nearest = stack.heads[nearest].select(nearest_layer="layer", nearest_head="head")
    rows = pl.concat([stack.heads.select(HEAD), of_nearest], how="horizontal").with_columns(
        pl.Series("bhattacharyya", largest, pl.Float64),
        pl.Series("alike", (others >= threshold).sum(1), pl.Int64),
        is_same_layer=pl.col("layer") == pl.col("nearest_layer"),
    )
    named = ("nearest_layer", "nearest_head", "bhattacharyya", "is_same_layer")
    return rows.with_columns(pl.when(is_known).then(name).alias(name) for name in named).select(*SCHEMA)
