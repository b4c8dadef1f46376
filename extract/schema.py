"""The tables: their columns, derived from the catalogue, and the bins of the additive profiles."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from extract.statistics import attention, profiles, residual
from extract.statistics.attention import CLASS_MASSES as CLASS_MASSES
from extract.statistics.profiles import doubling_bin_edges as doubling_bin_edges
from extract.statistics.registry import Column, columns_of

SCHEMA_VERSION = 1

_TYPES: Mapping[str, pa.DataType] = {
    "float32": pa.float32(),
    "float64": pa.float64(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "string": pa.string(),
    "stack": pa.dictionary(pa.int8(), pa.string()),
    "bool": pa.bool_(),
    "list<int32>": pa.list_(pa.int32()),
}

DOCUMENT_ID = Column(name="document_id", dtype="int64", formula="number of the document, from 0 in corpus order")
SEQUENCE_ID = Column(name="sequence_id", dtype="int64", formula="number of the sequence, from 0 in corpus order")
SHARD = Column(name="shard", dtype="int32", formula="number of the shard, from 0; sequence_id ÷ sequences per shard")
STACK = Column(name="stack", dtype="stack", formula="encoder | decoder | cross | a tower's name")
LAYER = Column(name="layer", dtype="int16", formula="number of the layer within its stack, from 0")
HEAD = Column(name="head", dtype="int16", formula="number of the head within its layer, from 0")


@dataclass(frozen=True)
class Table:
    """One table of the contract: a folder of Parquet parts on disk.

    `keys` identify a row; parts are sorted by `order`; `optional` columns are there only on request. Datasets written by
    an earlier attlas lack the columns that were `added` since, and hold counts as int32.
    """

    name: str
    row: str
    keys: tuple[Column[Any, Any], ...]
    facts: tuple[Column[Any, Any], ...]
    order: tuple[str, ...]
    optional: frozenset[str] = frozenset()
    added: frozenset[str] = frozenset()

    @property
    def columns(self) -> tuple[Column[Any, Any], ...]:
        return self.keys + self.facts

    def schema(self, *, optional: frozenset[str] = frozenset(), without: frozenset[str] = frozenset()) -> pa.Schema:
        """The Arrow schema, each field with its formula, unit and bounds as metadata."""
        left_out = (self.optional - optional) | without
        present = [c for c in self.columns if c.name not in left_out]
        return pa.schema([_field(c) for c in present])


def _field(column: Column) -> pa.Field:
    return pa.field(column.name, _TYPES[column.dtype], nullable=column.nullable, metadata=column.metadata)


DOCUMENTS = Table(
    name="documents",
    row="document",
    keys=(DOCUMENT_ID,),
    facts=(
        Column(name="source", dtype="string", formula="file and place in it (line or row, from 1); an image's file"),
        Column(
            name="digest",
            dtype="string",
            formula="HMAC-SHA256(key, UTF-8 text, or an image file's bytes), hexadecimal",
            meaning="null without a key: an unkeyed digest lets anyone test whether a text they know was in the corpus",
            nullable=True,
        ),
        Column(
            name="characters",
            dtype="int64",
            unit="characters",
            formula="length of the text; null for an image",
            bounds=(0, None),
            nullable=True,
        ),
        Column(
            name="tokens",
            dtype="int64",
            unit="tokens",
            formula="ids without special tokens; of an image its patches",
            bounds=(0, None),
        ),
        Column(
            name="sequences",
            dtype="int64",
            formula="windows cut from the document; 1 for an image",
            bounds=(0, None),
        ),
        Column(name="dropped_reason", dtype="string", formula="why it gave no sequence; null if it did", nullable=True),
    ),
    order=("document_id",),
)

SEQUENCES = Table(
    name="sequences",
    row="sequence (a window of a document)",
    keys=(SEQUENCE_ID,),
    facts=(
        DOCUMENT_ID,
        SHARD,
        Column(name="window", dtype="int32", formula="number of the window in its document, from 0", bounds=(0, None)),
        Column(
            name="first_token",
            dtype="int32",
            formula="index of the window's first token among the document's ids without special tokens",
            bounds=(0, None),
        ),
        Column(
            name="tokens", dtype="int64", unit="tokens", formula="length, special tokens included", bounds=(1, None)
        ),
        Column(
            name="special_tokens",
            dtype="int64",
            unit="tokens",
            formula="special tokens in it; of an image those that are no patches (class, registers), 0 if its grid is not known",
            bounds=(0, None),
        ),
        Column(
            name="token_ids", dtype="list<int32>", formula="the ids (only with --tokens ids or text)", nullable=True
        ),
        Column(name="text", dtype="string", formula="the window's text (only with --tokens text)", nullable=True),
    ),
    order=("sequence_id",),
    optional=frozenset({"token_ids", "text"}),
)

HEADS = Table(
    name="heads",
    row="sequence × stack × layer × head",
    keys=(SEQUENCE_ID, DOCUMENT_ID, STACK, LAYER, HEAD),
    facts=columns_of(attention),
    order=("stack", "layer", "head", "sequence_id"),
    added=frozenset({"mass_whitespace"}),
)

RESIDUAL = Table(
    name="residual",
    row="sequence × stack × layer × site",
    keys=(
        SEQUENCE_ID,
        DOCUMENT_ID,
        STACK,
        LAYER,
        Column(name="site", dtype="stack", formula="embedding | attention | cross_attention | mlp | final_norm"),
    ),
    facts=columns_of(residual),
    order=("stack", "layer", "site", "sequence_id"),
)

PROFILES = Table(
    name="profiles",
    row="shard × stack × layer × head × profile × bin",
    keys=(
        SHARD,
        STACK,
        LAYER,
        HEAD,
        Column(name="profile", dtype="stack", formula=" | ".join(p.name for p in profiles.PROFILES)),
        Column(name="bin", dtype="int16", formula="number of the bin; see the bins of each profile"),
    ),
    facts=(
        Column(
            name="sum", dtype="float64", formula="the profile's sum over the shard's rows; adding shards merges them"
        ),
        Column(name="count", dtype="float64", formula="how many entered the bin; see each profile"),
    ),
    order=("stack", "layer", "head", "profile", "bin"),
)

TABLES: Mapping[str, Table] = {t.name: t for t in (DOCUMENTS, SEQUENCES, HEADS, RESIDUAL, PROFILES)}


def histogram_bin_edges(number: int) -> tuple[float, float]:
    """Lower and upper edge of one of the 64 equal bins on [0, 1]; the last is closed above."""
    return number / profiles.HISTOGRAM_BINS, (number + 1) / profiles.HISTOGRAM_BINS
