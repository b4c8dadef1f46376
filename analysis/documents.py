"""Documents that attention treats unlike the others, and those that were dropped.

For each document d and column, the mean over all rows and heads of a stack, x_d = Σ w·y / Σ w, and its modified z-score
0.6745 · (x_d − median) / MAD over documents, where MAD is the median of |x_d − median|. An outlier has a score beyond ±3.5. Unlike a
mean and a standard deviation, the median and the MAD hold as long as fewer than half of the documents are outliers.

Look at the `source` of an outlier: it may be in another language, code, a table or damaged text. Entropy and masses depend on the length of
a document, and means of few rows vary more, so compare `content_tokens` first; documents under 16 tokens have no score. Of normal
values one in 2,149 is beyond 3.5 by chance; of fewer than about ten documents the MAD is too rough to go by.

    import attlas
    from attlas.analysis import dropped_documents, outlying_documents

    dataset = attlas.open_dataset("data/demo")
    outlying_documents(dataset).filter("is_outlier")
    dropped_documents(dataset)

Source: Iglewicz & Hoaglin 1993, How to Detect and Handle Outliers.
"""

from __future__ import annotations

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.kinds import MIN_TOKENS
from attlas.analysis.summaries import Grouping, averaged_columns, summarize_together

COLUMNS = ("entropy_normalized", "distance_vs_uniform", "mass_first", "mass_separator")
NORMAL_MAD = 0.6745  # MAD of a normal variable with deviation 1
OUTLIER_SCORE = 3.5
_OF_STACK = ("stack", "column")


def outlying_documents(dataset: Dataset) -> pl.DataFrame:
    """How unlike the others each document is: a row per stack, column of COLUMNS and document, the farthest first.

    Columns: `stack, column, document_id, source, content_tokens, mean`; `median`, of the documents' means; `score`, the modified
    z-score, null for documents under MIN_TOKENS tokens, which do not count for the median, and where at least half of the
    documents have the same mean; `is_outlier`; `rows`, the measured rows of all heads together. Reads the rows of
    `heads` once, part by part. No rows if the dataset was opened with min_documents.
    """
    (sums,) = summarize_together(dataset, "heads", [document_grouping(dataset)])
    return outliers_of(dataset, sums)


def document_grouping(dataset: Dataset) -> Grouping:
    """What `outliers_of` needs."""
    present = averaged_columns(dataset, "heads")
    return Grouping([name for name in COLUMNS if name in present], ("stack",), is_by_document=True)


def outliers_of(dataset: Dataset, sums: pl.LazyFrame) -> pl.DataFrame:
    """The frame of `outlying_documents`, of sums by `document_grouping`."""
    facts = dataset.scan("documents").select("document_id", "source", "content_tokens")
    is_long = pl.col("content_tokens") >= MIN_TOKENS
    median = pl.col("mean").filter(is_long).median().over(_OF_STACK)
    deviation = pl.col("mean") - pl.col("median")
    spread = deviation.abs().filter(is_long).median().over(_OF_STACK)
    return (
        sums.filter(dataset.min_documents == 1)
        .join(facts, on="document_id")
        .with_columns(median=median)
        .with_columns(score=pl.when(is_long & (spread > 0)).then(NORMAL_MAD * deviation / spread))
        .select(
            *_OF_STACK,
            "document_id",
            "source",
            "content_tokens",
            "mean",
            "median",
            "score",
            is_outlier=(pl.col("score").abs() > OUTLIER_SCORE).fill_null(False),
            rows="weight",
        )
        .sort(
            pl.col("score").abs(),
            "stack",
            "column",
            "document_id",
            descending=[True, False, False, False],
            nulls_last=True,
        )
        .collect()
    )


def dropped_documents(dataset: Dataset) -> pl.DataFrame:
    """Documents that gave nothing to measure: `document_id, source, characters` and `dropped_reason`, in corpus order.

    `dataset.manifest["corpus"]["dropped"]` counts them by kind of reason. No rows if the dataset was opened with min_documents.
    """
    dropped = dataset.scan("documents").filter(pl.col("dropped_reason").is_not_null() & (dataset.min_documents == 1))
    return dropped.select("document_id", "source", "characters", "dropped_reason").sort("document_id").collect()
