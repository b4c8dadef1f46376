"""Load a file with statistics of the user's own, which is named by its path.

Naming the file is the consent to run it. Its functions are tried on small inputs before anything is written, so that a
wrong shape or an exception is known then; their values are checked against their bounds when the rows of a shard are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn, get_args

from attlas.extract.engines.quantities import ROW_QUANTITIES, Fact
from attlas.extract.errors import Refusal
from attlas.extract.python_files import import_file, importable
from attlas.extract.tables.column import Column
from attlas.extract.tables.own import OwnColumn, OwnRowQuantity
from attlas.extract.tables.own_functions import (
    head_values,
    refuse_failure,
    row_values,
    site_values,
    try_on_block,
    try_on_heads,
    try_on_sites,
)
from attlas.extract.tables.table import Table

OF_TABLES = ("heads", "residual")


@dataclass(frozen=True)
class OwnFile:
    """What a file defines, ready to be measured: its columns by table. `name` is that of the file, without folders."""

    name: str
    digest: str
    columns: Mapping[str, tuple[Column[Any, Any], ...]]


def load_own_columns(paths: Iterable[str], tables: Mapping[str, Table]) -> dict[str, tuple[Column[Any, Any], ...]]:
    """The columns of these files by table. Raises Refusal for what can't be measured, before anything is."""
    found: dict[str, tuple[Column[Any, Any], ...]] = {}
    for path in dict.fromkeys(paths):
        for table, columns in load_own_file(path, tables).columns.items():
            for each in columns:
                other = next((c for c in found.get(table, ()) if c.name == each.name), None)
                if other is not None:
                    _refuse_taken(Path(path), f"{table}.{each.name}", f"another in {other.origin_file}")
            found[table] = (*found.get(table, ()), *columns)
    return found


def load_own_file(path: str, tables: Mapping[str, Table]) -> OwnFile:
    """Run the file and try what it defines. The same content is run once per process. Raises Refusal."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise Refusal(f"statistics of your own are in a Python file; there is none at {path}; check the path")
    own = _load(file.resolve(), hashlib.sha256(file.read_bytes()).hexdigest())
    for table, columns in own.columns.items():
        for each in columns:
            if each.name in {c.name for c in tables[table].columns}:
                _refuse_taken(file, f"{table}.{each.name}", "one of attlas")
    return own


@cache
def _load(file: Path, digest: str) -> OwnFile:
    try:
        with importable(file.parent):
            module = import_file(file, prefix="attlas_statistics")
    except (Exception, SystemExit) as error:
        refuse_failure(file, "it", error)
    columns = [v for v in vars(module).values() if isinstance(v, OwnColumn)]
    rows = [v for v in vars(module).values() if isinstance(v, OwnRowQuantity)]
    if not columns:
        raise Refusal(
            f"a file of statistics defines at least one column; {file.name} defines none; decorate a function with "
            '@column(table="heads", …) from attlas.statistics'
        )
    for each in columns:
        if each.table not in OF_TABLES:
            raise Refusal(
                f"a column of your own is of {' or '.join(OF_TABLES)}; {each.column.name} of {file.name} is of "
                f"{each.table!r}; choose one of them"
            )
        _check_bounds_are_known(file, each.column)
    names = _register_row_quantities(file, digest, rows)
    by_table = {
        table: tuple(_prepared(file, digest, names, c.column, table) for c in columns if c.table == table)
        for table in OF_TABLES
    }
    return OwnFile(file.name, digest, {table: chosen for table, chosen in by_table.items() if chosen})


_SYMBOLIC_BOUNDS = ("n", "n−1", "−(n−1)", "1/n", "ln n", "d", "d−1", "√d")


def _check_bounds_are_known(file: Path, own: Column[Any, Any]) -> None:
    for bound in own.bounds:
        if not (bound is None or isinstance(bound, int | float) or bound in _SYMBOLIC_BOUNDS):
            raise Refusal(
                f"a bound is a number, None, or one of {', '.join(_SYMBOLIC_BOUNDS)}; {own.name} of {file.name} has "
                f"{bound!r}; write one of them"
            )


def _register_row_quantities(file: Path, digest: str, rows: Iterable[OwnRowQuantity]) -> dict[str, str]:
    """Make row quantities known to the reference engine; returns the names that they have there, by their own.

    The digest is part of the name, so that another file, or another state of this one, can't take its place.
    """
    from attlas.extract.engines.reference import OF_BLOCKS
    from attlas.extract.engines.sums import HEAD_QUANTITIES

    names = {}
    for own in rows:
        name = own.record.name
        if unknown := set(own.record.needs) - set(get_args(Fact)):
            raise Refusal(
                f"a row quantity needs some of {', '.join(get_args(Fact))}; {name} of {file.name} needs "
                f"{', '.join(sorted(unknown))}; correct it"
            )
        if name in ROW_QUANTITIES or name in HEAD_QUANTITIES:
            _refuse_taken(file, f"the row quantity {name}", "one of attlas")
        names[name] = f"{file.name}:{name}:{digest[:12]}"
        compute = partial(row_values, file, own)
        try_on_block(compute)
        ROW_QUANTITIES[names[name]] = replace(own.record, name=names[name])
        OF_BLOCKS[names[name]] = compute
    return names


def _prepared(file: Path, digest: str, names: Mapping[str, str], own: Column[Any, Any], table: str) -> Column[Any, Any]:
    """The column with its origin, and with a function that refuses wrong shapes and says where it failed."""
    assert own.compute is not None, "a column has a function"
    if table == "heads":
        compute: Callable[[Any], Any] = partial(head_values, file, own, names)
        try_on_heads(compute)
    else:
        compute = partial(site_values, file, own)
        try_on_sites(compute)
    return replace(own, origin=f"{file.name} sha256:{digest}", compute=compute)


def _refuse_taken(file: Path, name: str, by: str) -> NoReturn:
    raise Refusal(f"a name is there once; {name} of {file.name} has the name of {by}; choose another name")
