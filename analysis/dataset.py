"""A finished dataset as LazyFrames: exactly the parts that its manifest names, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import polars.selectors as cs
import pyarrow as pa

from attlas.analysis.parts import DamagedPart, common_schema, kind_of, misfits
from attlas.analysis.scanning import scan_parts
from attlas.extract.store import Location, Part, Refusal, Storage, is_key, open_dataset, parts_of
from attlas.extract.tables import TABLES


@dataclass(frozen=True)
class Dataset:
    """The storage of a finished run and its manifest."""

    storage: Storage
    manifest: Mapping[str, Any]
    _schemas: dict[str, pa.Schema] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, location: Location) -> Dataset:
        """Open a finished dataset; raises Refusal for an unfinished or foreign folder, and for a damaged manifest."""
        return cls(*open_dataset(location))

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(self.manifest["tables"])

    def parts(self, table: str) -> list[Part]:
        """The parts of a table; refuses a path that leaves the dataset, and a table that the run did not write."""
        if table not in self.manifest["tables"]:
            raise Refusal(f"this dataset has the tables {', '.join(self.tables)}; {table!r} is not one; choose another")
        parts = list(parts_of(self.manifest, table))
        for part in parts:
            if not is_key(part.path):
                raise Refusal(f"a part lies inside its dataset; the manifest names {part.path!r}; restore the manifest")
        return parts

    def part_schema(self, table: str) -> pa.Schema:
        """The schema that all parts of a table have; refuses parts that are missing, damaged or of different schemas."""
        if table not in self._schemas:
            self._schemas[table] = self._read_schema(table)
        return self._schemas[table]

    def _read_schema(self, table: str) -> pa.Schema:
        parts = self.parts(table)
        if not parts:
            return TABLES[table].schema() if table in TABLES else pa.schema([])
        try:
            schema = common_schema(self.storage, parts)
        except DamagedPart as damage:
            raise self.refusal(str(damage)) from damage
        wrong = next(misfits(TABLES[table], schema), None) if table in TABLES else None
        if wrong:
            raise self.refusal(f"{parts[0].path} is no part of {table}: {wrong}")
        return schema

    def refusal(self, what: str) -> Refusal:
        """The refusal of a dataset that is not whole."""
        return Refusal(
            f"a dataset is as its manifest says; {self.storage.place()} is not: {what}; run attlas verify, and restore or measure again"
        )

    def scan(self, table: str, *, finite: bool = True) -> pl.LazyFrame:
        """Rows of a table over all its parts, with the columns and types of the contract; names come as strings.

        A table of the contract that this run did not write (residual, for some models) has no rows; a statistic that an
        older dataset does not know is null; so are NaN and infinities, which no statistic is, unless `finite` is off.
        """
        if table in TABLES and table not in self.manifest["tables"]:
            return empty(table)
        schema, parts = self.part_schema(table), self.parts(table)
        if not parts:
            return empty(table)
        rows = scan_parts(self.storage, parts)
        if table not in TABLES:
            return rows.with_columns(cs.categorical().cast(pl.String))
        wanted = empty(table, optional=TABLES[table].optional & set(schema.names)).collect_schema()
        return rows.select(_conformed(name, dtype, schema, finite=finite) for name, dtype in wanted.items())


def _conformed(name: str, dtype: pl.DataType, schema: pa.Schema, *, finite: bool) -> pl.Expr:
    """A column of a part as the contract has it; null where the part has none."""
    if name not in schema.names:
        return pl.lit(None, dtype=dtype).alias(name)
    column = pl.col(name).cast(dtype)
    if finite and kind_of(schema.field(name).type) == "number":
        return pl.when(column.is_finite()).then(column).alias(name)
    return column


def empty(table: str, *, optional: frozenset[str] = frozenset()) -> pl.LazyFrame:
    """A table of the contract without rows."""
    frame = pl.from_arrow(pa.Table.from_batches([], TABLES[table].schema(optional=optional)))
    assert isinstance(frame, pl.DataFrame)
    return frame.lazy().with_columns(cs.categorical().cast(pl.String))
