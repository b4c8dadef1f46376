"""Files against the manifest and the contract: everything that can be said of a part without looking at its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from attlas.analysis.dataset import Dataset
from attlas.analysis.parts import DamagedPart, first_line, read_footer, size_of
from attlas.analysis.report.numbers import plural
from attlas.extract.store import CARD, MANIFEST, WORK, Part, Storage, parts_of, sha256_of
from attlas.extract.tables import TABLES, Table


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the part (or file) it is in, the check that saw it, and what it saw."""

    part: str
    check: str
    message: str

    def __str__(self) -> str:
        return f"{self.part}: {self.check}: {self.message}"


def strays(dataset: Dataset) -> Iterator[Finding]:
    named = {part.path for table in dataset.tables for part in parts_of(dataset.manifest, table)}
    tables = {*dataset.tables, *TABLES}
    for name in dataset.storage.list():
        if name in named or name in (MANIFEST, CARD):
            continue
        if name.split("/")[0] == WORK:
            yield Finding(name, "stray file", "what only an unfinished run needs is gone once it is finished")
        elif name.endswith((".parquet", ".tmp")) or name.split("/")[0] in tables:
            yield Finding(name, "stray file", "the manifest does not name it")


def totals(dataset: Dataset, table: str) -> Iterator[Finding]:
    entry = dataset.manifest["tables"][table]
    parts = list(parts_of(dataset.manifest, table))
    rows = sum(part.rows for part in parts)
    if entry.get("rows") != rows:
        yield Finding(MANIFEST, "row count", f"{table} has {entry.get('rows')}; its parts have {rows}")
    if len({part.path for part in parts}) != len(parts):
        yield Finding(MANIFEST, "parts", f"{table} names a part twice")


def integrity(dataset: Dataset, table: str, part: Part) -> Iterator[Finding]:
    """What can be said of one file without looking at its rows."""
    storage = dataset.storage
    try:
        size = size_of(storage, part.path)
    except DamagedPart:
        yield Finding(part.path, "missing part", "the manifest names it; there is no such file")
        return
    try:
        yield from _bytes(storage, part, size)
        footer = read_footer(storage, part.path)
    except (DamagedPart, OSError) as error:
        yield Finding(part.path, "unreadable", first_line(error))
        return
    if footer.rows != part.rows:
        yield Finding(part.path, "row count", f"{part.rows} in the manifest, {footer.rows} in the file")
    if table in TABLES:
        yield from (Finding(part.path, "schema", text) for text in _schema_differences(TABLES[table], footer.schema))


def _bytes(storage: Storage, part: Part, size: int) -> Iterator[Finding]:
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
        facts = [
            f"{label} {', '.join(names)}" for label, names in (("lacks", missing), ("has unknown", unknown)) if names
        ]
        yield "; ".join(facts) or "columns are not in the contract's order"
        return
    for found, wanted in zip(schema, expected, strict=True):
        if found.type != wanted.type:
            yield f"{found.name} is {found.type}, the contract says {wanted.type}"
        if found.nullable != wanted.nullable:
            yield f"{found.name} is {'' if found.nullable else 'not '}nullable, the contract says otherwise"
        if _facts(found) != _facts(wanted):
            yield f"{found.name} has other metadata (formula, unit, bounds …) than the contract"


def _facts(field: pa.Field) -> dict[bytes, bytes]:
    return {k: v for k, v in (field.metadata or {}).items() if not k.startswith(b"PARQUET:")}
