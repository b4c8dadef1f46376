"""A finished dataset as LazyFrames, read from exactly the parts that its manifest names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import polars.selectors as cs
import pyarrow as pa

from attlas.analysis.parts import DamagedPart, common_schema, incompatible_columns, value_kind
from attlas.analysis.scanning import scan_parts
from attlas.extract.store import Location, Part, Refusal, Storage, is_key, open_dataset, parts_of
from attlas.extract.tables import TABLES, Table, with_own_columns
from attlas.extract.tables.own import column_of_facts


@dataclass(frozen=True)
class Dataset:
    """A finished dataset: its storage and its manifest.

    min_documents: analyses give no numbers of fewer documents, and exports pool so many.
    """

    storage: Storage
    manifest: Mapping[str, Any]
    min_documents: int = 1
    _schemas: dict[str, pa.Schema] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, location: Location, *, min_documents: int = 1) -> Dataset:
        """Open a finished dataset: a folder, or the URL of one in an object store.

        Its `tables` are names, `manifest` is what was measured and how, and `scan("heads")` is a Polars LazyFrame: a row for each
        sequence × stack × layer × head, numbered from 0, with float32 columns whose units are in their names or `attlas stats`.
        min_documents: so that readers learn nothing of single documents, analyses give no numbers that fewer than so many stand behind.
        Raises Refusal if the run is unfinished, the folder is not a dataset, the manifest is damaged, or there are too few documents.
        """
        dataset = cls(*open_dataset(location), min_documents)
        if min_documents != 1:
            dataset._refuse_few_documents()
        return dataset

    def _refuse_few_documents(self) -> None:
        corpus = self.manifest["corpus"]
        measured = corpus["documents"] - sum((corpus.get("dropped") or {}).values())
        if not 1 <= self.min_documents <= measured:
            raise Refusal(
                f"--min-documents is at least 1 and at most the number of measured documents, {measured:,} in {self.storage.place()}; "
                f"got {self.min_documents:,}; use another number"
            )

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(self.manifest["tables"])

    def table(self, name: str) -> Table:
        """A table of the contract, with the columns of the user's own that this dataset has."""
        own = [facts for facts in self.manifest.get("own_statistics", ()) if facts["table"] == name]
        return with_own_columns(TABLES[name], map(column_of_facts, own))

    def parts(self, table: str) -> list[Part]:
        """The parts of a table. Raises Refusal for a path outside the dataset and for a table that the run did not write."""
        if table not in self.manifest["tables"]:
            raise Refusal(f"this dataset has the tables {', '.join(self.tables)}; {table!r} is not one; choose another")
        parts = list(parts_of(self.manifest, table))
        for part in parts:
            if not is_key(part.path):
                raise Refusal(f"a part lies inside its dataset; the manifest names {part.path!r}; restore the manifest")
        return parts

    def part_schema(self, table: str) -> pa.Schema:
        """The common schema of a table's parts. Raises Refusal if parts are missing or damaged, or their schemas differ."""
        if table not in self._schemas:
            self._schemas[table] = self._read_schema(table)
        return self._schemas[table]

    def stated_schema(self, table: str) -> pa.Schema | None:
        """The schema of a table as the manifest states it, without reading a part; None if it does not list the contract's columns."""
        names = self.manifest["tables"][table].get("columns", [])
        schema = self.table(table).schema(optional=frozenset(names))
        return schema if schema.names == names else None

    def _read_schema(self, table: str) -> pa.Schema:
        parts = self.parts(table)
        if not parts:
            return self.table(table).schema() if table in TABLES else pa.schema([])
        try:
            schema = common_schema(self.storage, parts)
        except DamagedPart as damage:
            raise self.refusal(str(damage)) from damage
        wrong = next(incompatible_columns(self.table(table), schema), None) if table in TABLES else None
        if wrong:
            raise self.refusal(f"{parts[0].path} is not a part of {table}: {wrong}")
        return schema

    def refusal(self, what: str) -> Refusal:
        """A Refusal for a damaged dataset; `what` names the damage."""
        return Refusal(
            f"a dataset is as its manifest says; {self.storage.place()} is not: {what}; run attlas verify, and restore or measure again"
        )

    def scan(self, table: str, *, finite: bool = True) -> pl.LazyFrame:
        """Rows of a table from all its parts, with the columns and types of the contract; categoricals become strings.

        A table of the contract that the run did not write (residual, for some models) is empty. Columns that an older
        dataset lacks are null. NaN and infinities, which no statistic takes, become null unless `finite` is False.
        """
        parts = self.parts(table) if table not in TABLES or table in self.manifest["tables"] else []
        return self._scan(table, parts, finite=finite) if parts else empty_table(TABLES[table])

    def scan_parts(self, table: str, *, finite: bool = True, at_once: int = 1) -> Iterator[pl.LazyFrame]:
        """The same part by part, small parts together until they have `at_once` rows; one without rows if there are no parts."""
        parts = self.parts(table) if table in self.manifest["tables"] else []
        if not parts:
            return iter([empty_table(TABLES[table])])
        return (self._scan(table, together, finite=finite) for together in _together(parts, at_once))

    def _scan(self, table: str, parts: list[Part], *, finite: bool = True) -> pl.LazyFrame:
        schema = self.part_schema(table)  # raises Refusal for missing and damaged parts
        rows = scan_parts(self.storage, parts)
        if table not in TABLES:
            return rows.with_columns(cs.categorical().cast(pl.String))
        contract = self.table(table)
        wanted = empty_table(contract, optional=contract.optional & set(schema.names)).collect_schema()
        return rows.select(_contract_column(name, dtype, schema, finite=finite) for name, dtype in wanted.items())


def _together(parts: Iterable[Part], rows: int) -> Iterator[list[Part]]:
    """Consecutive parts in groups of at least so many rows; the last group may have fewer."""
    group: list[Part] = []
    count = 0
    for part in parts:
        group.append(part)
        count += part.rows
        if count >= rows:
            yield group
            group, count = [], 0
    if group:
        yield group


def _contract_column(name: str, dtype: pl.DataType, schema: pa.Schema, *, finite: bool) -> pl.Expr:
    """A column with the contract's type; null if the parts lack it."""
    if name not in schema.names:
        return pl.lit(None, dtype=dtype).alias(name)
    column = pl.col(name).cast(dtype)
    if finite and value_kind(schema.field(name).type) == "number":
        return pl.when(column.is_finite()).then(column).alias(name)
    return column


def empty_table(table: Table, *, optional: frozenset[str] = frozenset()) -> pl.LazyFrame:
    """A table of the contract, without rows."""
    frame = pl.from_arrow(pa.Table.from_batches([], table.schema(optional=optional)))
    assert isinstance(frame, pl.DataFrame)
    return frame.lazy().with_columns(cs.categorical().cast(pl.String))
