"""Which columns are measured: the core of every table, and what is asked for besides."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

from attlas.extract.errors import Refusal
from attlas.extract.tables.column import Column
from attlas.extract.tables.table import Table

CORE, ALL = "core", "all"
Columns = Mapping[str, tuple[Column, ...]]  # of each table, by its name


def statistics_named(statistics: str | Collection[str]) -> tuple[str, ...]:
    """The names in a comma-separated text, or in a collection."""
    names = statistics.split(",") if isinstance(statistics, str) else statistics
    return tuple(name.strip() for name in names if name.strip())


def select_columns(
    tables: Iterable[Table], statistics: str | Collection[str] = CORE, *, corpus: str | None = None
) -> Columns:
    """The columns to measure of each recorded table. Raises Refusal for an unknown name.

    The core is always measured. `all` adds all columns of the tables that every run writes; the name of a table adds all of
    its columns, also if it is on request; a column is added by its name, or as TABLE.COLUMN. A costly column is added by its own
    name alone. A column of another corpus than this one is refused by its name, and left out otherwise.
    """
    recorded = [table for table in tables if table.recorder is not None]
    chosen = {table.name: set(_core(table)) for table in recorded if not table.on_request}
    for name in statistics_named(statistics):
        for table, columns in _find(recorded, name, corpus).items():
            chosen.setdefault(table, set()).update(columns)
    return {t.name: tuple(c for c in t.statistics if c.name in chosen[t.name]) for t in recorded if t.name in chosen}


def columns_beyond_core(tables: Iterable[Table], columns: Columns) -> list[str]:
    """What is measured besides the core: tables on request by name, columns as TABLE.COLUMN."""
    names = []
    for table in tables:
        extra = [c.name for c in columns.get(table.name, ()) if c.name not in _core(table)]
        names += [f"{table.name}.{name}" for name in extra]
        if table.on_request and table.name in columns:
            names.append(table.name)
    return sorted(names)


def _core(table: Table) -> list[str]:
    return [column.name for column in table.statistics if column.core]


def _find(recorded: list[Table], name: str, corpus: str | None) -> dict[str, list[str]]:
    """The columns that a name stands for, by their table."""
    if name == CORE:
        return {}
    if name == ALL:
        return {table.name: _measurable(table, corpus) for table in recorded if not table.on_request}
    of_table, _, column = name.rpartition(".")
    found = {
        table.name: _measurable(table, corpus) if table.name == name else _named(table, column, corpus)
        for table in recorded
        if not of_table or table.name == of_table
    }
    found = {table: columns for table, columns in found.items() if columns}
    if not found:
        raise Refusal(
            f"a statistic is {CORE}, {ALL}, a table, a column or a .py file; {name!r} is none; {_nearest(recorded, name)}"
        )
    return found


def _measurable(table: Table, corpus: str | None) -> list[str]:
    """The columns that can be measured on this corpus, but for those that are measured by their own name alone."""
    return [c.name for c in table.statistics if c.corpus in ("", corpus) and not c.by_name]


def _named(table: Table, name: str, corpus: str | None) -> list[str]:
    """The column of this name, if there is one. Raises Refusal if it can't be measured on this corpus."""
    for column in table.statistics:
        if column.name == name and column.corpus not in ("", corpus):
            this = "there is none here" if corpus is None else f"this one is {corpus}"
            raise Refusal(
                f"{name} is measured on the corpus {column.corpus} alone; {this}; leave it out, or run with --corpus {column.corpus}"
            )
    return [column.name for column in table.statistics if column.name == name]


def _nearest(recorded: list[Table], name: str) -> str:
    names = [*(t.name for t in recorded), *sorted({c.name for t in recorded for c in t.statistics})]
    nearest = difflib.get_close_matches(name.rpartition(".")[2], names, n=3, cutoff=0.5)
    return f"did you mean {', '.join(nearest)}?" if nearest else "attlas stats lists them"
