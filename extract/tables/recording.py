"""The kinds of tables that are recorded: dense, ragged, additive, static.

A table's module takes the recorder of its kind and says what it keeps of a layer or a site, and what its columns are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attlas.extract.tables.table import Recorder, Scope, Table

Arrays = dict[str, np.ndarray]


class DenseRecorder(Recorder):
    """A row for each sequence and head, or for each sequence and site: arrays that are filled as batches come.

    Keeps `values` [value, batch, head] or [value, batch]; a subclass says what the columns are in terms of them.
    """

    def __init__(self, table: Table, scope: Scope) -> None:
        super().__init__(table, scope)
        self._values: dict[Any, np.ndarray] = {}

    def facts(self, values: np.ndarray) -> Mapping[str, np.ndarray]:
        """Columns [sequence, head] or [sequence] from `values` [value, sequence, head] or [value, sequence]."""
        raise NotImplementedError

    def add(self, place: Any, sequences: np.ndarray, kept: Mapping[str, np.ndarray]) -> None:
        values = kept["values"]
        if place not in self._values:
            shape = (len(values), len(self.scope.sequence_ids), *values.shape[2:])
            self._values[place] = np.full(shape, np.nan)
        self._values[place][:, sequences] = values

    def rows(self) -> Arrays:
        named = [(_keys_of(place, self.table), values) for place, values in self._values.items()]
        blocks = sorted(named, key=lambda block: tuple(block[0].values()))
        return concatenate([self._block(keys, values) for keys, values in blocks], self)

    def _block(self, keys: Mapping[str, Any], values: np.ndarray) -> Arrays:
        sequences, heads = values.shape[1], values.shape[2] if values.ndim > 2 else 1
        columns = {
            "sequence_id": np.tile(self.scope.sequence_ids, heads),
            "document_id": np.tile(self.scope.document_ids, heads),
            **{name: np.full(sequences * heads, key) for name, key in keys.items()},
            **({"head": np.repeat(np.arange(heads), sequences)} if values.ndim > 2 else {}),
        }
        return columns | {name: fact.T.ravel() for name, fact in self.facts(values).items()}


class RaggedRecorder(Recorder):
    """Any number of rows for each sequence.

    Keeps columns of one length; `sequence` among them says of which sequence of the batch a row is.
    """

    def __init__(self, table: Table, scope: Scope) -> None:
        super().__init__(table, scope)
        self._parts: list[Arrays] = []

    def add(self, place: Any, sequences: np.ndarray, kept: Mapping[str, np.ndarray]) -> None:
        columns = dict(kept)
        chosen = sequences[columns.pop("sequence")]
        keys = {name: np.full(len(chosen), key) for name, key in _keys_of(place, self.table).items()}
        ids = {"sequence_id": self.scope.sequence_ids[chosen], "document_id": self.scope.document_ids[chosen]}
        self._parts.append(ids | keys | columns)

    def rows(self) -> Arrays:
        columns = concatenate(self._parts, self)
        order = np.lexsort([columns[name] for name in reversed(self.table.order)])
        return {name: values[order] for name, values in columns.items()}


class AdditiveRecorder(Recorder):
    """Sums over all sequences of a shard, in float64. Keeps arrays by name, in parts of any shape, one place at a time."""

    in_parts = True

    def __init__(self, table: Table, scope: Scope) -> None:
        super().__init__(table, scope)
        self.sums: dict[str, dict[Any, np.ndarray]] = {}

    def add(self, place: Any, sequences: np.ndarray, kept: Mapping[str, np.ndarray]) -> None:
        for name, values in kept.items():
            total = self.sums.setdefault(name, {}).setdefault(place, np.zeros(values.shape))
            total += values


class StaticRecorder(Recorder):
    """Rows that follow from the parameters alone: a subclass gives them; they are in the part of the first shard."""


# what the keys of a place are called where a pass is described
_ATTRIBUTES = {"stack": "stack", "layer": "layer", "site": "name"}


def _keys_of(place: Any, table: Table) -> dict[str, Any]:
    """The keys of a layer or a site, but for the head: a layer has several."""
    return {name: getattr(place, _ATTRIBUTES[name]) for name in table.places if name in _ATTRIBUTES}


def concatenate(parts: Sequence[Arrays], recorder: Recorder) -> Arrays:
    """Columns concatenated over parts; empty ones if there are no parts."""
    if not parts:
        return {c.name: np.empty(0) for c in (*recorder.table.keys, *recorder.table.of_facts(recorder.scope.columns))}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
