"""The generations of a dataset that grows with its corpus.

A finished dataset is generation 1. When its corpus has changed, a run measures what is new, and what is left of shards that have lost
a document, and writes another generation: a manifest that names the parts of unchanged shards and the new ones. No part and no
manifest is ever replaced, so an earlier generation stays whole until `attlas gc` removes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attlas.extract.errors import Refusal
from attlas.extract.store.interface import Storage
from attlas.extract.store.layout import MANIFEST, MANIFESTS, REPORT, earlier_report_key, generation_in, manifest_key
from attlas.extract.store.manifest import read_manifest
from attlas.extract.store.parts import parts_of
from attlas.extract.store.sealed import as_json


def generation_of(manifest: Mapping[str, Any]) -> int:
    """The number of a manifest's generation."""
    return manifest.get("generation", {"number": 1})["number"]


def next_sequence(manifest: Mapping[str, Any]) -> int:
    """The first sequence_id that no generation has used."""
    facts = manifest.get("generation")
    return manifest["corpus"]["sequences"] if facts is None else facts["next_sequence"]


def generations(storage: Storage) -> list[int]:
    """The generations that are kept, the oldest first. Those of a dataset that has never grown are none or one."""
    newest = read_manifest(storage)
    kept = _with_manifests(storage)
    return sorted({*kept, *(() if newest is None else (generation_of(newest),))})


def read_generation(storage: Storage, number: int) -> dict[str, Any]:
    """The manifest of a generation. Raises Refusal if there is none."""
    manifest = read_manifest(storage, manifest_key(number)) or read_manifest(storage)
    if manifest is None or generation_of(manifest) != number:
        kept = ", ".join(map(str, generations(storage)))
        raise Refusal(
            f"a generation of a dataset is one that is kept; {storage.place()} has no {number}; it has {kept or 'none'}"
        )
    return manifest


def report_key(storage: Storage, manifest: Mapping[str, Any]) -> str:
    """The key of the report of a generation, by whether it is the newest."""
    newest, number = read_manifest(storage), generation_of(manifest)
    return REPORT if newest is None or generation_of(newest) == number else earlier_report_key(number)


def keep_generation(storage: Storage, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a generation beside the newest one, unless it is there. Refuses another one of its number."""
    key, content = manifest_key(generation_of(manifest)), as_json(dict(manifest))
    if not storage.put_if_absent(key, content) and storage.get(key) != content:
        raise Refusal(
            f"a generation is written once; another run has finished {storage.place(key)} meanwhile; run it again"
        )


def complete_commit(storage: Storage) -> None:
    """Make manifest.json a copy of the newest generation, if a run was killed between the two."""
    kept, newest = _with_manifests(storage), read_manifest(storage)
    if newest is not None and kept and kept[-1] > generation_of(newest):
        storage.put(MANIFEST, as_json(read_generation(storage, kept[-1])))


def named_parts(storage: Storage) -> set[str]:
    """The keys of the parts of all generations that are kept."""
    manifests = (read_generation(storage, number) for number in generations(storage))
    return {part.path for manifest in manifests for table in manifest["tables"] for part in parts_of(manifest, table)}


def discard_generations(storage: Storage, keep: int) -> list[int]:
    """Delete the manifests of all but the newest generations; returns which are gone. Their parts are leftovers of the work then."""
    kept = generations(storage)[-keep:]
    gone = [number for number in _with_manifests(storage) if number not in kept]
    for number in gone:
        storage.delete(manifest_key(number))
    return gone


def _with_manifests(storage: Storage) -> list[int]:
    """The generations that have a manifest of their own, the oldest first."""
    found = map(generation_in, storage.names(MANIFESTS) or ())
    return sorted(number for number in found if number is not None)
