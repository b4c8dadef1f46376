"""A dataset in its storage, as runs write it and readers open it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from attlas.extract.errors import Damaged, Refusal
from attlas.extract.store import claim, parts, records, work
from attlas.extract.store.claim import Identity
from attlas.extract.store.generations import generation_of, keep_generation, read_generation
from attlas.extract.store.interface import Storage
from attlas.extract.store.layout import CARD, DRAFT, LOCK, MANIFEST
from attlas.extract.store.lock import Lock, refuse_busy, release_lock, take_lock
from attlas.extract.store.manifest import read_manifest
from attlas.extract.store.opening import Location, open_storage
from attlas.extract.store.parts import Part
from attlas.extract.store.records import ShardRecord
from attlas.extract.store.sealed import as_json, get_sealed, put_sealed
from attlas.extract.urls import is_url

_AT_GENERATION = re.compile(r"(.+)@(\d{1,12})", re.ASCII | re.DOTALL)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True)
class Store:
    """One dataset, alone in its storage."""

    storage: Storage

    @classmethod
    def at(cls, location: Location) -> Store:
        return cls(open_storage(location))

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None if there is none. Refuses a damaged one, naming the key, and one of another version."""
        return read_manifest(self.storage)

    @property
    def exists(self) -> bool:
        """Whether the storage exists, possibly as an empty folder."""
        return self.storage.names() is not None

    def held_identity(self) -> Identity | None:
        """The identity of the run in the storage, finished or not. Refuses if it is damaged beyond recovery."""
        return claim.held_identity(self.storage)

    def refuse_foreign(self) -> None:
        """Refuse a file in the folder's place, and a folder that holds something other than a run."""
        claim.refuse_foreign(self.storage)

    def refuse_another(self, identity: Identity) -> None:
        """Refuse a storage that holds a different run, naming the differences."""
        claim.refuse_another(self.storage, identity)

    def claim(self, identity: Identity) -> bool:
        """Claim the storage for a run; True if it was free, False if this run has claimed it before."""
        return claim.claim(self.storage, identity)

    def refuse_busy(self) -> None:
        """Refuse a storage that another process or thread is writing to."""
        refuse_busy(self.storage, LOCK)

    def lock(self) -> Lock:
        """Lock the storage against other writers; refused if it is locked or cannot be written."""
        try:
            return take_lock(self.storage, LOCK)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                place = self.storage.place(LOCK)
                raise OSError(error.errno, f"can't be written: {error.strerror}", place) from error
            raise Refusal(
                f"the output folder must be writable; {self.storage.place()}: {error.strerror}; give --out another folder"
            ) from error

    def unlock(self) -> None:
        """Release the lock if this thread holds it."""
        release_lock(self.storage, LOCK)

    @property
    def is_finished(self) -> bool:
        """Whether there is a dataset, and no later generation of it has been begun."""
        return self.manifest is not None and not self.is_growing

    @property
    def is_growing(self) -> bool:
        """Whether there is a dataset of which a later generation has been begun."""
        manifest = self.manifest
        return manifest is not None and claim.generation_begun(self.storage) > generation_of(manifest)

    def is_of_corpus(self, identity: Identity) -> bool:
        """Whether there is a dataset, and its newest generation is of this state of the corpus."""
        manifest = self.manifest
        return manifest is not None and claim.is_of_corpus(manifest, identity)

    def is_finished_for(self, identity: Identity) -> bool:
        """The same, and nothing of a run is left to clean up."""
        return not self.has_work and self.is_of_corpus(identity)

    def write_part(self, table: str, shard: int, rows: pa.Table, *, source: str = "") -> Part:
        """source: the SHA-256 of what the shard is measured from, in every generation but the first."""
        return parts.write_part(self.storage, table, shard, rows, source=source)

    @property
    def has_records(self) -> bool:
        """Whether the run has measured shards before."""
        return records.has_records(self.storage)

    def write_record(self, record: ShardRecord) -> None:
        records.write_record(self.storage, record)

    def read_record(self, shard: int) -> ShardRecord | None:
        """The record of a shard, or None unless it is sound and all its parts exist with the recorded sizes."""
        return records.read_record(self.storage, shard)

    def unmeasured(self, shards: Iterable[int]) -> list[int]:
        """Those of some shards that have no record."""
        return [shard for shard in shards if self.read_record(shard) is None]

    def is_intact(self, record: ShardRecord) -> bool:
        """Whether all parts of a record are as they were written, by their checksums."""
        return records.is_intact(self.storage, record)

    def discard_damaged(self, shard: int, *, spool: str, source: str = "") -> ShardRecord | None:
        """Delete a shard's record unless its parts are intact and were measured from the spool with this SHA-256; returns it if they are."""
        return records.discard_damaged(self.storage, shard, spool=spool, source=source)

    def discard_leftovers(self, kept: Collection[ShardRecord]) -> None:
        """Delete all records but these, and parts that neither they nor a manifest names, left by an earlier plan."""
        work.discard_leftovers(self.storage, kept)

    def clear_obstacles(self) -> None:
        """Make way for card, draft and records; refuses if something that must not be deleted is in the way."""
        work.clear_obstacles(self.storage)

    @property
    def has_work(self) -> bool:
        """Whether there is a work area: the run is unfinished, or was killed before it cleaned up."""
        return work.has_work(self.storage)

    def clear_work(self) -> list[str]:
        """Delete what only an unfinished run needs, including token ids, and temporary files of killed writers; returns parts that are gone."""
        manifest = self.manifest
        return work.clear_work(self.storage, shards=0 if manifest is None else manifest.get("shards", 0))

    def discard_unfinished(self) -> None:
        """Delete an unfinished run, of whatever model; refuses if another process writes it, or it holds something else."""
        self.refuse_foreign()
        self.refuse_busy()
        if self.manifest is None and self.exists:
            work.discard_run(self.storage)

    def write_draft(self, manifest: Mapping[str, Any]) -> None:
        """Write the part of the manifest that is known before any shard is measured."""
        put_sealed(self.storage, DRAFT, manifest)

    @property
    def has_draft(self) -> bool:
        """Whether the run has been planned to the end."""
        return self.storage.size(DRAFT) is not None

    def read_draft(self) -> dict[str, Any]:
        """The part of the manifest that was written when the run was planned. Raises Damaged if it is not there."""
        draft = get_sealed(self.storage, DRAFT)
        if draft is None:
            raise Damaged(f"{self.storage.place(DRAFT)} is missing; the same command plans again")
        return draft

    def finish(self, manifest: Mapping[str, Any], card: str) -> None:
        """Make the dataset, or its next generation, exist: write the card, then the manifest, and delete the work area."""
        if generation_of(manifest) > 1:
            keep_generation(self.storage, manifest)
        self.storage.put(CARD, card.encode())
        self.storage.put(MANIFEST, as_json(dict(manifest)))
        self.clear_work()


