"""The work area of an unfinished run: made ready when a run begins or goes on, gone when it ends."""

from __future__ import annotations

from extract.schema import TABLES
from extract.store.interface import Storage
from extract.store.layout import CARD, TEMPORARY, WORK
from extract.store.parts import discard_parts_beyond
from extract.store.records import clear_way_for_records, discard_records_beyond


def has_work(storage: Storage) -> bool:
    """Whether there is a work area, or something in its place."""
    return WORK in (storage.names() or ())


def clear_obstacles(storage: Storage) -> None:
    """Make room for what is written at the end and for records; refuses what is not ours to remove."""
    storage.refuse_obstacle(CARD)
    clear_way_for_records(storage)


def discard_beyond(storage: Storage, shards: int) -> None:
    """Remove parts and records of shards that the plan does not have: those of a plan that was lost."""
    discard_records_beyond(storage, shards)
    discard_parts_beyond(storage, shards)


def clear_work(storage: Storage) -> None:
    """Remove what only an unfinished run needs, token ids among it, and temporary files of killed writers."""
    storage.clear(WORK)
    written_to = {"", *TABLES}
    for key in storage.list():
        if key.endswith(TEMPORARY) and key.rpartition("/")[0] in written_to:
            storage.delete(key)
