"""The Parquet parts of a dataset: one per table and shard."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attlas.extract.store.interface import Storage, sha256_of
from attlas.extract.store.layout import part_key, shard_of
from attlas.extract.tables import TABLES

# nearly all of a part are the last digits of floats, which nothing packs: 3 gives 0.5 % more bytes, 15 gives 2 % less for
# six times the time
_LEVEL = 6
# a reader of one head skips the groups of others; smaller groups would make the footer more than a hundredth of the part
_GROUP_ROWS = 4096


@dataclass(frozen=True)
class Part:
    """One Parquet file of a table."""

    path: str  # its key
    rows: int
    bytes: int
    sha256: str


class _Counted(io.RawIOBase):
    """A file that passes writes on to another one and keeps their total size and SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: Any, /) -> int:
        self._file.write(content)
        self.digest.update(content)
        self.size += len(content)
        return len(content)


def write_part(
    storage: Storage, table: str, shard: int, rows: pa.Table, *, source: str = "", key: str | None = None
) -> Part:
    """Write one part. Floats are byte-stream-split, so zstd finds their common exponents. source: as of `part_key`; key: another name."""
    key = part_key(table, shard, source) if key is None else key
    with storage.writing(key) as file:
        counted = _Counted(file)
        _write_rows(counted, table, rows)
    return Part(key, rows.num_rows, counted.size, counted.digest.hexdigest())


def restore_part(storage: Storage, table: str, part: Part, rows: pa.Table) -> bool:
    """Write a part again if these rows give the very bytes that it had; returns whether they do."""
    content = io.BytesIO()
    _write_rows(content, table, rows)
    if hashlib.sha256(content.getbuffer()).hexdigest() != part.sha256:
        return False
    with storage.writing(part.path) as file:
        file.write(content.getbuffer())
    return True


def _write_rows(file: Any, table: str, rows: pa.Table) -> None:
    floats = [f.name for f in rows.schema if pa.types.is_floating(f.type)]
    others = [f.name for f in rows.schema if not pa.types.is_floating(f.type)]
    pq.write_table(
        rows,
        file,
        compression="zstd",
        compression_level=_LEVEL,
        use_dictionary=others,  # pyright: ignore[reportArgumentType]
        use_byte_stream_split=floats,  # pyright: ignore[reportArgumentType]
        store_schema=True,
        row_group_size=_group_rows(table, rows),
    )


def _group_rows(table: str, rows: pa.Table) -> int:
    """Rows of a row group: whole heads (or sites), as many as have _GROUP_ROWS rows, where rows are sorted by them."""
    if TABLES[table].kind != "dense" or "sequence_id" not in rows.column_names or len(rows) == 0:
        return 1 << 17
    sequences = rows["sequence_id"].to_numpy()
    of_one = 1 + int(np.argmax(np.append(np.diff(sequences) <= 0, True)))
    return of_one * -(-_GROUP_ROWS // of_one)


def read_part(storage: Storage, part: Part) -> pa.Table:
    """The rows of a part."""
    # pre_buffer: columns that lie side by side are fetched at once
    with pq.ParquetFile(storage.source(part.path, part.bytes), pre_buffer=True) as file:
        return file.read()


def part_of(raw: Mapping[str, Any]) -> Part:
    """A part from its description in a manifest or record."""
    return Part(raw["path"], raw["rows"], raw["bytes"], raw["sha256"])


def parts_of(manifest: Mapping[str, Any], table: str) -> Iterator[Part]:
    """The parts of a table, in shard order."""
    yield from map(part_of, manifest["tables"].get(table, {"parts": []})["parts"])


def is_as_written(storage: Storage, part: Part) -> bool:
    try:
        return sha256_of(storage, part.path) == part.sha256
    except OSError:
        return False


def refuse_obstacles(storage: Storage, shard: int, source: str = "") -> None:
    """Refuse if something is in the way of a shard's parts. source: as of `part_key`."""
    for table in TABLES:
        storage.refuse_obstacle(part_key(table, shard, source))


def stored_parts(storage: Storage) -> Iterator[str]:
    """The keys of all parts in the tables' folders, whoever wrote them."""
    for table in TABLES:
        for name in _names(storage, table):
            if shard_of(name) is not None:
                yield f"{table}/{name}"


def discard_parts_except(storage: Storage, kept: Collection[str]) -> list[str]:
    """Delete all parts but these; returns the keys of those that are gone."""
    gone = [key for key in stored_parts(storage) if key not in kept]
    for key in gone:
        storage.delete(key)
    return gone


def _names(storage: Storage, folder: str) -> list[str]:
    try:
        return list(storage.names(folder) or ())
    except NotADirectoryError:
        return []
