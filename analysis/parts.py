"""Checks of Parquet parts that need no rows: the file exists, is Parquet, has the manifest's row count and the common schema."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from attlas.extract.store import Part, Storage
from attlas.extract.tables import Table

# limits that no part of the contract reaches: each row takes some bits, and even constant columns compress less
_ROWS_PER_BYTE = 100
_UNCOMPRESSED_PER_BYTE = 2_000
_UNCOMPRESSED_ALLOWED = 1 << 28
_FOOTERS_AT_ONCE = 8  # an object store takes its time for each


_TYPE_NAMES = re.compile(r"\b\w+(?:Error|Exception): ?")


class DamagedPart(Exception):
    """A part that is not a readable file of its table; the message gives the reason."""


@dataclass(frozen=True)
class Footer:
    """Row count and schema from the footer of a Parquet file."""

    rows: int
    schema: pa.Schema


def read_footer(storage: Storage, key: str) -> Footer:
    """The footer of a part. Raises DamagedPart if it is not a file, not Parquet, or claims an implausible size."""
    size = part_size(storage, key)
    try:
        file = pq.ParquetFile(storage.source(key, size), memory_map=False)
        with file:
            metadata, schema = file.metadata, file.schema_arrow
    except Exception as error:  # pyarrow raises many types for damaged bytes
        raise DamagedPart(f"it cannot be read as Parquet ({first_line(error)})") from error
    uncompressed = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if metadata.num_rows > _ROWS_PER_BYTE * size:
        raise DamagedPart(f"it claims {metadata.num_rows:,} rows in {size:,} bytes")
    if uncompressed > max(_UNCOMPRESSED_PER_BYTE * size, _UNCOMPRESSED_ALLOWED):
        raise DamagedPart(f"it claims to unpack from {size:,} bytes to {uncompressed:,}")
    return Footer(metadata.num_rows, schema)


def part_size(storage: Storage, key: str) -> int:
    """The size of a part in bytes. Raises DamagedPart if there is no such file."""
    try:
        with storage.open(key) as file:
            return file.seek(0, os.SEEK_END)
    except FileNotFoundError as error:
        raise DamagedPart("there is no such file") from error
    except OSError as error:
        raise DamagedPart(f"it is not a readable file ({first_line(error)})") from error


def rows_error(storage: Storage, key: str) -> str | None:
    """Why the rows of a part can't be read to the end; None if they can."""
    try:
        with pq.ParquetFile(storage.source(key, part_size(storage, key))) as file:
            for _ in file.iter_batches():
                pass
    except Exception as error:  # pyarrow raises many types for damaged bytes
        return first_line(error)
    return None


def common_schema(storage: Storage, parts: list[Part]) -> pa.Schema:
    """The common schema of a table's parts. Raises DamagedPart if they differ from each other or from the manifest."""

    def schema_of(part: Part) -> pa.Schema:
        try:
            footer = read_footer(storage, part.path)
        except DamagedPart as damage:
            raise DamagedPart(f"{part.path}: {damage}") from damage
        if footer.rows != part.rows:
            raise DamagedPart(f"{part.path}: {part.rows:,} rows in the manifest, {footer.rows:,} in the file")
        return footer.schema

    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:
        schemas = list(threads.map(schema_of, parts))
    for part, schema in zip(parts, schemas, strict=True):
        if not schema.equals(schemas[0], check_metadata=False):
            raise DamagedPart(f"{part.path}: other columns than {parts[0].path}")
    return schemas[0]


def incompatible_columns(table: Table, schema: pa.Schema) -> Iterator[str]:
    """Columns that can't be read as the contract's: repeated, missing although required, or of another kind of type.

    Numbers of any width, and text in any encoding, are of one kind: older datasets use other types.
    """
    for wanted in table.schema(optional=table.optional):
        index = schema.get_all_field_indices(wanted.name)
        if len(index) > 1:
            yield f"it has {wanted.name} twice"
        elif not index and not wanted.nullable:
            yield f"it lacks {wanted.name}"
        elif index and value_kind(schema.field(index[0]).type) not in (value_kind(wanted.type), "nothing"):
            yield f"{wanted.name} is {schema.field(index[0]).type}, the contract says {wanted.type}"


def value_kind(dtype: pa.DataType) -> str:
    """The kind of values of a type, whatever its width or encoding."""
    if pa.types.is_dictionary(dtype):
        return value_kind(dtype.value_type)
    kinds = {
        "whole number": pa.types.is_integer,
        "number": pa.types.is_floating,
        "boolean": pa.types.is_boolean,
        "nothing": pa.types.is_null,
    }
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype):
        return "text"
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_list_view(dtype):
        return f"list of {value_kind(dtype.value_type)}"
    return next((name for name, is_kind in kinds.items() if is_kind(dtype)), str(dtype))


def first_line(error: BaseException) -> str:
    """The first line of an error's message without the names of exception types; the error's type if it has no message."""
    line = _TYPE_NAMES.sub("", str(error).strip().partition("\n")[0])
    return line or type(error).__name__
