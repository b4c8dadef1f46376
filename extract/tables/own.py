"""Statistics of the user's own: columns and row quantities in a Python file, which is named by its path.

Naming the file is the consent to run it. Its functions are tried on small inputs before anything is written, so that a
wrong shape or an exception is known then; their values are checked against their bounds when the rows of a shard are made.
A dataset has everything that readers need to know of such columns in its manifest: they do not need the file.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from attlas.extract.engines.quantities import ROW_QUANTITIES, Fact, RowQuantity
from attlas.extract.errors import Refusal, first_line
from attlas.extract.python_files import failing_line, import_file, importable
from attlas.extract.tables.column import Column
from attlas.extract.tables.heads import HeadQuantities
from attlas.extract.tables.table import Table

if TYPE_CHECKING:
    from attlas.extract.engines.block import Block

Bounds = tuple[float | str | None, float | str | None]
OF_TABLES = ("heads", "residual")


@dataclass(frozen=True)
class OwnColumn:
    """A column as a user's file defines it, and its table."""

    table: str
    column: Column[Any, Any]


@dataclass(frozen=True)
class OwnRowQuantity:
    """A row quantity as a user's file defines it."""

    record: RowQuantity
    compute: Callable[[Block], Any]


@dataclass(frozen=True)
class OwnFile:
    """What a file defines, ready to be measured: its columns by table. `name` is that of the file, without folders."""

    name: str
    digest: str
    columns: Mapping[str, tuple[Column[Any, Any], ...]]


def column(
    *,
    table: Literal["heads", "residual"],
    formula: str,
    unit: str = "",
    bounds: Bounds = (None, None),
    meaning: str = "",
    reference: str = "",
) -> Callable[[Callable[[Any], Any]], OwnColumn]:
    """Make the decorated function a column of its name; its docstring says what the column means.

    heads: a function of `HeadQuantities` o that gives an array [sequence, head]: `o["entropy"]` is the sum of a row quantity over
    the rows of a head, `o.mean("entropy")` its mean. residual: a function of a `ResidualObservation` that gives a tensor [batch], or None. Undefined values are NaN.
    """

    def record(compute: Callable[[Any], Any]) -> OwnColumn:
        text = meaning or " ".join((compute.__doc__ or "").split())
        made: Column[Any, Any] = Column(
            name=compute.__name__,
            formula=formula,
            unit=unit,
            bounds=bounds,
            meaning=text,
            reference=reference,
            nullable=True,
            core=False,
            compute=compute,
        )
        return OwnColumn(table, made)

    return record


def row_quantity(
    *, formula: str, needs: Collection[Fact] = (), sampled: bool = False
) -> Callable[[Callable[[Block], Any]], OwnRowQuantity]:
    """Make the decorated function of a block of the pattern a row quantity of its name.

    It gives a tensor [batch, head, row]; columns of the same file have its sum over the rows of a head as `o["name"]`. `needs`: what an attention
    call must have, such as "positions". `sampled`: for the sequences of the sample only.
    """

    def record(compute: Callable[[Block], Any]) -> OwnRowQuantity:
        made = RowQuantity(name=compute.__name__, formula=formula, needs=tuple(needs), sampled=sampled)
        return OwnRowQuantity(made, compute)

    return record


def is_own_file(statistic: str) -> bool:
    """Whether the name of a statistic is the path of a Python file."""
    return statistic.endswith(".py")


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


def with_own_columns(table: Table, columns: Iterable[Column[Any, Any]]) -> Table:
    """The table with the users' columns among these."""
    own = tuple(column for column in columns if column.origin)
    return replace(table, facts=(*table.facts, *own)) if own else table


def own_facts(columns: Mapping[str, Iterable[Column[Any, Any]]]) -> list[dict[str, Any]]:
    """What a manifest says of the users' columns."""
    return [
        {
            "table": table,
            "name": c.name,
            "origin": c.origin,
            "formula": c.formula,
            "unit": c.unit,
            "meaning": c.meaning,
            "bounds": list(c.bounds),
            "reference": c.reference,
        }
        for table, chosen in columns.items()
        for c in chosen
        if c.origin
    ]


def column_of_facts(facts: Mapping[str, Any]) -> Column[Any, Any]:
    """A user's column as a manifest describes it; without its function."""
    texts = {name: facts[name] for name in ("name", "origin", "formula", "unit", "meaning", "reference")}
    low, high = facts["bounds"]
    return Column(**texts, bounds=(low, high), nullable=True, core=False)


# --- loading


@cache
def _load(file: Path, digest: str) -> OwnFile:
    try:
        with importable(file.parent):
            module = import_file(file, prefix="attlas_statistics")
    except (Exception, SystemExit) as error:
        _refuse_failure(file, "it", error)
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
        if name in ROW_QUANTITIES or name in HEAD_QUANTITIES:
            _refuse_taken(file, f"the row quantity {name}", "one of attlas")
        names[name] = f"{file.name}:{name}:{digest[:12]}"
        compute = partial(_row_values, file, own)
        _try_on_block(compute)
        ROW_QUANTITIES[names[name]] = replace(own.record, name=names[name])
        OF_BLOCKS[names[name]] = compute
    return names


def _prepared(file: Path, digest: str, names: Mapping[str, str], own: Column[Any, Any], table: str) -> Column[Any, Any]:
    """The column with its origin, and with a function that refuses wrong shapes and says where it failed."""
    assert own.compute is not None, "a column has a function"
    if table == "heads":
        compute: Callable[[Any], Any] = partial(_head_values, file, own, names)
        _try_on_heads(compute)
    else:
        compute = partial(_site_values, file, own)
        _try_on_sites(compute)
    return replace(own, origin=f"{file.name} sha256:{digest}", compute=compute)


