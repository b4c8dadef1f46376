"""Sums over documents of any number of shards, added up one shard after the other.

Sums of pooled documents move to their common mean as they are added: with δ = θ' − θ, Σ (Y − θ' W)² = S − 2 δ P + δ² Q and
Σ (Y − θ' W) W = P − δ Q. Parts of a document that lies in several shards are put together first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from attlas.extract.tables.document_sums import POOLED, SUMS, is_listed_in_shard, run_starts

# a document with at least this share of all tokens is listed by itself
TOTAL_SHARE = 1 / 64
_RECENT = 4


class MergedSums:
    """Adds sums of shards, in the order of shards.

    keys: the columns that say what a row is of. listed: the documents that stay by themselves; others are pooled.
    """

    def __init__(self, keys: Sequence[str], listed: Collection[int]) -> None:
        self._keys, self._listed = list(keys), frozenset(listed)
        self._numbers: dict[tuple, int] = {}
        self._types: dict[str, pa.DataType] = {}
        self._recent: list[tuple[pa.Table, np.ndarray]] = []
        self._pooled = {name: np.zeros(0) for name in SUMS}
        # Σ w and Σ w·y, by key, of documents that may go on in the next shard, and of listed ones
        self._open: dict[int, Float[np.ndarray, "2 key"]] = {}
        self._whole: dict[int, Float[np.ndarray, "2 key"]] = {}

    def add(self, rows: pa.Table) -> None:
        """Add the sums of a shard: `document_id`, null for pooled documents, and SUMS."""
        self._types = {name: _plain(rows.schema.field(name).type) for name in self._keys}
        document = rows["document_id"].fill_null(POOLED).to_numpy()
        order = np.argsort(document, kind="stable")
        rows, document = rows.take(order), document[order]
        starts = run_starts(document)
        here = document[starts].tolist()
        for number, first, end in zip(here, starts, np.append(starts, len(document))[1:], strict=True):
            chosen = rows.slice(first, end - first)
            index = self._index(chosen.select(self._keys))
            sums = {name: chosen[name].to_numpy().astype(np.float64) for name in SUMS}
            if number == POOLED:
                self._pool(index, sums)
            else:
                self._extend(number, index, sums)
        # a document that goes on is listed in the next shard too
        for number in [number for number in self._open if number not in here]:
            self._close(number)

    def to_arrow(self) -> pa.Table:
        """A row for each key and listed document, sorted by key, pooled documents behind listed ones; names are strings."""
        for number in list(self._open):
            self._close(number)
        parts = [self._rows(POOLED, self._pooled)]
        parts += [self._rows(number, _of_one(*sums)) for number, sums in sorted(self._whole.items())]
        order = [(name, "ascending") for name in (*self._keys, "document_id")]
        return pa.concat_tables(parts).sort_by(order)

    def _index(self, keys: pa.Table) -> Int[np.ndarray, " row"]:
        """The number of each row's key. Most shards have the same keys in the same order."""
        for known, index in self._recent:
            if keys.equals(known):
                return index
        rows = zip(*(column.to_pylist() for column in keys.columns), strict=True) if self._keys else [()] * len(keys)
        index = np.array([self._numbers.setdefault(row, len(self._numbers)) for row in rows], dtype=np.int64)
        self._recent = [(keys, index), *self._recent[: _RECENT - 1]]
        self._pooled = {name: _grown(values, len(self._numbers)) for name, values in self._pooled.items()}
        return index

    def _pool(self, index: np.ndarray, new: Mapping[str, np.ndarray]) -> None:
        old = {name: values[index] for name, values in self._pooled.items()}
        weight = old["weight"] + new["weight"]
        mean = (old["weight"] * old["mean"] + new["weight"] * new["mean"]) / weight
        moved = [_about(mean, sums) for sums in (old, new)]
        sums = {name: moved[0][name] + moved[1][name] for name in moved[0]}
        for name, values in (sums | {"mean": mean}).items():
            self._pooled[name][index] = values

    def _extend(self, number: int, index: np.ndarray, sums: Mapping[str, np.ndarray]) -> None:
        of_document = _grown(self._open.get(number, np.zeros((2, 0))), len(self._numbers))
        of_document[0][index] += sums["weight"]
        of_document[1][index] += sums["weight"] * sums["mean"]
        self._open[number] = of_document

    def _close(self, number: int) -> None:
        of_document = self._open.pop(number)
        if number in self._listed:
            self._whole[number] = of_document
            return
        index = np.flatnonzero(of_document[0] > 0)
        self._pool(index, _of_one(*of_document[:, index]))

    def _rows(self, number: int, sums: Mapping[str, np.ndarray]) -> pa.Table:
        index = np.flatnonzero(sums["weight"] > 0)
        keys = list(self._numbers)
        columns: dict[str, pa.Array] = {
            name: pa.array([keys[i][place] for i in index.tolist()], self._types[name])
            for place, name in enumerate(self._keys)
        }
        columns["document_id"] = pa.array(
            np.full(len(index), number), pa.int64(), mask=np.full(len(index), number == POOLED)
        )
        columns |= {name: pa.array(values[index]) for name, values in sums.items()}
        return pa.table(columns | {"documents": columns["documents"].cast(pa.int64())})


def _plain(kind: pa.DataType) -> pa.DataType:
    """Rows can't be sorted by dictionaries."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _about(mean: np.ndarray, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums with deviations from another mean; the weight is in them as it was."""
    shift, squares = mean - sums["mean"], sums["weight_squares"]
    products = sums["deviation_products"]
    return {
        "documents": sums["documents"],
        "weight": sums["weight"],
        "deviation_squares": np.maximum(sums["deviation_squares"] - 2 * shift * products + shift**2 * squares, 0),
        "deviation_products": products - shift * squares,
        "weight_squares": squares,
    }


def _of_one(weight: np.ndarray, total: np.ndarray) -> dict[str, np.ndarray]:
    """The sums of a single document, from Σ w and Σ w·y."""
    nothing = np.zeros(len(weight))
    mean = np.divide(total, weight, out=np.zeros(len(weight)), where=weight > 0)
    sums = (np.ones(len(weight)), weight, mean, nothing, nothing, weight**2)
    return dict(zip(SUMS, sums, strict=True))


def _grown(values: np.ndarray, size: int) -> np.ndarray:
    """The values with zeros for new keys."""
    return np.concatenate([values, np.zeros((*values.shape[:-1], size - values.shape[-1]))], -1)


def listed_in_total(shards: Iterable[tuple[np.ndarray, np.ndarray]], sequences_of: Mapping[int, int]) -> set[int]:
    """The documents that stay by themselves, from the documents and lengths of each shard's sequences.

    They are listed in a shard, and have at least TOTAL_SHARE of all tokens. sequences_of: the number of each document's sequences.
    """
    tokens_of: dict[int, float] = {}
    total = 0.0
    for documents, tokens in shards:
        numbers, places = np.unique(documents, return_inverse=True)
        sums = np.bincount(places, weights=tokens)
        total += sums.sum()
        is_listed = is_listed_in_shard(documents, tokens, sequences_of)
        for number, weight in zip(numbers[is_listed].tolist(), sums[is_listed].tolist(), strict=True):
            tokens_of[number] = tokens_of.get(number, 0) + weight
    return {number for number, tokens in tokens_of.items() if tokens >= TOTAL_SHARE * total}