def open_dataset(location: Location) -> tuple[Storage, dict[str, Any]]:
    """The storage and the checked manifest of a finished dataset, or of one of its generations: `DIR@5`.

    Raises Refusal for anything else.
    """
    place, generation = _place_and_generation(location)
    storage = open_storage(place)
    # first: an object store may list it later
    manifest = read_manifest(storage)
    if manifest is None and not _is_there(storage):
        raise Refusal(f"a dataset is a folder; there is none at {storage.place()}; give the --out of a finished run")
    if manifest is None:
        state = "an unfinished run" if work.has_work(storage) else "no manifest.json"
        raise Refusal(f"a dataset has a manifest; {storage.place()} holds {state}; finish it with the same attlas run")
    return storage, manifest if generation is None else read_generation(storage, generation)


def _place_and_generation(location: Location) -> tuple[Location, int | None]:
    """A location without the generation that it names, unless a folder has this very name."""
    if isinstance(location, Storage):
        return location, None
    text = os.fspath(location)
    named = _AT_GENERATION.fullmatch(text)
    if named is None or (not is_url(text) and os.path.lexists(text)):
        return location, None
    return named[1], int(named[2])


def _is_there(storage: Storage) -> bool:
    try:
        return storage.names() is not None
    except NotADirectoryError:
        return False
