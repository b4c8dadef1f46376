"""Sums over documents, from which means and intervals follow: read from `summaries`, or made of rows where these are needed.

Rows are read part by part, small parts together, so memory is bounded by the largest part, however large the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from attlas.analysis.dataset import Dataset
from attlas.analysis.inference import jackknife
from attlas.extract.tables import TABLES, Table
from attlas.extract.tables.document_sums import POOLED, SUMS, documents_listed, sum_documents
from attlas.extract.tables.merged_sums import MergedSums, listed_in_total

WEIGHT = "weight"
_PASSES_AT_ONCE = 2
_MOST_CODES = 1 << 22
_ROWS_AT_ONCE = 400_000  # of small parts together: each step costs some milliseconds, whatever its rows
RowFilter = Callable[[pl.LazyFrame], pl.LazyFrame]


def averaged_columns(dataset: Dataset, table: str) -> list[str]:
    """The statistics of a table that this dataset has and that have means, in the dictionary's order."""
    present = set(dataset.scan(table).collect_schema().names())
    return [c.name for c in dataset.table(table).facts if c.is_averaged and c.name in present]


def places(dataset: Dataset, table: str) -> pl.DataFrame:
    """The distinct places of a table, from its first part: every part has them all."""
    by = list(dataset.table(table).places)
    return next(dataset.scan_parts(table)).select(by).unique().sort(by).collect()


def summaries(dataset: Dataset, table: str, columns: Sequence[str] | None = None) -> pl.LazyFrame:
    """Sums over documents of the statistics of `heads`, `residual` or `layers`, at each of its places.

    A row for each place, `column` and listed document (`document_id` null: all others together), with SUMS. columns: all that the
    dataset has by default. Datasets without `totals` give the same from their rows.
    """
    names = averaged_columns(dataset, table) if columns is None else list(columns)
    if "totals" not in dataset.tables or table not in dataset.tables:
        return summarize_rows(dataset, table, names, dataset.table(table).places)
    is_of_table = pl.lit(True)
    for key in ("head", "site"):
        has_key = key in dataset.table(table).places
        is_of_table &= pl.col(key).is_not_null() if has_key else pl.col(key).is_null()
    rows = dataset.scan("totals").filter(is_of_table & pl.col("column").is_in(names))
    return rows.select(*dataset.table(table).places, "column", "document_id", *SUMS)


@dataclass(frozen=True)
class Grouping:
    """What to sum up, and by what. prepare: filters the rows, or adds columns to group by; it sees keys, `weight` and the columns.

    is_by_document: no documents are pooled, however light; there are as many rows as documents.
    """

    columns: Sequence[str]
    by: Sequence[str]
    prepare: RowFilter = lambda rows: rows
    is_by_document: bool = False

    def of(self, rows: pl.LazyFrame) -> pl.LazyFrame:
        return self.prepare(rows).select(*self.by, "document_id", WEIGHT, *self.columns)


def means_of(dataset: Dataset, table: str, columns: Sequence[str]) -> pl.DataFrame:
    """`jackknife` of the statistics of a table at each of its places, without those of fewer documents than the dataset shows."""
    by = [*dataset.table(table).places, "column"]
    return jackknife(summaries(dataset, table, columns), by, min_documents=dataset.min_documents).collect()


def summarize_rows(
    dataset: Dataset,
    table: str,
    columns: Sequence[str],
    by: Sequence[str],
    *,
    prepare: RowFilter = lambda rows: rows,
) -> pl.LazyFrame:
    """The same from the rows of a table, by any of its columns."""
    return summarize_together(dataset, table, [Grouping(columns, by, prepare)])[0]


def summarize_together(dataset: Dataset, table: str, groupings: Sequence[Grouping]) -> list[pl.LazyFrame]:
    """The same by several groupings, in one pass over the rows."""
    return scan_once(dataset, table, groupings)[0]


@dataclass(frozen=True)
class Aside:
    """What else a pass over rows finds.

    columns: what it needs, besides keys and `weight`. of: gives a small frame of the rows of a part, in which NaN and infinities are.
    """

    columns: Sequence[str]
    of: Callable[[pl.DataFrame], pl.DataFrame]


