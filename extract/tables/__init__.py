"""The tables of a dataset: one module for each, which says all that is particular to it.

A new table is a module with a `TABLE`, and a line here. The pipeline, `measure`, the data dictionary, the dataset card,
`verify`, `query` and the benchmarks loop over `TABLES`.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import reduce

from attlas.extract.engines.needs import Needs
from attlas.extract.engines.profiles import doubling_bin_edges as doubling_bin_edges
from attlas.extract.errors import Refusal
from attlas.extract.tables import documents, heads, profiles, residual, sequences
from attlas.extract.tables.column import Column as Column
from attlas.extract.tables.heads import CLASS_MASSES as CLASS_MASSES
from attlas.extract.tables.table import Agreement as Agreement
from attlas.extract.tables.table import Recorder as Recorder
from attlas.extract.tables.table import Rule as Rule
from attlas.extract.tables.table import Scope as Scope
from attlas.extract.tables.table import Table as Table

SCHEMA_VERSION = 2

TABLES: dict[str, Table] = {
    module.TABLE.name: module.TABLE for module in (documents, sequences, heads, residual, profiles)
}


def recorded_tables(asked: Collection[str] = ()) -> tuple[Table, ...]:
    """The tables that a pass records: all that are not on request, and those that are asked for by name."""
    on_request = [name for name, table in TABLES.items() if table.on_request]
    for name in asked:
        if name not in on_request:
            raise Refusal(f"a table on request is one of {', '.join(on_request) or 'none'}; got {name!r}; leave it out")
    return tuple(t for t in TABLES.values() if t.recorder is not None and (not t.on_request or t.name in asked))


def needs_of(columns: Mapping[str, Sequence[Column]]) -> Needs:
    """What the columns of these tables need of a pass, all together."""
    return reduce(Needs.__or__, (TABLES[name].needs(chosen) for name, chosen in columns.items()), Needs())
