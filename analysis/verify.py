"""Verification of a dataset against its manifest, its schema and the rules of its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import polars as pl
import pyarrow as pa

from attlas.analysis.dataset import Dataset
from attlas.analysis.integrity import Finding as Finding
from attlas.analysis.integrity import check_file, check_row_counts, find_stray_files
from attlas.analysis.parts import first_line
from attlas.analysis.row_checks import check_part, scan_rows
from attlas.analysis.table_checks import check_table, is_intact
from attlas.extract.store import MANIFEST, Location, Part
from attlas.extract.tables import TABLES

# a panic in Polars' Rust code is not a subclass of Exception
READING_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, OSError, MemoryError)


def verify(location: Location) -> list[Finding]:
    """All problems of a dataset; an empty list if there are none. Raises Refusal if there is no dataset."""
    return findings_in(Dataset.open(location))


def findings_in(dataset: Dataset) -> list[Finding]:
    """All problems of an open dataset."""
    findings = list(find_stray_files(dataset))
    always = [table.name for table in TABLES.values() if table.is_always_written]
    missing = [table for table in always if table not in dataset.tables]
    if missing:
        findings.append(
            Finding(MANIFEST, "tables", f"every dataset has {', '.join(always)}; {', '.join(missing)} missing")
        )
    intact: dict[str, list[Part]] = {table: [] for table in always}
    for table in dataset.tables:
        findings += check_row_counts(dataset, table)
        for part in dataset.parts(table):  # raises Refusal for parts outside the dataset
            problems = list(check_file(dataset, table, part))
            findings += problems
            if not problems:
                intact.setdefault(table, []).append(part)
    return findings + list(_check_rows(dataset, intact))


def _check_rows(dataset: Dataset, intact: Mapping[str, list[Part]]) -> Iterator[Finding]:
    """Check the rows of the parts whose files are intact."""
    sequences_are_intact = all(is_intact(dataset, intact, table) for table in ("documents", "sequences"))
    sequences = scan_rows(dataset, intact["sequences"]) if sequences_are_intact else None
    for name, parts in intact.items():
        if name not in TABLES:
            continue
        for part in parts:
            yield from _catch_read_errors(part.path, check_part(dataset, dataset.table(name), part, sequences))
        if is_intact(dataset, intact, name):
            yield from _catch_read_errors(name, check_table(dataset, dataset.table(name), intact))


def _catch_read_errors(part: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield the findings; an error while reading the rows becomes a finding too."""
    try:
        yield from findings
    except READING_ERRORS as error:
        yield Finding(part, "unreadable", first_line(error))
