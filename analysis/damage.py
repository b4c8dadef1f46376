"""Handling of damaged datasets: errors become refusals that name the damage, and values left out are noted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import polars as pl
import polars.selectors as cs

from attlas.analysis.dataset import Dataset
from attlas.analysis.report.numbers import plural
from attlas.analysis.verify import findings_in
from attlas.extract.store import Refusal
from attlas.extract.tables import TABLES, Table


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


def notes_on_rows(
    dataset: Dataset, tables: Sequence[str], *, only: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Notes on NaN and infinite values, which every analysis leaves out. only: by table, the columns that are read, if not all.

    Raises Refusal for rows with an invalid key: null or negative in a column that cannot be.
    """
    notes = []
    for name in tables:
        rows = dataset.scan(name, finite=False)
        floats = rows.select(cs.float()).collect_schema().names()
        if only is not None and name in only:
            floats = [column for column in floats if column in only[name]]
        counts = rows.select(
            _has_invalid_key(TABLES[name]).sum().alias(""), *(pl.col(c).is_finite().not_().sum() for c in floats)
        ).collect(engine="streaming")
        if invalid := counts[""][0]:
            keys = " × ".join(c.name for c in TABLES[name].keys)
            raise dataset.refusal(f"{plural(invalid, 'row')} of {name} without a valid key ({keys})")
        affected = [f"{plural(counts[column][0], 'value')} of {column}" for column in floats if counts[column][0]]
        if affected:
            notes.append(f"NaN and infinities in {name} are left out of every number here: {', '.join(affected)}.")
    return notes


def _has_invalid_key(table: Table) -> pl.Expr:
    numbers = [c.name for c in table.keys if c.dtype.startswith("int") and not c.signed]
    return pl.any_horizontal(
        *(pl.col(c.name).is_null() for c in table.keys if not c.nullable),
        *(pl.col(n).fill_null(0) < 0 for n in numbers),
    )
