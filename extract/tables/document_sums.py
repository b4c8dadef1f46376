"""Sums over documents from which a mean and its interval follow, and merge over shards without reading rows again.

The document is the sampling unit. For each place and column, Y_d = Σ w·y and W_d = Σ w over the rows of document d that have a
value, θ = Σ Y_d / Σ W_d, and the sums are of W_d, (Y_d − θ W_d)², (Y_d − θ W_d) W_d and W_d²: they move to any other θ
without cancelling. Documents whose part in other shards, or whose own weight, has to be known are listed by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Num

# a document with at least this share of its shard's tokens is listed by itself
HEAVY_SHARE = 1 / 16
POOLED = -1  # in place of a document's number: several documents together


@dataclass(frozen=True)
class DocumentSums:
    """Sums of documents, a row for each place and column: one for all pooled documents, then one for each listed document.

    `place` and `column` are numbers from 0, `document` is POOLED or a document's number; rows are sorted by the three.
    """

    place: Int[np.ndarray, " row"]
    column: Int[np.ndarray, " row"]
    document: Int[np.ndarray, " row"]
    documents: Int[np.ndarray, " row"]
    weight: Float[np.ndarray, " row"]
    mean: Float[np.ndarray, " row"]
    deviation_squares: Float[np.ndarray, " row"]
    deviation_products: Float[np.ndarray, " row"]
    weight_squares: Float[np.ndarray, " row"]


# the fields that add up
SUMS = ("documents", "weight", "mean", "deviation_squares", "deviation_products", "weight_squares")


def is_listed_in_shard(
    documents: Int[np.ndarray, " sequence"], tokens: Num[np.ndarray, " sequence"], sequences_of: Mapping[int, int]
) -> Bool[np.ndarray, " document"]:
    """Which documents of a shard, in ascending order, are listed by themselves, given its sequences' documents and lengths.

    They lie partly in another shard, or are heavy. sequences_of: the number of all sequences of documents that begin in the shard.
    """
    numbers, places, counts = np.unique(documents, return_inverse=True, return_counts=True)
    is_whole = np.array([sequences_of.get(number) for number in numbers.tolist()]) == counts
    return ~is_whole | (np.bincount(places, weights=tokens) >= HEAVY_SHARE * tokens.sum())


def documents_listed(
    documents: Int[np.ndarray, " sequence"], tokens: Num[np.ndarray, " sequence"], sequences_of: Mapping[int, int]
) -> Int[np.ndarray, " listed"]:
    """The documents of a shard that are listed by themselves."""
    return np.unique(documents)[is_listed_in_shard(documents, tokens, sequences_of)]


def sum_documents(
    columns: Mapping[str, Num[np.ndarray, " row"]],
    weights: Num[np.ndarray, " row"],
    places: Int[np.ndarray, " row"],
    documents: Int[np.ndarray, " row"],
    *,
    listed: Int[np.ndarray, " listed"],
) -> DocumentSums:
    """The sums of rows: their values, NaN where undefined, their weights, places and documents, in any order."""
    if not len(weights):
        return DocumentSums(*(np.empty(0, dtype=np.int64) for _ in range(4)), *(np.empty(0) for _ in range(5)))
    groups = DocumentGroups(places, documents)
    pool = _Pool(groups, listed)
    blocks = []
    for number, (of_documents, totals) in enumerate(groups.weights_and_totals(columns, weights)):
        blocks += [(number, block) for block in pool.rows(of_documents, totals)]
    numbers = np.concatenate([np.full(len(block[0]), number) for number, block in blocks])
    place, document, *sums = (np.concatenate(parts) for parts in zip(*(block for _, block in blocks), strict=True))
    order = np.lexsort((document, numbers, place))
    return DocumentSums(*(values[order] for values in (place, numbers, document, *sums)))


class DocumentGroups:
    """The rows of each document at each place, in any order; groups are sorted by place, then by document."""

    def __init__(self, places: Int[np.ndarray, " row"], documents: Int[np.ndarray, " row"]) -> None:
        # rows of a document mostly lie together, so runs of them are added up first
        self._runs = run_starts(places, documents)
        place, document = places[self._runs], documents[self._runs]
        self._order = np.lexsort((document, place))
        place, document = place[self._order], document[self._order]
        self._groups = run_starts(place, document)
        self.place, self.document = place[self._groups], document[self._groups]

    def weights_and_totals(
        self, columns: Mapping[str, Num[np.ndarray, " row"]], weights: Num[np.ndarray, " row"]
    ) -> Iterator[tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]]:
        """Of each column W = Σ w over the rows with a value, and Y = Σ w·y."""
        weights = np.asarray(weights, dtype=np.float64)
        of_all = self._add(weights)
        for values in columns.values():
            is_known = np.isfinite(values)
            if is_known.all():
                yield of_all, self._add(weights * values)
            else:
                yield self._add(np.where(is_known, weights, 0)), self._add(weights * np.where(is_known, values, 0))

    def _add(self, values: Float[np.ndarray, " row"]) -> Float[np.ndarray, " group"]:
        return np.add.reduceat(np.add.reduceat(values, self._runs)[self._order], self._groups)


class _Pool:
    """Adds up the documents of a place that are not listed."""

    def __init__(self, groups: DocumentGroups, listed: np.ndarray) -> None:
        self.place, self.document = groups.place, groups.document
        self.is_listed: Bool[np.ndarray, " group"] = np.isin(self.document, listed)
        self._of_places = run_starts(self.place)
        self._place_numbers = run_numbers(self._of_places, len(self.place))

    def rows(self, weights: np.ndarray, totals: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """The fields of DocumentSums but for `column`: of pooled documents, and of listed ones, from W_d and Y_d."""
        has_weight = weights > 0
        yield self._pooled(weights, totals, has_weight & ~self.is_listed)
        chosen = has_weight & self.is_listed
        w, y = weights[chosen], totals[chosen]
        nothing = np.zeros(len(w))
        yield self.place[chosen], self.document[chosen], np.ones(len(w), np.int64), w, y / w, nothing, nothing, w * w

    def _pooled(self, weights: np.ndarray, totals: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
        add = self._adder(chosen)
        count, weight, total = add(np.ones(len(weights))), add(weights), add(totals)
        mean = np.divide(total, weight, out=np.zeros(len(weight)), where=weight > 0)
        deviations = totals - mean[self._place_numbers] * weights
        sums = (weight, mean, add(deviations**2), add(deviations * weights), add(weights**2))
        kept = count > 0
        place = self.place[self._of_places][kept]
        return place, np.full(len(place), POOLED), count[kept].astype(np.int64), *(s[kept] for s in sums)

    def _adder(self, chosen: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Sums by place over the chosen groups."""
        return lambda values: np.add.reduceat(np.where(chosen, values, 0), self._of_places)


def run_starts(*keys: np.ndarray) -> Int[np.ndarray, " run"]:
    """Where runs of equal keys begin."""
    changes = np.zeros(len(keys[0]), dtype=bool)
    changes[:1] = True
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(changes)


def run_numbers(starts: Int[np.ndarray, " run"], rows: int) -> Int[np.ndarray, " row"]:
    """The number of the run that each row is in."""
    return np.repeat(np.arange(len(starts)), np.diff(starts, append=rows))
