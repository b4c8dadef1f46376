"""Bootstrap intervals of means: documents are resampled, part by part, so that any number of them will do.

Every document gets weights from Poisson(1), as many as there are replicates, drawn from its own stream of random numbers: the
same seed gives the same replicates, however documents lie in parts. Source: Chamandy et al. 2012, Estimating Uncertainty for
Massive Data Streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from attlas.analysis.dataset import Dataset
from attlas.analysis.inference import CONFIDENCE, ESTIMATES, estimates
from attlas.analysis.summaries import RowFilter, document_sums, summarize_rows


def bootstrap_estimates(
    dataset: Dataset,
    table: str,
    columns: Sequence[str],
    by: Sequence[str],
    *,
    replicates: int = 1000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    prepare: RowFilter = lambda rows: rows,
) -> pl.DataFrame:
    """Like `estimates`, of a table's rows, with percentile intervals and standard errors from resampled documents."""
    found = estimates(
        summarize_rows(dataset, table, columns, by, prepare=prepare), by, min_documents=dataset.min_documents
    ).collect()
    parts = document_sums(dataset, table, columns, by, prepare=prepare)
    return with_bootstrap(found, parts, by, replicates=replicates, seed=seed, confidence=confidence)


def with_bootstrap(
    found: pl.DataFrame,
    parts: Iterable[pl.DataFrame],
    by: Sequence[str],
    *,
    replicates: int = 1000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> pl.DataFrame:
    """Estimates whose intervals and errors come from resampled documents. parts: sums with all documents listed."""
    keys = [*by, "column"]
    numbers = found.select(keys).with_row_index("group")
    totals, weights = np.zeros((2, replicates, found.height))
    for part in parts:
        rows = part.join(numbers, on=keys, nulls_equal=True)
        documents = rows["document_id"].unique().sort()
        draws = np.stack([_draws(document, replicates, seed) for document in documents], 1)
        where = (documents.search_sorted(rows["document_id"]).to_numpy(), rows["group"].to_numpy())
        for total, values in ((totals, rows["weight"] * rows["mean"]), (weights, rows["weight"])):
            matrix = np.zeros((len(documents), found.height))
            matrix[where] = values.to_numpy()
            total += draws @ matrix
    # a replicate may miss every document with a value in the column
    means = np.divide(totals, weights, out=np.full(totals.shape, np.nan), where=weights > 0)
    low, high = np.nanquantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    error = np.nanstd(means, axis=0, ddof=1)
    is_defined = pl.col("documents") >= 2
    return found.with_columns(
        pl.when(is_defined).then(pl.Series(name, values)).alias(name)
        for name, values in (("low", low), ("high", high), ("se", error))
    ).select(*keys, *ESTIMATES)


def _draws(document: int, replicates: int, seed: int) -> NDArray[np.float64]:
    """How often each replicate draws a document."""
    return np.random.default_rng([seed, document]).poisson(1.0, replicates).astype(np.float64)
