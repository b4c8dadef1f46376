"""The work area of an unfinished run: prepared when a run begins or resumes, deleted when it finishes."""

from __future__ import annotations

from collections.abc import Collection

from attlas.extract.store.generations import named_parts
from attlas.extract.store.interface import Storage
from attlas.extract.store.layout import (
    CARD,
    DRAFT,
    MEAN_VECTORS,
    MEANS,
    PLAN,
    RUN,
    TEMPORARY,
    WORK,
    record_key,
    spool_key,
)
from attlas.extract.store.parts import discard_parts_except
from attlas.extract.store.records import ShardRecord, clear_way_for_records, discard_records_except
from attlas.extract.tables import TABLES


def has_work(storage: Storage) -> bool:
    """Whether there is a work area, or something else of its name."""
    return WORK in (storage.names() or ())


def clear_obstacles(storage: Storage) -> None:
    """Make way for card, draft and records; refuses if something that must not be deleted is in the way."""
    storage.refuse_obstacle(CARD)
    storage.delete(DRAFT)  # whatever has its name: it is written again
    clear_way_for_records(storage)


def discard_leftovers(storage: Storage, kept: Collection[ShardRecord]) -> None:
    """Delete all records but these, and parts that neither they nor a manifest names, left by an earlier plan."""
    discard_records_except(storage, {record.shard for record in kept})
    parts = {part.path for record in kept for part in record.parts.values()}
    discard_parts_except(storage, parts | named_parts(storage))


def clear_work(storage: Storage, *, shards: int = 0) -> list[str]:
    """Delete what only an unfinished run needs, including token ids, parts that no manifest names, and temporary files of killed writers.

    shards: of the run. What belongs to them is deleted even if the storage does not list it yet. Returns the keys of the parts.
    """
    gone = discard_parts_except(storage, named_parts(storage))
    written_to = {"", *TABLES}
    for key in storage.list():
        if key.endswith(TEMPORARY) and key.rpartition("/")[0] in written_to:
            storage.delete(key)
    # last: without it nobody looks for the rest
    of_shards = (key(shard) for shard in range(shards) for key in (record_key, spool_key))
    storage.clear(WORK, (RUN, PLAN, DRAFT, MEANS, MEAN_VECTORS, *of_shards))
    return gone


def discard_run(storage: Storage) -> None:
    """Delete an unfinished run: its card and parts, and last its work area, by which it is known as one."""
    storage.delete(CARD)
    for folder in (*TABLES, WORK):
        storage.clear(folder)
