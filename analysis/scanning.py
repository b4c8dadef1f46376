"""Scans of Parquet parts with Polars or Arrow that read only the columns and row groups they need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, BinaryIO, TypeGuard

import polars as pl

from attlas.extract.store import Part, Storage

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as arrow


def scan_parts(storage: Storage, parts: Iterable[Part]) -> pl.LazyFrame:
    """The rows of parts with a common schema as a LazyFrame."""
    sources = [storage.source(part.path, part.bytes) for part in parts]
    if _are_local(sources):
        return pl.scan_parquet(sources, glob=False, hive_partitioning=False)
    # Polars reads Python files whole; Arrow reads only the ranges it needs
    return pl.scan_pyarrow_dataset(_dataset(sources))


def arrow_dataset(storage: Storage, parts: Iterable[Part], schema: pa.Schema) -> arrow.Dataset:
    """The rows of parts as an Arrow dataset."""
    return _dataset([storage.source(part.path, part.bytes) for part in parts], schema)


def _are_local(sources: list[str | BinaryIO]) -> TypeGuard[list[str]]:
    return all(isinstance(source, str) for source in sources)


def _dataset(sources: list[str | BinaryIO], schema: pa.Schema | None = None) -> arrow.Dataset:
    import pyarrow.dataset as arrow

    if _are_local(sources):
        return arrow.dataset(sources, format="parquet", schema=schema)
    parquet = arrow.ParquetFileFormat()
    fragments = [parquet.make_fragment(source) for source in sources]
    return arrow.FileSystemDataset(fragments, schema or fragments[0].physical_schema, parquet)