# --- what a user's functions give


class _Given(HeadQuantities):
    """The quantities by the names that the user's file has for them; notes their shape."""

    def __init__(self, file: Path, own: Column[Any, Any], quantities: HeadQuantities, names: Mapping[str, str]) -> None:
        self._file, self._own, self._quantities, self._names = file, own, quantities, names
        self.shape: tuple[int, ...] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names and not _is_quantity(name):
            near = difflib.get_close_matches(name, [*_quantity_names(), *self._names], n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"some are {', '.join(_quantity_names()[:5])}"
            raise Refusal(
                f"{self._own.name} of {self._file.name} asks for the head quantity {name!r}; there is none; {hint}"
            )
        values = self._quantities[self._names.get(name, name)]
        self.shape = values.shape
        return values


def _quantity_names() -> list[str]:
    from attlas.extract.engines.sums import HEAD_QUANTITIES

    merged = (name for name, row in ROW_QUANTITIES.items() if row.merge is not None and ":" not in name)
    return sorted({*HEAD_QUANTITIES, *merged})


def _is_quantity(name: str) -> bool:
    from attlas.extract.engines.sums import HEAD_QUANTITIES

    return name in HEAD_QUANTITIES or (name in ROW_QUANTITIES and ROW_QUANTITIES[name].merge is not None)


def _head_values(file: Path, own: Column[Any, Any], names: Mapping[str, str], o: HeadQuantities) -> np.ndarray:
    given = _Given(file, own, o, names)
    with np.errstate(all="ignore"):  # undefined is NaN, which becomes null
        values = np.asarray(_call(file, own.name, own.compute, given))
    if given.shape is None:
        raise Refusal(
            f"a column of heads is made of head quantities; {own.name} of {file.name} asks for none; use o[…]"
        )
    _check_shape(file, own.name, values.shape, given.shape, "[sequence, head]")
    return values.astype(np.float64)


def _site_values(file: Path, own: Column[Any, Any], o: Any) -> Any:
    values = _call(file, own.name, own.compute, o)
    if values is not None:
        _check_shape(file, own.name, tuple(getattr(values, "shape", ())), (len(o.real),), "[batch]")
    return values


def _row_values(file: Path, own: OwnRowQuantity, block: Block) -> Any:
    values = _call(file, own.record.name, own.compute, block)
    _check_shape(
        file, own.record.name, tuple(getattr(values, "shape", ())), tuple(block.measured.shape), "[batch, head, row]"
    )
    return values


def _call(file: Path, name: str, function: Callable[[Any], Any] | None, argument: Any) -> Any:
    assert function is not None, "a user's column has a function"
    try:
        return function(argument)
    except Refusal:
        raise
    except Exception as error:
        from attlas.extract.memory import is_out_of_memory

        if is_out_of_memory(error):
            raise
        _refuse_failure(file, name, error)


def _check_shape(file: Path, name: str, got: tuple[int, ...], expected: tuple[int, ...], axes: str) -> None:
    if tuple(got) != tuple(expected):
        raise Refusal(
            f"{name} of {file.name} must give {axes}, here {list(expected)}; it gave {list(got)}; keep these dimensions"
        )


def _refuse_failure(file: Path, name: str, error: BaseException) -> NoReturn:
    raise Refusal(
        f"statistics of your own must run; {name} of {file.name}{failing_line(file, error)}: {type(error).__name__}: "
        f"{first_line(error)}; fix that line"
    ) from error


def _refuse_taken(file: Path, name: str, by: str) -> NoReturn:
    raise Refusal(f"a name is there once; {name} of {file.name} has the name of {by}; choose another name")


# --- trials, on small inputs: two sequences, three heads


def _try_on_heads(compute: Callable[[Any], Any]) -> None:
    class Anything(HeadQuantities):
        def __init__(self) -> None: ...

        def __getitem__(self, name: str) -> np.ndarray:
            return np.full((2, 3), 0.5)

    compute(Anything())


def _try_on_sites(compute: Callable[[Any], Any]) -> None:
    import torch

    from attlas.extract.engines.observations import NormObservation, ResidualObservation

    state = torch.linspace(-1, 1, 2 * 4 * 6).view(2, 4, 6)
    real = torch.ones(2, 4, dtype=torch.bool)
    compute(ResidualObservation(real, state))  # where nothing is added
    norm = NormObservation(state, state, "layer", 1e-5)
    contexts = torch.ones(2, 3, 4, 2)
    compute(ResidualObservation(real, state, stream=state / 2, update=state / 2, norm=norm, contexts=contexts))


def _try_on_block(compute: Callable[[Block], Any]) -> None:
    import torch

    from attlas.extract.engines.reference import blocks_of
    from attlas.extract.engines.rows import AttentionCall
    from attlas.extract.engines.visibility import visibility_from_mask, whole_axis

    vectors = torch.linspace(-1, 1, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    visibility = visibility_from_mask(None, causal=True, queries=whole_axis(2, 4, vectors.device))
    ids = torch.zeros(2, 4, dtype=torch.long)
    call = AttentionCall(vectors, vectors, vectors, visibility, 1.0, write=torch.eye(5).expand(3, 5, 5), token_ids=ids)
    for block in blocks_of(call, 3):
        compute(block)