def scan_once(
    dataset: Dataset, table: str, groupings: Sequence[Grouping], asides: Sequence[Aside] = ()
) -> tuple[list[pl.LazyFrame], list[pl.DataFrame]]:
    """Sums over documents by several groupings, and of each aside the frames of all parts, in one pass over the rows."""
    in_shards, in_total = listed_documents(dataset) if groupings else (np.zeros(0, np.int64), set())
    merged = [
        _DocumentSums([*g.by, "column"]) if g.is_by_document else MergedSums([*g.by, "column"], in_total)
        for g in groupings
    ]
    needed = {c.name for c in TABLES[table].keys} | {WEIGHT}
    needed |= {name for wanted in (*groupings, *asides) for name in wanted.columns}

    def summarize(rows: pl.LazyFrame) -> tuple[list[pl.DataFrame], list[pl.DataFrame]]:
        part = rows.select(needed).collect()
        found = [aside.of(part) for aside in asides]
        sums = [
            summarize_frame(g.of(part.lazy()).collect(), g.columns, g.by, None if g.is_by_document else in_shards)
            for g in groupings
        ]
        return sums, found

    beside: list[list[pl.DataFrame]] = []
    # some rows are decoded while others are added up
    with ThreadPoolExecutor(_PASSES_AT_ONCE) as threads:
        for frames, found in threads.map(summarize, weighted_parts(dataset, table, at_once=_ROWS_AT_ONCE)):
            beside.append(found)
            for sums, frame in zip(merged, frames, strict=True):
                sums.add(frame.to_arrow())
    found = [pl.from_arrow(sums.to_arrow()) for sums in merged]
    together = [pl.concat(frames) for frames in zip(*beside, strict=True)]
    return [frame.lazy() for frame in found if isinstance(frame, pl.DataFrame)], together


class _DocumentSums:
    """Adds sums of parts in which no document is pooled; of MergedSums' form."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [*keys, "document_id"]
        self._parts: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        self._parts.append(rows.select([*self._keys, "weight", "mean"]))

    def to_arrow(self) -> pa.Table:
        """A row for each key and document, sorted by them; a document that lies in several parts is put together."""
        rows = pl.from_arrow(pa.concat_tables(self._parts))
        assert isinstance(rows, pl.DataFrame), "a table has columns"
        weight = pl.col("weight").sum()
        alone = {"documents": pl.lit(1, pl.Int64), "deviation_squares": 0.0, "deviation_products": 0.0}
        return (
            rows.group_by(self._keys, maintain_order=True)
            .agg(weight, mean=(pl.col("weight") * pl.col("mean")).sum() / weight)
            .with_columns(weight_squares=pl.col("weight") ** 2, **alone)
            .select(*self._keys, *SUMS)
            .sort(self._keys)
            .to_arrow()
        )


def document_sums(
    dataset: Dataset,
    table: str,
    columns: Sequence[str],
    by: Sequence[str],
    *,
    prepare: RowFilter = lambda rows: rows,
) -> Iterator[pl.DataFrame]:
    """The same part by part, with all documents listed."""
    grouping = Grouping(columns, by, prepare)
    for rows in weighted_parts(dataset, table):
        yield summarize_frame(grouping.of(rows).collect(), columns, by)


def weighted_parts(dataset: Dataset, table: str, *, at_once: int = 1) -> Iterator[pl.LazyFrame]:
    """The parts of a table with `weight`, small ones together; of a table that was not written, one without rows."""
    measured = dataset.table(table)
    # a join of sequences to each part would read them again and again
    sequences = dataset.scan("sequences").select("sequence_id", pl.col("tokens").cast(pl.Float64)).collect().lazy()
    for rows in dataset.scan_parts(table, finite=False, at_once=at_once):  # sums leave out what is not finite
        yield _weighted(rows, measured, sequences)


def summarize_frame(
    rows: pl.DataFrame,
    columns: Sequence[str],
    by: Sequence[str],
    listed: Sequence[int] | NDArray[np.int64] | None = None,
) -> pl.DataFrame:
    """The same from a frame with `document_id`, `weight`, the columns and those to group by. listed: all documents by default."""
    keys, places = places_of(rows.select(by))
    documents = rows["document_id"].to_numpy()
    sums = sum_documents(
        values_of(rows, columns),
        rows[WEIGHT].to_numpy(),
        places,
        documents,
        listed=np.unique(documents) if listed is None else np.asarray(listed, dtype=np.int64),
    )
    document = pl.Series("document_id", sums.document, dtype=pl.Int64)
    return (keys[sums.place] if keys.width else keys).with_columns(
        pl.Series("column", columns, dtype=pl.String)[sums.column],
        document.set(document == POOLED, None),
        *(pl.Series(name, getattr(sums, name)) for name in SUMS),
    )


def values_of(rows: pl.DataFrame, columns: Sequence[str]) -> dict[str, NDArray[np.floating]]:
    """Columns as arrays, NaN where null."""
    return {
        name: rows[name].to_numpy() if rows[name].dtype.is_float() else rows[name].cast(pl.Float64).to_numpy()
        for name in columns
    }


def places_of(keys: pl.DataFrame) -> tuple[pl.DataFrame, NDArray[np.int64]]:
    """The distinct keys, sorted, and the number of each row's among them."""
    if not keys.width or not keys.height:
        return keys.clear() if keys.width else pl.DataFrame(), np.zeros(keys.height, np.int64)
    combined, size = np.zeros(keys.height, np.int64), 1
    for column in keys.iter_columns():
        codes, count = _codes(column)
        combined = combined * count + codes
        if size * count > _MOST_CODES:  # of places that occur there are no more than rows
            (combined, count), size = _renumbered(combined), 1
        size *= count
    is_there = np.zeros(size, bool)
    is_there[combined] = True
    numbers = np.cumsum(is_there)[combined] - 1
    firsts = np.zeros(int(is_there.sum()), np.int64)
    firsts[numbers[::-1]] = np.arange(keys.height - 1, -1, -1)
    return keys[firsts], numbers


