"""What becomes of a dataset whose parts are not what they should be: a refusal in words, and a note on what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import polars as pl
import polars.selectors as cs

from attlas.analysis.dataset import Dataset
from attlas.analysis.report.numbers import plural
from attlas.analysis.verify import findings_in
from attlas.extract.store import Refusal
from attlas.extract.tables import TABLES, Table


@contextmanager
def damage_refused(dataset: Dataset) -> Iterator[None]:
    """Turn a failure within into a Refusal if `verify` finds the dataset damaged; a failure on a whole one is our own."""
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
    """What the rows hold that no statistic is: a note where NaN or infinities are left out.

    Raises Refusal for rows that do not say whose they are: a key that is null, or a number below 0 (only bins count both
    ways).
    """
    notes = []
    for name in tables:
        rows = dataset.scan(name, finite=False)
        floats = rows.select(cs.float()).collect_schema().names()
        counts = rows.select(
            _misplaced(TABLES[name]).sum().alias(""), *(pl.col(c).is_finite().not_().sum() for c in floats)
        ).collect(engine="streaming")
        if misplaced := counts[""][0]:
            keys = " × ".join(c.name for c in TABLES[name].keys)
            raise dataset.refusal(f"{plural(misplaced, 'row')} of {name} without a whole key ({keys})")
        found = [(column, counts[column][0]) for column in floats if counts[column][0]]
        if found:
            told = ", ".join(f"{plural(number, 'value')} of {column}" for column, number in found)
            notes.append(f"NaN and infinities in {name} are left out of every number here: {told}.")
    return notes


def _misplaced(table: Table) -> pl.Expr:
    numbers = [c.name for c in table.keys if c.dtype.startswith("int") and not c.signed]
    return pl.any_horizontal(
        *(pl.col(c.name).is_null() for c in table.keys), *(pl.col(n).fill_null(0) < 0 for n in numbers)
    )
