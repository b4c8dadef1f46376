"""Shard records: a shard that has one is done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from attlas.extract.errors import Damaged
from attlas.extract.shapes import Malformed, count, mapping_of, record, sha256
from attlas.extract.store.interface import Storage
from attlas.extract.store.layout import RECORDS, record_key, shard_in, shard_of
from attlas.extract.store.manifest import PART
from attlas.extract.store.parts import Part, is_as_written, part_of, refuse_obstacles
from attlas.extract.store.sealed import get_sealed, put_sealed


@dataclass(frozen=True)
class ShardRecord:
    """Written after all parts of a shard are in place: the shard is done."""

    shard: int
    parts: Mapping[str, Part]
    facts: Mapping[str, Any]  # counts that the manifest adds up
    spool: (
        str  # SHA-256 of what was measured, the spool and means if there are any: planned otherwise it is another shard
    )


_RECORD = record(
    {"shard": count, "parts": mapping_of(PART), "facts": record({"positions": count, "padded": count}), "spool": sha256}
)


def has_records(storage: Storage) -> bool:
    """Whether the run has measured shards before."""
    return storage.names(RECORDS) is not None


def write_record(storage: Storage, done: ShardRecord) -> None:
    put_sealed(storage, record_key(done.shard), asdict(done))


def read_record(storage: Storage, shard: int) -> ShardRecord | None:
    """The record of a shard, or None unless it is sound and all its parts exist with the recorded sizes."""
    try:
        raw = get_sealed(storage, record_key(shard))
        if raw is None:
            return None
        _RECORD(raw, "")
    except (Damaged, Malformed):
        return None
    parts = {table: part_of(part) for table, part in raw["parts"].items()}
    in_place = all(p.path.partition("/")[0] == t and shard_of(p.path) == shard for t, p in parts.items())
    if raw["shard"] != shard or not in_place or any(storage.size(p.path) != p.bytes for p in parts.values()):
        return None
    return ShardRecord(shard, parts, raw["facts"], raw["spool"])


def is_intact(storage: Storage, done: ShardRecord) -> bool:
    """Whether all parts of a record are as they were written, by their checksums."""
    return all(is_as_written(storage, part) for part in done.parts.values())


def discard_damaged(storage: Storage, shard: int, *, spool: str, source: str = "") -> ShardRecord | None:
    """Delete a shard's record unless its parts are intact and were measured from the spool with this SHA-256; returns it if they are.

    Refuses if something is in the way of the parts, which will then be written again. source: as of `part_key`.
    """
    found = read_record(storage, shard)
    if found is not None and found.spool == spool and is_intact(storage, found):
        return found
    storage.delete(record_key(shard))
    refuse_obstacles(storage, shard, source)
    return None


def discard_records_except(storage: Storage, shards: Collection[int]) -> None:
    """Delete the records of all other shards, left by an earlier plan."""
    for name in storage.names(RECORDS) or ():
        number = shard_in(name, after=".json")
        if number is not None and number not in shards:
            storage.delete(f"{RECORDS}/{name}")


def clear_way_for_records(storage: Storage) -> None:
    """Delete whatever has the name of the records' folder and is not a folder."""
    try:
        storage.names(RECORDS)
    except NotADirectoryError:
        storage.delete(RECORDS)