def _codes(column: pl.Series) -> tuple[NDArray[np.int64], int]:
    """Whole numbers from 0 in the order of a column's values, null first, and how many there may be of them."""
    if not column.dtype.is_integer():
        runs = column.rle().struct.unnest()  # equal values mostly lie together
        column = runs["value"].rank("dense").gather(column.rle_id())
    codes = column.cast(pl.Int64).to_frame().select(pl.first() - pl.first().min() + 1).to_series()
    numbers = codes.fill_null(0).to_numpy()
    count = int(numbers.max()) + 1
    return (numbers, count) if count <= _MOST_CODES else _renumbered(numbers)


def _renumbered(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """The numbers that occur as 0, 1, … in their order, and how many there are."""
    found, places = np.unique(numbers, return_inverse=True)
    return places, len(found)


def _weighted(rows: pl.LazyFrame, table: Table, sequences: pl.LazyFrame) -> pl.LazyFrame:
    """Rows with `weight`: how many measured rows, or tokens, each is a mean over."""
    if table.weight == "tokens":
        return rows.join(sequences.rename({"tokens": WEIGHT}), on="sequence_id", how="left", maintain_order="left")
    return rows.with_columns(pl.col(table.weight).cast(pl.Float64).alias(WEIGHT))


def listed_documents(dataset: Dataset) -> tuple[NDArray[np.int64], set[int]]:
    """The documents that `summaries` lists by themselves, and those of them that `totals` lists."""
    documents = dataset.scan("documents").select("document_id", "sequences").collect()
    sequences_of = dict(zip(documents["document_id"], documents["sequences"], strict=True))
    sequences = dataset.scan("sequences").select("shard", "document_id", "tokens").collect()
    shards = [
        (rows["document_id"].to_numpy(), rows["tokens"].to_numpy())
        for rows in sequences.partition_by("shard", maintain_order=True)
    ]
    in_shards = [documents_listed(*shard, sequences_of) for shard in shards]
    return np.unique(np.concatenate(in_shards)) if shards else np.zeros(0, np.int64), listed_in_total(
        shards, sequences_of
    )
