"""Differences of means between two datasets of the same documents, each document compared with itself.

The standard error is the jackknife's of the difference: every document is left out of both datasets at once. Both are read side by
side, part by part, in the order of their documents, so memory is bounded by a few parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import polars as pl
from numpy.typing import NDArray

from attlas.analysis.dataset import Dataset
from attlas.analysis.summaries import WEIGHT, Grouping, means_of, places_of, values_of, weighted_parts
from attlas.extract.tables.document_sums import DocumentGroups

_CELLS_AT_ONCE = 1 << 25  # columns × places × documents that are held of a part
_DOCUMENTS = 256  # of a part, for that
_PARTS_AHEAD = 2


def paired_differences(a: Dataset, b: Dataset, table: str, columns: Sequence[str]) -> pl.DataFrame:
    """Means of a table's columns in two datasets of the same documents, at the places that both have.

    A row for each place and column: `a`, `b`, `difference` = b − a, its `se`, `freedom` (of Student's t: documents as they count in
    the dataset in which they are more unequal, less one) and `documents`.
    """
    by = a.table(table).places
    means = [means_of(dataset, table, columns) for dataset in (a, b)]
    both = means[0].join(means[1], on=[*by, "column"], suffix="|b", nulls_equal=True).sort(*by, "column")
    places = both.select(by).unique(maintain_order=True)
    at_once = max(1, _CELLS_AT_ONCE // max(1, places.height * _DOCUMENTS))
    chunks = [columns[start : start + at_once] for start in range(0, len(columns), at_once)]
    errors = [_errors(a, b, table, chunk, both, places) for chunk in chunks] or [_NO_ERRORS]
    found = both.join(
        pl.concat(errors), on=[*by, "column"], nulls_equal=True, how="left", suffix="|both", maintain_order="left"
    )
    effective = pl.min_horizontal("effective_documents", "effective_documents|b")
    return found.select(
        *by,
        "column",
        a="estimate",
        b="estimate|b",
        difference=pl.col("estimate|b") - pl.col("estimate"),
        se=pl.when(pl.col("se").is_not_null() & pl.col("se|b").is_not_null()).then("se|both"),
        freedom=effective - 1,
        documents="documents|both",
    )


_NO_ERRORS = pl.DataFrame(schema={"column": pl.String, "se": pl.Float64, "documents": pl.Int64})


def _errors(
    a: Dataset, b: Dataset, table: str, columns: Sequence[str], means: pl.DataFrame, places: pl.DataFrame
) -> pl.DataFrame:
    """`se` and `documents` of the differences of some columns."""
    readers = [
        _Reader(_sums_of_parts(dataset, table, columns, places), _Means.of(means, columns, places, suffix))
        for dataset, suffix in ((a, ""), (b, "|b"))
    ]
    shape = (len(columns), places.height)
    count, total, squares = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape)
    for changes, present in _changes_of_documents(*readers):
        count += present.sum(-1)
        total += changes.sum(-1)
        squares += np.square(changes).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = (count - 1) / count * (squares - total**2 / count)
    error = np.where(count >= 2, np.sqrt(np.maximum(variance, 0)), np.nan)
    of_columns = [
        places.with_columns(
            pl.lit(name).alias("column"),
            pl.Series("se", error[number], nan_to_null=True),
            pl.Series("documents", count[number]),
        )
        for number, name in enumerate(columns)
    ]
    return pl.concat(of_columns)


@dataclass(frozen=True)
class _Means:
    """θ and Σ w of all documents: Float64[column, place, 1]."""

    estimate: NDArray[np.float64]
    weight: NDArray[np.float64]

    @classmethod
    def of(cls, means: pl.DataFrame, columns: Sequence[str], places: pl.DataFrame, suffix: str) -> _Means:
        by = places.columns
        arrays = []
        for field in ("estimate", "rows"):
            wide = [
                places.join(
                    means.filter(pl.col("column") == name), on=by, how="left", nulls_equal=True, maintain_order="left"
                )[field + suffix]
                .cast(pl.Float64)
                .to_numpy()
                for name in columns
            ]
            arrays.append(np.stack(wide)[..., None])
        return cls(*arrays)


@dataclass
class _Sums:
    """Documents in ascending order, and their Σ w and Σ w·y: Float64[column, place, document]."""

    documents: NDArray[np.int64]
    weights: NDArray[np.float64]
    totals: NDArray[np.float64]

    def split(self, end: float) -> tuple[_Sums, _Sums]:
        """The documents before `end`, and the others."""
        at = int(np.searchsorted(self.documents, end))
        first, rest = slice(None, at), slice(at, None)
        return tuple(_Sums(self.documents[s], self.weights[..., s], self.totals[..., s]) for s in (first, rest))  # pyright: ignore[reportReturnType]

    def followed_by(self, other: _Sums) -> _Sums:
        """Both; the last document here may go on there."""
        if len(self.documents) and len(other.documents) and self.documents[-1] == other.documents[0]:
            other.weights[..., 0] += self.weights[..., -1]
            other.totals[..., 0] += self.totals[..., -1]
            return self.split(self.documents[-1])[0].followed_by(other)
        return _Sums(
            np.concatenate([self.documents, other.documents]),
            np.concatenate([self.weights, other.weights], -1),
            np.concatenate([self.totals, other.totals], -1),
        )

    def at(self, documents: NDArray[np.int64]) -> _Sums:
        """Sums of these documents, 0 for those that are not here."""
        if np.array_equal(documents, self.documents):
            return self
        places = np.searchsorted(documents, self.documents)
        shape = (*self.weights.shape[:-1], len(documents))
        found = _Sums(documents, np.zeros(shape), np.zeros(shape))
        found.weights[..., places], found.totals[..., places] = self.weights, self.totals
        return found


class _Reader:
    """The documents of a dataset, in ascending order."""

    def __init__(self, parts: Iterator[_Sums], means: _Means) -> None:
        self._parts, self.means = parts, means
        self._pending = next(self._parts)
        self.is_at_end = False

    @property
    def end(self) -> float:
        """The first document that may not be whole yet."""
        documents = self._pending.documents
        return np.inf if self.is_at_end else documents[-1] if len(documents) else -1

    def read(self) -> None:
        part = next(self._parts, None)
        if part is None:
            self.is_at_end = True
        else:
            self._pending = self._pending.followed_by(part)

    def take(self, end: float) -> _Sums:
        taken, self._pending = self._pending.split(end)
        return taken

    def changes(self, sums: _Sums) -> NDArray[np.float64]:
        """How much the mean falls if a document is left out."""
        rest = self.means.weight - sums.weights
        change = np.zeros_like(rest)
        return np.divide(
            sums.totals - self.means.estimate * sums.weights, rest, out=change, where=(sums.weights > 0) & (rest > 0)
        )


def _changes_of_documents(a: _Reader, b: _Reader) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """How much leaving out a document changes the difference of means, and which documents have a value in either."""
    while True:
        end = min(a.end, b.end)
        sums = [reader.take(end) for reader in (a, b)]
        documents = np.union1d(sums[0].documents, sums[1].documents)
        if len(documents):
            first, second = (of.at(documents) for of in sums)
            yield b.changes(second) - a.changes(first), (first.weights > 0) | (second.weights > 0)
        if end == np.inf:
            return
        (a if a.end == end else b).read()


def _sums_of_parts(dataset: Dataset, table: str, columns: Sequence[str], places: pl.DataFrame) -> Iterator[_Sums]:
    """The sums of a table's parts, in the order of documents; parts are read ahead."""
    grouping = Grouping(columns, places.columns)

    def sums_of(rows: pl.LazyFrame) -> _Sums:
        return _sums_at(grouping.of(rows).collect(), columns, places)

    return _read_ahead(sums_of, weighted_parts(dataset, table))


