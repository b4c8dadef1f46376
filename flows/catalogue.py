"""Print the catalogue of tables and columns, for `attlas stats`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from attlas.extract.errors import Refusal

if TYPE_CHECKING:
    from attlas.extract.tables import Table
    from attlas.extract.tables.column import Column


def list_columns(tables: Iterable["Table"]) -> None:
    """Print all columns of the tables with their formulas."""
    for table in tables:
        typer.echo(f"{table.name}: one row per {table.row}")
        width = max(len(column.name) for column in table.columns)
        for column in table.columns:
            unit = f"  ({column.unit})" if column.unit else ""
            request = "" if column.core else "  [on request]"
            typer.echo(f"  {column.name:<{width}}  {column.formula}{unit}{request}")
        typer.echo()


def describe_column(name: str, tables: Iterable["Table"]) -> None:
    """Print everything about the columns of this name. Raises Refusal if there is none."""
    matches = [(table, column) for table in tables for column in table.columns if column.name == name]
    if not matches:
        raise Refusal(f"the catalogue has no column {name!r}; {_suggestion(name, tables)}")
    for table, column in matches:
        typer.echo(f"{table.name}.{column.name}")
        for label, text in _facts_of(table, column):
            typer.echo(f"  {label:<9}  {text}")


def _facts_of(table: "Table", column: "Column") -> list[tuple[str, str]]:
    nullable = "where undefined or unknown" if column.nullable else "never"
    option = f": --statistics {column.name}" if table.recorder is not None else ""
    measured = "by every run" if column.core else f"on request{option}"
    facts = {"type": column.dtype, "null": nullable, "measured": measured, **column.metadata}
    return list(facts.items())


def _suggestion(name: str, tables: Iterable["Table"]) -> str:
    import difflib

    names = sorted({column.name for table in tables for column in table.columns})
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or [n for n in names if name in n][:5]
    return f"did you mean {', '.join(near)}?" if near else "attlas stats lists all columns"
