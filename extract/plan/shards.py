"""The rows of one shard as they are planned, and of a shard that has lost documents as it is planned again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from attlas.extract.model.special_tokens import SpecialTokens

_COMMON_COLUMNS = {
    "sequence_id": pa.int64(),
    "document_id": pa.int64(),
    "shard": pa.int32(),
    "window": pa.int32(),
    "first_token": pa.int32(),
    "tokens": pa.int64(),
    "special_tokens": pa.int64(),
}
_TEXT_SEQUENCES = pa.schema(_COMMON_COLUMNS | {"token_ids": pa.list_(pa.int32()), "special": pa.list_(pa.bool_())})
_IMAGE_SEQUENCES = pa.schema(_COMMON_COLUMNS | {"image": pa.string(), "sha256": pa.string()})
_MARKS = pa.field("marks", pa.list_(pa.int8()))  # of each token: part of a needle, or of its answer
_TEXT = pa.field("text", pa.large_string())
_DOCUMENTS = pa.schema(
    {
        "document_id": pa.int64(),
        "source": pa.string(),
        "digest": pa.string(),
        "characters": pa.int64(),
        "content_tokens": pa.int64(),
        "sequences": pa.int64(),
        "dropped_reason": pa.string(),
    }
)


# of a planned sequence: what its spool has of it besides, and its ids with special tokens, None for images
Read = Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], np.ndarray | None]]


@dataclass
class ShardRows:
    """The rows of one shard; `ids` is empty for images."""

    number: int
    sequences: list[dict[str, Any]] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    marks: list[np.ndarray] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)

    def image_table(self) -> pa.Table:
        return pa.Table.from_pylist(self.sequences, schema=_IMAGE_SEQUENCES)

    def sequence_table(self, special: SpecialTokens, *, keep_text: bool) -> pa.Table:
        ends = np.cumsum([0, *map(len, self.ids)], dtype=np.int32)
        inside = np.ones(ends[-1], bool)
        for first, last in pairwise(ends):
            inside[first + len(special.before) : last - len(special.after)] = False
        values = np.concatenate(self.ids) if self.ids else np.zeros(0, np.int32)
        lists = {
            "token_ids": pa.ListArray.from_arrays(pa.array(ends), pa.array(values)),
            "special": pa.ListArray.from_arrays(pa.array(ends), pa.array(inside)),
        }
        schema = _TEXT_SEQUENCES.append(_TEXT) if keep_text else _TEXT_SEQUENCES
        if self.marks:
            schema = schema.append(_MARKS)
            lists["marks"] = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(self.marks)))
        columns = [
            lists[f.name] if f.name in lists else pa.array([r[f.name] for r in self.sequences], f.type) for f in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def document_table(self) -> pa.Table:
        return pa.Table.from_pylist(self.documents, schema=_DOCUMENTS)


@dataclass
class ReplacedShard:
    """A shard of an earlier generation that has lost documents: what is left of it, to be filled with tokens or images."""

    number: int
    sequences: list[dict[str, Any]]
    documents: list[dict[str, Any]]
    lost: list[dict[str, Any]]  # sequences
    gone: list[dict[str, Any]]  # documents, as they were
    reasons: Mapping[int, str]
    ids: dict[int, np.ndarray] = field(default_factory=dict)
    filled: int = 0

    @classmethod
    def of(
        cls,
        number: int,
        sequences: list[dict[str, Any]],
        documents: list[dict[str, Any]],
        reasons: Mapping[int, str],
    ) -> ReplacedShard:
        left = [row for row in sequences if row["document_id"] not in reasons]
        lost = [row for row in sequences if row["document_id"] in reasons]
        gone = [row for row in documents if row["document_id"] in reasons]
        rows = [_without(row, reasons) if row["document_id"] in reasons else row for row in documents]
        return cls(number, left, rows, lost, gone, reasons)

    def fill(self, document: int, window_of: Read) -> None:
        """Add what the model reads of the windows of a document. Raises Damaged if they are not as they were."""
        for place, row in enumerate(self.sequences):
            if row["document_id"] == document:
                facts, ids = window_of(row)
                row.update(facts)
                if ids is not None:
                    self.ids[place] = ids
                self.filled += 1

    @property
    def is_filled(self) -> bool:
        return self.filled == len(self.sequences)

    def whole(self) -> ShardRows:
        return ShardRows(self.number, self.sequences, [self.ids[n] for n in sorted(self.ids)], documents=self.documents)


def _without(row: Mapping[str, Any], reasons: Mapping[int, str]) -> dict[str, Any]:
    """The row of a document that is gone."""
    nothing = {"digest": None, "content_tokens": 0, "sequences": 0}
    characters = None if row["characters"] is None else 0
    return {**row, **nothing, "characters": characters, "dropped_reason": reasons[row["document_id"]]}
