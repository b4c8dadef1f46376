"""The tables of a dataset: one module for each, which says all that is particular to it.

A new table is a module with a `TABLE`, and a line here. The pipeline, `measure`, the data dictionary, the dataset card,
`verify`, `query` and the benchmarks loop over `TABLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import reduce
from typing import TYPE_CHECKING

from attlas.extract.engines.needs import Needs
from attlas.extract.engines.profiles import doubling_bin_edges as doubling_bin_edges
from attlas.extract.python_files import is_python_file
from attlas.extract.tables import (
    ablations,
    compositions,
    documents,
    edges,
    heads,
    layers,
    norms,
    pairs,
    profiles,
    queries,
    residual,
    residual_profiles,
    rollout,
    sequences,
    summaries,
    tokens,
    totals,
    weights,
)
from attlas.extract.tables.column import Column as Column
from attlas.extract.tables.heads import CLASS_MASSES as CLASS_MASSES
from attlas.extract.tables.own import own_facts as own_facts
from attlas.extract.tables.own import with_own_columns as with_own_columns
from attlas.extract.tables.own_files import load_own_columns
from attlas.extract.tables.selection import ALL as ALL
from attlas.extract.tables.selection import CORE as CORE
from attlas.extract.tables.selection import Columns as Columns
from attlas.extract.tables.selection import columns_beyond_core as columns_beyond_core
from attlas.extract.tables.selection import select_columns as select_columns
from attlas.extract.tables.selection import statistics_named as statistics_named
from attlas.extract.tables.table import Agreement as Agreement
from attlas.extract.tables.table import Recorder as Recorder
from attlas.extract.tables.table import Rule as Rule
from attlas.extract.tables.table import Scope as Scope
from attlas.extract.tables.table import Table as Table

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 2

TABLES: dict[str, Table] = {
    module.TABLE.name: module.TABLE
    for module in (
        documents,
        sequences,
        heads,
        residual,
        layers,
        profiles,
        residual_profiles,
        summaries,
        totals,
        pairs,
        weights,
        norms,
        compositions,
        queries,
        edges,
        tokens,
        rollout,
        ablations,
    )
}


def measured_columns(statistics: str | Collection[str] = CORE, *, corpus: str | None = None) -> Columns:
    """The columns to measure of each recorded table on a corpus, for the option `--statistics`.

    A name that ends in .py is a file with columns of the user's own. Raises Refusal for an unknown name, for a column that
    this corpus does not permit, and for a file that can't be used.
    """
    names = statistics_named(statistics)
    columns = select_columns(TABLES.values(), [n for n in names if not is_python_file(n)], corpus=corpus)
    own = load_own_columns(filter(is_python_file, names), TABLES)
    return {name: (*chosen, *own.get(name, ())) for name, chosen in columns.items()}


def derived_tables(tables: Mapping[str, pa.Table], columns: Columns, *, shard: int) -> dict[str, pa.Table]:
    """The tables that are made of a shard's other tables, given the columns that were measured of these."""
    return {t.name: t.derive(tables, columns, shard=shard) for t in TABLES.values() if t.derive is not None}


def concluded_tables(parts_of: Callable[[str], Iterator[pa.Table]]) -> dict[str, pa.Table]:
    """The tables that are made once all shards are done, given the parts of each table in the order of shards."""
    return {t.name: t.conclude(parts_of) for t in TABLES.values() if t.conclude is not None}


def needs_of(columns: Columns) -> Needs:
    """Everything that the columns of these tables need from a pass."""
    return reduce(Needs.__or__, (TABLES[name].needs(chosen) for name, chosen in columns.items()), Needs())
