"""A dataset in its storage, as a run writes it and as everyone reads it."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from extract.errors import Refusal
from extract.store import claim, parts, records, work
from extract.store.interface import Storage
from extract.store.layout import CARD, LOCK, MANIFEST
from extract.store.lock import Lock, refuse_busy, release_lock, take_lock
from extract.store.manifest import read_manifest
from extract.store.opening import Location, open_storage
from extract.store.parts import Part
from extract.store.records import ShardRecord
from extract.store.sealed import as_json

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True)
class Store:
    """One dataset and the storage that holds nothing else."""

    storage: Storage

    @classmethod
    def at(cls, location: Location) -> Store:
        return cls(open_storage(location))

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None where there is none. Refuses one that is damaged or of another version, by its key."""
        return read_manifest(self.storage)

    @property
    def exists(self) -> bool:
        """Whether the storage is there, if only as an empty folder."""
        return self.storage.names() is not None

    def held_run(self) -> dict[str, Any] | None:
        """The parameters of the run that the storage holds, finished or not. Refuses what can't tell them any more."""
        return claim.held_run(self.storage)

    def refuse_foreign(self) -> None:
        """Refuse a place that is no folder, or a folder that holds something and no run."""
        claim.refuse_foreign(self.storage)

    def refuse_another(self, run: Mapping[str, Any]) -> None:
        """Refuse a storage that holds a run which is not this one, with what differs."""
        claim.refuse_another(self.storage, run)

    def claim(self, run: Mapping[str, Any]) -> bool:
        """Take the storage for this run: True where it was nobody's, False where it is this run's already."""
        return claim.claim(self.storage, run)

    def refuse_busy(self) -> None:
        """Refuse a storage that another process or thread writes into now."""
        refuse_busy(self.storage, LOCK)

    def lock(self) -> Lock:
        """Keep everyone else from writing into the storage; refused where somebody does, and where nobody may."""
        try:
            return take_lock(self.storage, LOCK)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
            raise Refusal(
                f"the output folder must be writable; {self.storage.place()}: {error.strerror}; give --out another folder"
            ) from error

    def unlock(self) -> None:
        """Release the storage's lock if this thread holds it."""
        release_lock(self.storage, LOCK)

    def write_part(self, table: str, shard: int, rows: pa.Table) -> Part:
        return parts.write_part(self.storage, table, shard, rows)

    @property
    def has_records(self) -> bool:
        """Whether shards of the run were done before."""
        return records.has_records(self.storage)

    def write_record(self, record: ShardRecord) -> None:
        records.write_record(self.storage, record)

    def read_record(self, shard: int) -> ShardRecord | None:
        """The record of a finished shard whose parts are all there in their sizes, else None."""
        return records.read_record(self.storage, shard)

    def discard_damaged(self, shard: int, *, spool: str) -> None:
        """Remove a shard's record unless its parts are those that were written, from the spool of this SHA-256."""
        records.discard_damaged(self.storage, shard, spool=spool)

    def discard_beyond(self, shards: int) -> None:
        """Remove parts and records of shards that the plan does not have: those of a plan that was lost."""
        work.discard_beyond(self.storage, shards)

    def clear_obstacles(self) -> None:
        """Make room for what is written at the end and for records; refuses what is not ours to remove."""
        work.clear_obstacles(self.storage)

    @property
    def has_work(self) -> bool:
        """Whether there is a work area: a run that is not finished, or was not tidied."""
        return work.has_work(self.storage)

    def clear_work(self) -> None:
        """Remove what only an unfinished run needs, token ids among it, and temporary files of killed writers."""
        work.clear_work(self.storage)

    def finish(self, manifest: Mapping[str, Any], card: str) -> None:
        """Make the dataset exist: the card, then the manifest; the work area goes."""
        self.storage.put(CARD, card.encode())
        self.storage.put(MANIFEST, as_json(dict(manifest)))
        self.clear_work()


def open_dataset(location: Location) -> tuple[Storage, dict[str, Any]]:
    """A finished dataset's storage and its manifest, whose shape is checked. Raises Refusal for anything else."""
    storage = open_storage(location)
    if not _is_there(storage):
        raise Refusal(f"a dataset is a folder; there is none at {storage.place()}; give the --out of a finished run")
    manifest = read_manifest(storage)
    if manifest is None:
        state = "an unfinished run" if work.has_work(storage) else "no manifest.json"
        raise Refusal(f"a dataset has a manifest; {storage.place()} holds {state}; finish it with the same attlas run")
    return storage, manifest


def _is_there(storage: Storage) -> bool:
    try:
        return storage.names() is not None
    except NotADirectoryError:
        return False
