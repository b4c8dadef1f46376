"""What a table is: its keys and columns, what it needs of a pass, how it records one, and the rules that its rows keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from attlas.extract.engines.needs import Needs
from attlas.extract.errors import Refusal
from attlas.extract.tables.column import Column

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attlas.extract.engines.observations import HeadObservation, ResidualObservation
    from attlas.extract.engines.stream_profiles import SiteSums
    from attlas.extract.engines.sums import HeadSums

# plan: what the pass over the corpus found; dense: a row for each sequence and place (a head, or a site); ragged: any
# number of rows for each sequence; additive: sums of a shard, which merge by addition; static: from the parameters alone
Kind = Literal["plan", "dense", "ragged", "additive", "static"]

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
class Rule:
    """A rule that rows keep, as SQL over the table's columns: `wrong` is true of a row that breaks it.

    Of a table with `sequence_id` it may also use `n`, the sequence's tokens, and `of_tokens`, whether queries and keys
    are the sequence's tokens (windows, pooled states and latents are others).
    """

    name: str
    wrong: str
    message: str


@dataclass(frozen=True)
class Agreement:
    """An aggregate of this table that equals one of another table, for each combination of the `by` columns.

    `this` and `that` are SQL aggregates over the rows of this table (those that `where` is true of) and of the other, in
    both of the rows that `only` is true of. A combination that this table lacks counts as 0; one that the other lacks is
    wrong. A sum may be off by `tolerance`, relative where it is larger than 1. Rows that are only there if asked for are
    `optional`: a part without any agrees.
    """

    name: str
    table: str
    by: tuple[str, ...]
    this: str
    that: str
    message: str
    where: str = "TRUE"
    only: str = "TRUE"
    tolerance: float = 0.0
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the contract: a folder of Parquet parts on disk.

    `keys` identify a row; parts are sorted by `order`. `example`: a query about any of its facts. `outcome`: the
    column that is not null where a softmax has one more outcome than keys. `totals`: facts of the corpus in the manifest
    that are aggregates of this table, in SQL. `recorder` makes what records a shard; a planned table has none.
    """

    name: str
    row: str
    kind: Kind
    keys: tuple[Column[Any, Any], ...]
    facts: tuple[Column[Any, Any], ...]
    order: tuple[str, ...]
    profiles: tuple[Column[Any, Any], ...] = ()  # what its rows may be of besides the usual, asked for like columns
    on_request: bool = False
    of_stream: bool = False  # of the residual stream: absent where that can't be read
    is_newer: bool = False  # than the schema: datasets that earlier versions wrote lack it
    needs: Callable[[Sequence[Column]], Needs] = lambda columns: Needs()  # of these columns
    recorder: Callable[[Table, Scope], Recorder] | None = None
    derive: Callable[..., pa.Table] | None = None
    conclude: Callable[[Callable[[str], Iterator[pa.Table]]], pa.Table] | None = None
    weight: str = ""
    rules: tuple[Rule, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    totals: Mapping[str, str] = field(default_factory=dict)
    counted_by: str | None = None  # the key that counts 0, 1, 2, … over all rows
    outcome: str | None = None
    notes: str = ""  # for the dictionary, below the columns
    example: str = "SELECT {table}.{column}, COUNT(*) AS rows FROM {table} GROUP BY ALL ORDER BY ALL LIMIT 5"

    @property
    def columns(self) -> tuple[Column[Any, Any], ...]:
        return self.keys + self.facts

    @property
    def statistics(self) -> tuple[Column[Any, Any], ...]:
        """All that can be asked for by name: the computed columns, and profiles."""
        return self.facts + self.profiles

    def of_facts(self, chosen: Sequence[Column[Any, Any]]) -> tuple[Column[Any, Any], ...]:
        """Those of the chosen statistics that are columns."""
        profiles = {column.name for column in self.profiles}
        return tuple(column for column in chosen if column.name not in profiles)

    @property
    def optional(self) -> frozenset[str]:
        """The columns that are only there if asked for."""
        return frozenset(column.name for column in self.facts if not column.core)

    @property
    def is_always_written(self) -> bool:
        """Whether every dataset of this schema has it; the residual stream of some models can't be read."""
        return not self.on_request and not self.is_newer and not self.of_stream

    @property
    def places(self) -> tuple[str, ...]:
        """The keys that say where in the model: all but the numbers of sequence and document."""
        return tuple(c.name for c in self.keys if c.name not in ("sequence_id", "document_id"))

    def schema(self, *, optional: frozenset[str] = frozenset(), without: frozenset[str] = frozenset()) -> pa.Schema:
        """The Arrow schema, each field with its formula, unit and bounds as metadata."""
        left_out = (self.optional - optional) | without
        return pa.schema([_field(c) for c in self.columns if c.name not in left_out])

    def to_arrow(self, columns: Mapping[str, Any]) -> pa.Table:
        """Rows from a mapping of columns to arrays, those that it lacks left out; null where a value is not finite."""
        absent = frozenset(c.name for c in self.columns) - columns.keys()
        schema = self.schema(optional=self.optional, without=absent)
        return pa.table([_to_arrow(np.asarray(columns[f.name]), f.type) for f in schema], schema=schema)


@dataclass(frozen=True)
class Scope:
    """The sequences that a table is recorded for, the columns that are asked for, and what is measured."""

    sequence_ids: np.ndarray
    document_ids: np.ndarray
    columns: tuple[Column, ...]
    needs: Needs  # of all tables together: the names of what a pass gives
    model: nn.Module
    layout: Any  # capture's Layout: the attention layers and residual sites that are measured
    shard: int = 0
    edges: int = 8  # strongest keys of a query


class Recorder:
    """What a table keeps of a shard; a subclass overrides what it takes part in.

    It is given every attention layer and every residual site of a batch, and says what it keeps of it: tensors, wherever
    the model runs. They are brought home together. Once the batch has gone through they are added at its sequences'
    places; of a batch that failed half-way nothing is. At the end the recorder makes its rows.
    """

    # whether what is kept comes in parts, along a first dimension, which are added up in float64 before they are brought home
    in_parts = False

    def __init__(self, table: Table, scope: Scope) -> None:
        self.table, self.scope = table, scope

    def keep_heads(self, layer: Any, sums: HeadSums, calls: Sequence[HeadObservation]) -> Mapping[str, Tensor] | None:
        """What is kept of an attention layer on a batch. It was one call, or one for each window of the sequences.

        Sums are in the order of the scope's `needs.head_names`.
        """
        return None

    def keep_site(self, site: Any, sums: SiteSums) -> Mapping[str, Tensor] | None:
        """What is kept of a residual site on a batch; values in the order of the scope's `needs.residual_names`."""
        return None

    def keep_layer(self, layer: Any, sums: SiteSums) -> Mapping[str, Tensor] | None:
        """What is kept of a whole layer on a batch; values in the order of the scope's `needs.layer_names`."""
        return None

    def keep_state(self, site: Any, o: ResidualObservation) -> Mapping[str, Tensor] | None:
        """What is kept of the states around a residual site on a batch; asked where `states` are needed."""
        return None

    def keep_ablations(self, place: int, sequence: Any) -> Mapping[str, Tensor] | None:
        """What is kept of a sequence of the sample, at this place in the batch, whose passes can leave parts of the model out."""
        return None

    def begin_batch(self) -> None:
        """Forget what is left of the batch before; also if that one failed."""

    def end_batch(self) -> Iterable[tuple[Any, Mapping[str, Tensor]]]:
        """What is kept of a batch as a whole, once it has gone through: places, and tensors of each."""
        return ()

    def add(self, place: Any, sequences: np.ndarray, kept: Mapping[str, np.ndarray]) -> None:
        """Add what was kept of a layer or site; `sequences` are the places in the shard of the batch's sequences."""
        raise NotImplementedError

    def rows(self) -> Mapping[str, Any]:
        """The rows in the table's order, as columns; those that it lacks are left out."""
        raise NotImplementedError

    def to_arrow(self) -> pa.Table:
        rows = self.rows()
        for column in self.scope.columns:
            if column.origin:  # attlas' own are tested
                _refuse_out_of_bounds(column, rows, self.table)
        return self.table.to_arrow(rows)


def _refuse_out_of_bounds(column: Column, rows: Mapping[str, Any], table: Table) -> None:
    """Raise Refusal if a user's column breaks its bounds, naming the row."""
    place = column.first_out_of_bounds(rows[column.name])
    if place is not None:
        where = ", ".join(f"{c.name} {rows[c.name][place]}" for c in table.keys if c.name != "document_id")
        raise Refusal(
            f"a column keeps its bounds; {column.name} of {column.origin_file} has {column.bounds_text or 'finite values'} and "
            f"is {rows[column.name][place]:g} at {where}; correct the function or its bounds, and measure into another folder"
        )


def _field(column: Column) -> pa.Field:
    return pa.field(column.name, _TYPES[column.dtype], nullable=column.nullable, metadata=column.metadata)


def _to_arrow(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Null where a value is undefined; neither NaN nor infinity is ever written."""
    if pa.types.is_dictionary(kind):
        return pa.array(values.tolist(), kind.value_type).cast(kind)
    if pa.types.is_floating(kind):
        values = values.astype(kind.to_pandas_dtype())
    defined = np.isfinite(values)
    return pa.array(np.where(defined, values, 0).astype(kind.to_pandas_dtype()), kind, mask=~defined)
