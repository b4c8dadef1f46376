"""Means of the head statistics with intervals.

Row-weighted means over the corpus, θ = Σ w·y / Σ w, with the jackknife's error over documents (`attlas.analysis.inference`). They are read from
`totals`, so that they take milliseconds for a dataset of any size.

    import attlas
    from attlas.analysis import head_estimates

    head_estimates(attlas.open_dataset("data/demo"), ["entropy_nats", "mass_first"])
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.inference import estimates, wide
from attlas.analysis.summaries import averaged_columns, summaries

HEAD = ("stack", "layer", "head")


def head_estimates(dataset: Dataset, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Row-weighted means with intervals, a row for each head and column: `stack, layer, head, column` and ESTIMATES."""
    return estimates(summaries(dataset, "heads", columns), HEAD, min_documents=dataset.min_documents).collect()


def head_means(dataset: Dataset, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """The same with a row for each head: of each column `<column>`, `<column>_low`, `_high` and `_se`."""
    names = averaged_columns(dataset, "heads") if columns is None else list(columns)
    return wide(head_estimates(dataset, names), HEAD, names)


def label(*, several_stacks: bool) -> pl.Expr:
    """The name of a head, such as L4H10, preceded by its stack if there are several."""
    name = pl.format("L{}H{}", "layer", "head")
    return (pl.format("{} {}", "stack", name) if several_stacks else name).alias("label")
