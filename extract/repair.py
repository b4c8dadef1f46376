"""Measure damaged shards of a finished dataset again, and put their parts back byte for byte.

The manifest says what every part was, and stays as it is: what is measured again takes the place of a damaged part only if it has
the part's SHA-256. Killed at any moment, the same call goes on with what is still damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from attlas.extract.corpus import Corpus
from attlas.extract.errors import Damaged, Refusal, shortlist
from attlas.extract.identity import identity_of
from attlas.extract.instrument import Instrument, open_instrument
from attlas.extract.options import Progress, RunOptions, check_options, read_key
from attlas.extract.plan import KnownCorpus, Plan
from attlas.extract.run import (
    PlannedRun,
    Worker,
    make_plan_of,
    read_or_make_means,
    rows_concluded,
    rows_measured,
    two_at_a_time,
)
from attlas.extract.software import software_version
from attlas.extract.store import (
    Part,
    Storage,
    Store,
    generation_of,
    is_as_written,
    parts_of,
    restore_part,
    shard_of,
)
from attlas.extract.tables import TABLES

if TYPE_CHECKING:
    import pyarrow as pa

# calls a function for each shard, which gives the keys of parts that did not become what they were
Measure = Callable[[Worker, Sequence[int], Callable[..., list[str]]], Iterable[list[str]]]


@dataclass(frozen=True)
class Repaired:
    """What was damaged. parts: how many the dataset has, sound ones too."""

    shards: list[int]  # that were measured again
    keys: list[str]  # of the parts that were put back
    parts: int


def _measure(_worker: Worker, shards: Sequence[int], measure: Callable[..., list[str]]) -> Iterable[list[str]]:
    return two_at_a_time(measure, shards)


def repair(
    options: RunOptions,
    *,
    instrument: Instrument | None = None,
    progress: Progress | None = None,
    measure: Measure = _measure,
) -> Repaired:
    """Compare every part of the newest generation of a dataset with its checksum, and make the damaged ones again.

    options: those of the run that made the dataset, whose corpus must be as it was then. instrument: the model, if it is loaded already;
    it is not needed where nothing is damaged. progress: as of `run`. Raises Refusal, and Damaged if a part would not become what it was.
    """
    report, store = progress or (lambda *_: None), Store.at(options.out)
    _refuse_unfinished(store)
    lock = store.lock()
    try:
        _refuse_unfinished(store)
        manifest = store.manifest
        assert manifest is not None, "the dataset is finished"
        damage = _find_damage(store.storage, manifest, report)
        if damage.shards:
            worker = _open_worker(options, damage, instrument, report)
            others = measure(worker, damage.shards, partial(_measure_again, worker, damage))
            damage.refuse_others(list(chain.from_iterable(others)))
        damage.refuse_others(_conclude_again(damage))
        store.clear_work()
    finally:
        lock.release()
    return Repaired(damage.shards, [part.path for _, part in damage.parts], damage.total)


@dataclass(frozen=True)
class _Damage:
    """The damaged parts of a dataset, with their tables."""

    storage: Storage
    manifest: Mapping[str, Any]
    parts: Sequence[tuple[str, Part]]
    total: int  # of the dataset

    @property
    def shards(self) -> list[int]:
        """Those to measure again. A table that is made of all shards needs none."""
        return sorted({_shard_of(part) for table, part in self.parts if not _is_concluded(table)})

    def of_shard(self, shard: int) -> list[tuple[str, Part]]:
        return [(table, p) for table, p in self.parts if not _is_concluded(table) and _shard_of(p) == shard]

    def concluded(self) -> list[tuple[str, Part]]:
        return [(table, part) for table, part in self.parts if _is_concluded(table)]

    def put_back(self, parts: Sequence[tuple[str, Part]], rows: Mapping[str, pa.Table]) -> list[str]:
        """Write damaged parts again; returns the keys of those that would not become what they were."""
        return [
            part.path
            for table, part in parts
            if table not in rows or not restore_part(self.storage, table, part, rows[table])
        ]

    def refuse_others(self, others: Sequence[str]) -> None:
        """Raise Damaged if there are parts that would not become what they were."""
        if not others:
            return
        then = self.manifest.get("software", {})
        now = {name: software_version(name) for name in then if name != "python"}
        changed = [f"{name} {then[name]} then, {version} now" for name, version in now.items() if version != then[name]]
        why = (
            "; ".join(changed) or "the software is the same, so the processor is another one, or a file has been edited"
        )
        raise Damaged(
            f"{shortlist(others)}, measured again, would not have the bytes that the manifest states ({why}) and stays damaged; "
            "repair where it was measured, or measure again into another folder"
        )


def _refuse_unfinished(store: Store) -> None:
    if not store.is_finished:
        held = "an unfinished run" if store.has_work else "none"
        raise Refusal(
            f"what is repaired is a finished dataset; {store.storage.place()} holds {held}; attlas run finishes one, and measures "
            "again what is damaged"
        )


def _find_damage(storage: Storage, manifest: Mapping[str, Any], progress: Progress) -> _Damage:
    parts = [(table, part) for table in manifest["tables"] for part in parts_of(manifest, table)]
    damaged: list[tuple[str, Part]] = []
    for number, (table, part) in enumerate(parts):
        if not is_as_written(storage, part):
            damaged.append((table, part))
        progress("check", number + 1, len(parts))
    for _, part in damaged:
        storage.refuse_obstacle(part.path)
    return _Damage(storage, manifest, damaged, len(parts))


def _open_worker(options: RunOptions, damage: _Damage, instrument: Instrument | None, progress: Progress) -> Worker:
    """A worker for the shards to measure again; their plan is made in the work area."""
    _refuse_lost_documents(damage)
    corpus, store = check_options(options, is_loaded=instrument is not None), Store(damage.storage)
    if instrument is None:
        instrument = open_instrument(options, images=corpus.folder, progress=progress)
    batch_tokens = options.batch_tokens or damage.manifest["run"]["batch_tokens"]
    identity = identity_of(options, instrument, corpus, batch_tokens=batch_tokens)
    store.refuse_another(identity)
    planned = PlannedRun(options, store, identity, instrument)
    plan = _plan_again(planned, corpus, damage, progress)
    means = read_or_make_means(planned, plan, progress)
    return Worker.of(store, plan, instrument, options, batch_tokens=batch_tokens, means=means)


def _measure_again(
    worker: Worker, damage: _Damage, shard: int, *, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    rows, _ = rows_measured(worker, shard, progress=progress)
    return damage.put_back(damage.of_shard(shard), rows)


def _conclude_again(damage: _Damage) -> list[str]:
    parts = damage.concluded()
    return damage.put_back(parts, rows_concluded(damage.storage, damage.manifest)[0] if parts else {})


def _plan_again(planned: PlannedRun, corpus: Corpus, damage: _Damage, progress: Progress) -> Plan:
    """The plan of the dataset, or of its damaged shards if it has grown."""
    storage, manifest, known = damage.storage, damage.manifest, None
    if generation_of(manifest) > 1:
        key = read_key(planned.options.digest_key)
        known = KnownCorpus(storage, manifest, key=key, sizes=dict(corpus.files), again=damage.shards)
    plan = make_plan_of(planned, corpus, known, progress)
    if plan.corpus_digest != manifest["corpus"].get("digest"):
        raise Refusal(
            f"what is measured again is the corpus as it was; {planned.options.corpus} has other documents now than "
            f"{storage.place()}, or the --digest-key is another one; give it the same"
        )
    # the first generation has the tables of the model's parameters, which may be among the damaged ones
    return replace(plan, generation=replace(plan.generation, number=1))


def _refuse_lost_documents(damage: _Damage) -> None:
    """Raise Refusal if a dataset that has grown has lost what only it knows: which documents its shards have."""
    lost = [part.path for table, part in damage.parts if table in ("documents", "sequences")]
    if lost and generation_of(damage.manifest) > 1:
        raise Refusal(
            f"which documents a shard has is known only from the shard once a dataset has grown; {shortlist(lost)} of "
            f"{damage.storage.place()} is damaged; restore it from a copy, or measure again into another folder"
        )


def _is_concluded(table: str) -> bool:
    return TABLES[table].conclude is not None


def _shard_of(part: Part) -> int:
    shard = shard_of(part.path)
    assert shard is not None, "it is the part of a shard"
    return shard
