"""Print the catalogue of tables and columns, for `attlas stats`."""

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer

from attlas.extract.errors import Refusal
from attlas.extract.python_files import is_python_file

if TYPE_CHECKING:
    from attlas.extract.tables import Table
    from attlas.extract.tables.column import Column

    Entry = tuple[Table, Column]

FORMATS = ("text", "json")
_LABEL_WIDTH = 9
_H = " (h = 1 + 1/2 + … + 1/n)"


def show_catalogue(name: str | None, tables: Sequence["Table"], *, form: str) -> None:
    """Print all columns, those of a table, or everything about a column. Raises Refusal for an unknown name or format."""
    if form not in FORMATS:
        raise Refusal(f"--format must be one of {', '.join(FORMATS)}; got {form!r}; choose one of them")
    entries = _entries(name, tables)
    if form == "json":
        from attlas.extract.tables.description import description_of

        typer.echo(json.dumps([description_of(*entry) for entry in entries], ensure_ascii=False, indent=2))
    elif name is None or name in {table.name for table in tables}:
        _list_columns({table.name: table for table, _ in entries}.values())
    else:
        for entry in entries:
            _describe(*entry)


def _entries(name: str | None, tables: Sequence["Table"]) -> list["Entry"]:
    """The columns that a name stands for: of a table, of this name in any table, TABLE.COLUMN, or of a user's file."""
    if name is not None and is_python_file(name):
        from attlas.extract.tables.own_files import load_own_file

        by_name = {table.name: table for table in tables}
        own = load_own_file(name, by_name).columns
        return [(by_name[table], column) for table, columns in own.items() for column in columns]
    every = [(table, column) for table in tables for column in (*table.keys, *table.statistics)]
    entries = [(t, c) for t, c in every if name in (None, t.name, f"{t.name}.{c.name}")]
    entries = entries or [(t, c) for t, c in every if c.name == name]
    if not entries:
        raise Refusal(f"the catalogue has no column {name!r}; {_suggestion(str(name), tables)}")
    return entries


def _list_columns(tables: Iterable["Table"]) -> None:
    """Print the columns of tables with their formulas, group by group."""
    from attlas.extract.tables.description import OTHER, grouped

    for table in tables:
        typer.echo(f"{table.name}: one row per {table.row}")
        width = max(len(column.name) for column in (*table.keys, *table.statistics))
        groups = {"": list(table.keys)} | grouped(table.facts)
        groups |= {"profiles on request": list(table.profiles)} if table.profiles else {}
        for group, columns in groups.items():
            if group and set(groups) != {"", OTHER}:
                typer.echo(f" {group}")
            for column in columns:
                unit = f"  ({column.unit})" if column.unit else ""
                request = "" if column.core else "  [only if named]" if column.by_name else "  [on request]"
                typer.echo(f"  {column.name:<{width}}  {column.formula}{unit}{request}")
        typer.echo()


def _describe(table: "Table", column: "Column") -> None:
    """Print everything about a column."""
    from attlas.extract.tables.description import example_of, known_text, measured_when

    nullable = "null where undefined or unknown" if column.nullable else "never null"
    facts = {
        "meaning": column.meaning,
        "formula": column.formula,
        "unit": column.unit,
        "bounds": column.bounds_text,
        "known": known_text(column) + (_H if any("h" in value for value in column.known.values()) else ""),
        "type": f"{column.dtype}, {nullable}",
        "measured": measured_when(table, column),
        "reference": column.reference,
        "origin": column.origin,
        "elsewhere": column.elsewhere,
        "example": f'attlas query DIR "{example_of(table, column)}"',
    }
    typer.echo(f"{table.name}.{column.name}" + (f": {column.group}" if column.group else ""))
    for label, text in facts.items():
        if text:
            typer.echo(f"  {label:<{_LABEL_WIDTH}}  {text}")


def _suggestion(name: str, tables: Iterable["Table"]) -> str:
    column = name.rpartition(".")[2]
    names = sorted(
        {c.name for table in tables for c in (*table.keys, *table.statistics)} | {table.name for table in tables}
    )
    near = difflib.get_close_matches(column, names, n=3, cutoff=0.5) or [n for n in names if column in n][:5]
    return f"did you mean {', '.join(near)}?" if near else "attlas stats lists all columns"
