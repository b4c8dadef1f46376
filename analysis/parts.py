"""The parts of a table before any row is read: files that are there, Parquet, as long as the manifest says, of one schema."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from attlas.extract.store import Part, Storage
from attlas.extract.tables import Table

# what a part of the contract never reaches: a row takes bits of its own, and even constant columns pack less than that
_ROWS_PER_BYTE = 100
_UNPACKED_PER_BYTE = 2_000
_UNPACKED_ANYWAY = 1 << 28


_TYPE_NAMES = re.compile(r"\b\w+(?:Error|Exception): ?")


class DamagedPart(Exception):
    """A part that cannot be read as what it is named; the message says why."""


@dataclass(frozen=True)
class Footer:
    """What a Parquet file says of itself."""

    rows: int
    schema: pa.Schema


def read_footer(storage: Storage, key: str) -> Footer:
    """The footer of a part; DamagedPart for what is no file, no Parquet, or unpacks beyond all measure."""
    size = size_of(storage, key)
    try:
        file = pq.ParquetFile(storage.source(key), memory_map=False)
        with file:
            metadata, schema = file.metadata, file.schema_arrow
    except Exception as error:  # whatever a library makes of foreign bytes
        raise DamagedPart(f"it cannot be read as Parquet ({first_line(error)})") from error
    unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if metadata.num_rows > _ROWS_PER_BYTE * size:
        raise DamagedPart(f"it claims {metadata.num_rows:,} rows in {size:,} bytes")
    if unpacked > max(_UNPACKED_PER_BYTE * size, _UNPACKED_ANYWAY):
        raise DamagedPart(f"it claims to unpack from {size:,} bytes to {unpacked:,}")
    return Footer(metadata.num_rows, schema)


def size_of(storage: Storage, key: str) -> int:
    """The size of a part in bytes; DamagedPart if there is no such file."""
    try:
        with storage.open(key) as file:
            return file.seek(0, os.SEEK_END)
    except FileNotFoundError as error:
        raise DamagedPart("there is no such file") from error
    except OSError as error:
        raise DamagedPart(f"it is no readable file ({first_line(error)})") from error


def unreadable_rows(storage: Storage, key: str) -> str | None:
    """Why the rows of a part can't be read to their end; None where they can."""
    try:
        with pq.ParquetFile(storage.source(key)) as file:
            for _ in file.iter_batches():
                pass
    except Exception as error:  # whatever a library makes of foreign bytes
        return first_line(error)
    return None


def common_schema(storage: Storage, parts: list[Part]) -> pa.Schema:
    """The schema that all parts of a table have; DamagedPart where they are not what the manifest says."""
    schemas = []
    for part in parts:
        try:
            footer = read_footer(storage, part.path)
        except DamagedPart as damage:
            raise DamagedPart(f"{part.path}: {damage}") from damage
        if footer.rows != part.rows:
            raise DamagedPart(f"{part.path}: {part.rows:,} rows in the manifest, {footer.rows:,} in the file")
        schemas.append(footer.schema)
        if not footer.schema.equals(schemas[0], check_metadata=False):
            raise DamagedPart(f"{part.path}: other columns than {parts[0].path}")
    return schemas[0]


def misfits(table: Table, schema: pa.Schema) -> Iterator[str]:
    """Columns that can't stand for those of the contract: absent where a row needs them, or of another kind of type.

    Wider and narrower numbers and every way to hold text are of one kind: older datasets have them.
    """
    for wanted in table.schema(optional=table.optional):
        index = schema.get_all_field_indices(wanted.name)
        if len(index) > 1:
            yield f"it has {wanted.name} twice"
        elif not index and not wanted.nullable:
            yield f"it lacks {wanted.name}"
        elif index and kind_of(schema.field(index[0]).type) not in (kind_of(wanted.type), "nothing"):
            yield f"{wanted.name} is {schema.field(index[0]).type}, the contract says {wanted.type}"


def kind_of(dtype: pa.DataType) -> str:
    """What values a type holds, however it holds them."""
    if pa.types.is_dictionary(dtype):
        return kind_of(dtype.value_type)
    kinds = {
        "whole number": pa.types.is_integer,
        "number": pa.types.is_floating,
        "truth": pa.types.is_boolean,
        "nothing": pa.types.is_null,
    }
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype):
        return "text"
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_list_view(dtype):
        return f"list of {kind_of(dtype.value_type)}"
    return next((name for name, holds in kinds.items() if holds(dtype)), str(dtype))


def first_line(error: BaseException) -> str:
    """What an error says first, without the names of types within it; its own type where it says nothing."""
    said = _TYPE_NAMES.sub("", str(error).strip().partition("\n")[0])
    return said or type(error).__name__
