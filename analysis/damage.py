"""Handling of damaged datasets: errors become refusals that name the damage, and values left out are noted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import polars as pl
import polars.selectors as cs

from attlas.analysis.dataset import Dataset
from attlas.analysis.report.numbers import plural
from attlas.analysis.summaries import Aside
from attlas.analysis.verify import findings_in
from attlas.extract.store import Refusal
from attlas.extract.tables import TABLES, Table

_INVALID = "|invalid key"


@contextmanager
def refuse_if_damaged(dataset: Dataset) -> Iterator[None]:
    """Turn an exception in the block into a Refusal if the dataset is damaged; on an intact one it is a bug and propagates."""
    try:
        yield
    except Refusal:
        raise
    except (Exception, pl.exceptions.PanicException) as error:
        findings = findings_in(dataset)
        if not findings:
            raise
        more = f" (and {plural(len(findings) - 1, 'more finding')})" if len(findings) > 1 else ""
        raise dataset.refusal(f"{findings[0]}{more}") from error


def notes_on_rows(dataset: Dataset, tables: Sequence[str]) -> list[str]:
    """Notes on NaN and infinite values, which every analysis leaves out.

    Raises Refusal for rows with an invalid key: null or negative in a column that cannot be.
    """
    notes = []
    for name in tables:
        rows = dataset.scan(name, finite=False)
        floats = rows.select(cs.float()).collect_schema().names()
        notes += note_on_counts(dataset, name, rows.select(_counts(name, floats)).collect(engine="streaming"))
    return notes


def damage_in_parts(dataset: Dataset, table: str, columns: Sequence[str]) -> Aside:
    """The counts that `note_on_counts` takes, from a pass over rows; raises Refusal at a part with rows with an invalid key."""

    def count(rows: pl.DataFrame) -> pl.DataFrame:
        counts = rows.select(_counts(table, columns))
        note_on_counts(dataset, table, counts)
        return counts

    return Aside(columns, count)


def note_on_counts(dataset: Dataset, table: str, counts: pl.DataFrame) -> list[str]:
    """A note on values that are left out, if there are any, from counts of all parts. Raises Refusal for rows with an invalid key."""
    total = counts.sum().row(0, named=True)
    if invalid := total.pop(_INVALID):
        keys = " × ".join(c.name for c in TABLES[table].keys)
        raise dataset.refusal(f"{plural(invalid, 'row')} of {table} without a valid key ({keys})")
    affected = [f"{plural(number, 'value')} of {column}" for column, number in total.items() if number]
    return (
        [f"NaN and infinities in {table} are left out of every number here: {', '.join(affected)}."] if affected else []
    )


def _counts(table: str, columns: Sequence[str]) -> list[pl.Expr]:
    """How many rows have an invalid key, and of each column how many values are NaN or infinite."""
    invalid = _has_invalid_key(TABLES[table]).sum().alias(_INVALID)
    return [invalid, *(pl.col(c).is_finite().not_().sum() for c in columns)]


def _has_invalid_key(table: Table) -> pl.Expr:
    numbers = [c.name for c in table.keys if c.dtype.startswith("int") and not c.signed]
    return pl.any_horizontal(
        *(pl.col(c.name).is_null() for c in table.keys if not c.nullable),
        *(pl.col(n).fill_null(0) < 0 for n in numbers),
    )
