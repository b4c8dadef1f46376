"""Checks of a dataset's files against the manifest and the contract that need no rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from attlas.analysis.dataset import Dataset
from attlas.analysis.parts import DamagedPart, first_line, part_size, read_footer
from attlas.analysis.report.numbers import plural
from attlas.extract.store import (
    CARD,
    LINK_OUT,
    MANIFEST,
    MANIFESTS,
    WORK,
    Part,
    Storage,
    Store,
    named_parts,
    parts_of,
    sha256_of,
    shard_of,
)
from attlas.extract.tables import TABLES, Table


@dataclass(frozen=True)
class Finding:
    """A problem in a dataset: the part or file that has it, the check that failed, and the details."""

    part: str
    check: str
    message: str

    def __str__(self) -> str:
        return f"{self.part}: {self.check}: {self.message}"


def find_stray_files(dataset: Dataset) -> Iterator[Finding]:
    """Files in the dataset's folder that look like its data but are not in the manifest."""
    named = named_parts(dataset.storage)
    tables = {*dataset.tables, *TABLES}
    is_growing = Store(dataset.storage).is_growing
    for name in dataset.storage.list():
        folder = name.split("/")[0]
        if name in named or name in (MANIFEST, CARD) or folder == MANIFESTS:
            continue
        is_of_growth = is_growing and (folder == WORK or (folder in tables and shard_of(name) is not None))
        if folder == WORK and not is_of_growth:
            yield Finding(name, "stray file", "working files are removed when a run is finished")
        elif not is_of_growth and (name.endswith((".parquet", ".tmp")) or folder in tables):
            yield Finding(name, "stray file", "it is not in the manifest")


def check_row_counts(dataset: Dataset, table: str) -> Iterator[Finding]:
    """Check a table's row count in the manifest against those of its parts, and that each part is listed once."""
    entry = dataset.manifest["tables"][table]
    parts = list(parts_of(dataset.manifest, table))
    rows = sum(part.rows for part in parts)
    if entry.get("rows") != rows:
        yield Finding(MANIFEST, "row count", f"{table} has {entry.get('rows')}; its parts have {rows}")
    if len({part.path for part in parts}) != len(parts):
        yield Finding(MANIFEST, "parts", f"{table} names a part twice")


def check_file(dataset: Dataset, table: str, part: Part) -> Iterator[Finding]:
    """Check that a part exists and has the size, checksum, row count and schema that it should have."""
    storage = dataset.storage
    try:
        size = part_size(storage, part.path)
    except DamagedPart as damage:
        if LINK_OUT in str(damage):
            yield Finding(part.path, "unreadable", str(damage))
        else:
            yield Finding(part.path, "missing part", "it is in the manifest, but there is no such file")
        return
    try:
        yield from _check_bytes(storage, part, size)
        footer = read_footer(storage, part.path)
    except (DamagedPart, OSError) as error:
        yield Finding(part.path, "unreadable", first_line(error))
        return
    if footer.rows != part.rows:
        yield Finding(part.path, "row count", f"{part.rows} in the manifest, {footer.rows} in the file")
    names = dataset.manifest["tables"][table].get("columns")
    if names is not None and footer.schema.names != names:
        yield Finding(part.path, "schema", "its columns are not those that the manifest lists")
    if table in TABLES:
        yield from (
            Finding(part.path, "schema", text) for text in _schema_differences(dataset.table(table), footer.schema)
        )


def _check_bytes(storage: Storage, part: Part, size: int) -> Iterator[Finding]:
    if size != part.bytes:
        yield Finding(
            part.path, "size", f"{plural(part.bytes, 'byte')} in the manifest, {plural(size, 'byte')} on disk"
        )
    elif (digest := sha256_of(storage, part.path)) != part.sha256:
        yield Finding(part.path, "checksum", f"SHA-256 {part.sha256[:12]}… in the manifest, {digest[:12]}… on disk")


def _schema_differences(table: Table, schema: pa.Schema) -> Iterator[str]:
    expected = table.schema(optional=frozenset(schema.names) & table.optional)
    if schema.names != expected.names:
        missing = [n for n in expected.names if n not in schema.names]
        unknown = [n for n in schema.names if n not in expected.names]
        differences = [
            f"{label} {', '.join(names)}" for label, names in (("lacks", missing), ("has unknown", unknown)) if names
        ]
        yield "; ".join(differences) or "columns are not in the contract's order"
        return
    for field, wanted in zip(schema, expected, strict=True):
        if field.type != wanted.type:
            yield f"{field.name} is {field.type}, the contract says {wanted.type}"
        if field.nullable != wanted.nullable:
            yield f"{field.name} is {'' if field.nullable else 'not '}nullable, the contract says otherwise"
        if _metadata(field) != _metadata(wanted):
            yield f"{field.name} has other metadata (formula, unit, bounds …) than the contract"


def _metadata(field: pa.Field) -> dict[bytes, bytes]:
    return {k: v for k, v in (field.metadata or {}).items() if not k.startswith(b"PARQUET:")}
