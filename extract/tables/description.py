"""Everything there is to say about a column, for `attlas stats` and the data dictionary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attlas.extract.tables.column import Column
from attlas.extract.tables.table import Table

# the patterns of known values, by the letter that a column's record has for them; h = 1 + 1/2 + … + 1/n
PATTERNS = {
    "U": "uniform",
    "C": "causal uniform",
    "I": "each token itself",
    "P": "the previous token",
    "F": "the first token",
}
OTHER = "other columns"


def description_of(table: Table, column: Column[Any, Any]) -> dict[str, Any]:
    """A column's facts, those that it lacks left out; as JSON has them."""
    facts = {
        "table": table.name,
        "name": column.name,
        "group": column.group,
        "meaning": column.meaning,
        "formula": column.formula,
        "unit": column.unit,
        "bounds": list(column.bounds) if column.bounds_text else None,
        "known": {PATTERNS.get(where, where): value for where, value in column.known.items()},
        "type": column.dtype,
        "nullable": column.nullable,
        "measured": measured_when(table, column),
        "reference": column.reference,
        "origin": column.origin,
        "elsewhere": column.elsewhere,
        "example": example_of(table, column),
    }
    return {name: value for name, value in facts.items() if value not in ("", None, {})}


def known_text(column: Column[Any, Any]) -> str:
    """The known values in a line."""
    return "; ".join(f"{PATTERNS.get(where, where)}: {value}" for where, value in column.known.items())


def measured_when(table: Table, column: Column[Any, Any]) -> str:
    """What has to be asked for, and for which sequences there are values."""
    if table.recorder is None:
        return "by every run" if column.core else "if the tokens themselves are asked for: --tokens ids or text"
    if column.origin:
        return f"on request: --statistics {column.origin_file}"
    option = f"--statistics {table.name if table.on_request else column.name}"
    if column.corpus:
        return f"on request, on the corpus {column.corpus} alone: {option}"
    if column.by_name:
        return f"only if named, for the first sequences of each shard (--sample): {option}"
    if column.sample:
        return f"on request, for the first sequences of each shard (--sample): {option}"
    return "by every run" if column.core and not table.on_request else f"on request: {option}"


def example_of(table: Table, column: Column[Any, Any]) -> str:
    """A query about the column."""
    if column.example:
        return column.example
    template = Table.example if column in table.keys else table.example
    return template.format(table=table.name, column=column.name)


def grouped(columns: Iterable[Column[Any, Any]]) -> dict[str, list[Column[Any, Any]]]:
    """Columns by their group, in the order in which groups first occur, those without one last."""
    groups: dict[str, list[Column[Any, Any]]] = {}
    for column in columns:
        groups.setdefault(column.group or OTHER, []).append(column)
    without = groups.pop(OTHER, None)
    return groups if without is None else groups | {OTHER: without}