def _sums_at(rows: pl.DataFrame, columns: Sequence[str], places: pl.DataFrame) -> _Sums:
    """Sums of rows at these places."""
    by = places.columns
    keys, numbers = places_of(rows.select(by))
    known = keys.join(places.with_row_index("|place"), on=by, how="left", nulls_equal=True, maintain_order="left")
    place = known["|place"].cast(pl.Int64).fill_null(-1).to_numpy()[numbers]
    if (place < 0).any():
        rows, place = rows.filter(pl.Series(place >= 0)), place[place >= 0]
    groups = DocumentGroups(place, rows["document_id"].to_numpy())
    documents = np.unique(groups.document)
    where = (groups.place, np.searchsorted(documents, groups.document))
    found = _Sums(documents, *np.zeros((2, len(columns), places.height, len(documents))))
    sums = groups.weights_and_totals(values_of(rows, columns), rows[WEIGHT].to_numpy())
    for number, (weights, totals) in enumerate(sums):
        found.weights[number][where], found.totals[number][where] = weights, totals
    return found


def _read_ahead(read: Callable[[pl.LazyFrame], _Sums], parts: Iterator[pl.LazyFrame]) -> Iterator[_Sums]:
    """Results in order, of which some are worked out while others are used."""
    with ThreadPoolExecutor(_PARTS_AHEAD) as threads:
        waiting: deque[Future[_Sums]] = deque(threads.submit(read, part) for part in islice(parts, _PARTS_AHEAD))
        while waiting:
            result = waiting.popleft().result()
            for part in islice(parts, 1):
                waiting.append(threads.submit(read, part))
            yield result
