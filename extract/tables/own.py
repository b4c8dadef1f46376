"""Columns and row quantities of the user's own: how a file defines them, and what a dataset says of them.

A dataset has everything that readers need to know of such columns in its manifest: they do not need the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from attlas.extract.engines.quantities import Fact, RowQuantity
from attlas.extract.tables.column import Column
from attlas.extract.tables.table import Table

if TYPE_CHECKING:
    from attlas.extract.engines.block import Block

Bounds = tuple[float | str | None, float | str | None]


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
