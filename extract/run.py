"""A run: a driver plans and finishes it; workers measure its shards, in any order, in any process, on any machine.

    plan_run      checks the options, loads the model, claims the output, writes the plan      driver, once
                  (and the means that ablations set parts to, if they are asked for)
    open_worker   loads the model, compares it with the planned one                            every worker
    measure_shard measures one shard, writes its parts and then its record                     any worker
    finish        writes card and manifest when every shard has its record                     driver; needs no model

Each step can be killed and called again. A shard with a record is done. What calls `measure_shard` — a loop, threads, Prefect,
a cluster — changes no byte of the dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from attlas.extract.batching import SHARDS_AT_ONCE
from attlas.extract.capture.runtime.ablation import Ablating
from attlas.extract.card import Card
from attlas.extract.corpus import Corpus, image_folder, open_corpus_of
from attlas.extract.dictionary import dataset_card
from attlas.extract.errors import Damaged, Refusal, Unfinished, shortlist
from attlas.extract.identity import identity_of, recipe_of
from attlas.extract.instrument import Instrument, open_instrument
from attlas.extract.manifest import complete_manifest, draft_manifest, with_concluded
from attlas.extract.model.id_documents import id_documents
from attlas.extract.options import Progress, RunOptions, check_options, read_key
from attlas.extract.plan import (
    KnownCorpus,
    Plan,
    StoredMeans,
    clear_plan,
    load_means,
    load_plan,
    make_id_plan,
    make_image_plan,
    make_plan,
    planned_tables,
    read_plan,
    read_shard,
    write_means,
)
from attlas.extract.store import (
    CARD,
    Identity,
    Location,
    Lock,
    ShardRecord,
    Storage,
    Store,
    generation_of,
    parts_of,
    read_part,
    recipe_differences,
)
from attlas.extract.store.layout import MEANS
from attlas.extract.tables import TABLES, concluded_tables, derived_tables
from attlas.extract.tables.ablations import TABLE as ABLATIONS

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


def run(*, progress: Progress | None = None, **options: Any) -> Location:
    """Measure a corpus with a model in this process: the dataset that `attlas run` writes, without Prefect or a report.

    options: the fields of RunOptions, such as model, corpus, out and statistics.
    progress(stage, done, total): called while the model is loaded and the corpus planned. Returns the dataset's location. An
    interrupted run continues where it stopped. Raises Refusal for what can't be measured.
    """
    planned = plan_run(RunOptions(**options), progress=progress)
    if not planned.is_complete:
        measure_shards(planned.open_worker(), planned.remaining)
    return finish(planned.options.out, card=planned.options.card)


@dataclass(frozen=True)
class PlannedRun:
    """A run whose output is claimed and whose shards are planned. Others can't write to the output while it is locked."""

    options: RunOptions
    store: Store
    identity: Identity
    instrument: Instrument
    plan: Plan | None = None  # None: the dataset is finished
    lock: Lock | None = None  # until the run is finished, or this object is deleted

    @property
    def is_complete(self) -> bool:
        return self.plan is None

    @property
    def remaining(self) -> list[int]:
        """The shards without a record."""
        return [] if self.plan is None else self.store.unmeasured(self.plan.to_measure)

    def open_worker(self) -> Worker:
        """A worker in this process, which uses the model that is already loaded."""
        return open_worker(self.options, instrument=self.instrument)


@dataclass(frozen=True)
class Worker:
    """Everything needed to measure any shard of a planned run."""

    store: Store
    plan: Plan
    instrument: Instrument
    batch_tokens: int
    sample: int
    tokens: str  # what the dataset keeps of the tokens themselves
    ablating: Ablating
    means: StoredMeans | None = None  # of what ablations set parts to, if not to zero

    @classmethod
    def of(
        cls,
        store: Store,
        plan: Plan,
        instrument: Instrument,
        options: RunOptions,
        *,
        batch_tokens: int,
        means: StoredMeans | None,
    ) -> Worker:
        """A worker with the options of its run."""
        ablating = Ablating(options.ablation.parts, None if means is None else means.vectors)
        return cls(store, plan, instrument, batch_tokens, options.sample, options.tokens, ablating, means)

    def rows_of(self, shard: int) -> tuple[pa.Table, pa.Table]:
        """The sequences and documents of a shard, as planned. Raises Damaged."""
        return read_shard(self.store.storage, shard, digest=self.plan.spool_of(shard))

    def source_of(self, shard: int) -> str:
        """The SHA-256 of what a shard is measured from."""
        return source_of(self.plan, self.means, shard)


def source_of(plan: Plan, means: StoredMeans | None, shard: int) -> str:
    """The SHA-256 of what a shard is measured from: its spool, and means if there are any."""
    spool = plan.spool_of(shard)
    return spool if means is None else means.source_of(spool)


def named_by(plan: Plan, source: str) -> str:
    """What the names of a shard's parts say of its source: nothing in the first generation of a dataset."""
    return "" if plan.generation.number == 1 else source


def plan_run(
    options: RunOptions, *, instrument: Instrument | None = None, progress: Progress | None = None
) -> PlannedRun:
    """Check the options, load and examine the model, claim the output, and plan the shards or read their plan.

    instrument: the model of these options if it is loaded already. Raises Refusal.
    """
    report = progress or _no_progress
    corpus = check_options(options, is_loaded=instrument is not None)
    if instrument is None:
        instrument = open_instrument(options, images=corpus.folder, progress=report)
    store = Store.at(options.out)
    batch_tokens = options.batch_tokens or _begun_batch_tokens(store) or instrument.default_batch_tokens
    identity = identity_of(options, instrument, corpus, batch_tokens=batch_tokens)
    return _claim_and_plan(PlannedRun(options, store, identity, instrument), corpus, report)


def open_worker(
    options: RunOptions, *, instrument: Instrument | None = None, progress: Progress | None = None
) -> Worker:
    """Load the model of a planned run. Neither claims nor plans, and does not read the corpus.

    The weights that this process has loaded are hashed and compared with the plan's: a checkpoint that was replaced since would go unnoticed.
    options: those of the driver. instrument: the model of these options if it is loaded already. Raises Refusal if no run
    is planned at `out`, or if anything of the model or the settings differs from the plan.
    """
    store = Store.at(options.out)
    identity, plan = store.held_identity(), load_plan(store.storage)
    if identity is None or plan is None:
        raise Refusal(
            f"a worker measures shards of a planned run; {store.storage.place()} holds none; start the run itself first"
        )
    if instrument is None:
        images = image_folder(options.corpus) if "images" in store.read_draft() else None
        instrument = open_instrument(options, images=images, progress=progress or _no_progress)
    batch_tokens = identity.recipe["batch_tokens"]
    differences = recipe_differences(identity, recipe_of(options, instrument, batch_tokens=batch_tokens))
    if differences:
        raise Refusal(
            f"a worker measures as planned; {store.storage.place()} was planned otherwise ({'; '.join(differences)}); "
            "give it the same model, options and software"
        )
    means = None
    if _has_means(options, instrument):
        means = load_means(store.storage, plan)
        if means is None:
            raise Damaged(
                f"{store.storage.place(MEANS)} is missing or not as it was written; the same command makes it again"
            )
    return Worker.of(store, plan, instrument, options, batch_tokens=batch_tokens, means=means)


def measure_shards(
    worker: Worker, shards: Iterable[int], *, progress: Callable[[int, int], None] | None = None
) -> list[ShardRecord]:
    """Measure shards in two threads, so that one is in the model while another is written; returns their records in order.

    The first error is raised after the other shard has ended. A shard without a record is not done.
    """
    return two_at_a_time(lambda shard: measure_shard(worker, shard, progress=progress), shards)


def two_at_a_time(measure: Callable[[int], T], shards: Iterable[int]) -> list[T]:
    """Call a function for each shard as `measure_shards` does, in copies of the caller's context; returns its results in order."""
    numbers = list(shards)
    contexts = [copy_context() for _ in numbers]
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as threads:
        return list(threads.map(lambda context, shard: context.run(measure, shard), contexts, numbers))


def measure_shard(worker: Worker, shard: int, *, progress: Callable[[int, int], None] | None = None) -> ShardRecord:
    """Measure a shard, write its parts and then its record; a shard with a record stays as it is.

    progress(tokens, documents): called after each batch with its tokens and the number of documents that are done with it.
    Threads take turns at the model.
    """
    record = worker.store.read_record(shard)
    if record is not None:
        return record
    tables, facts = rows_measured(worker, shard, progress=progress)
    if not worker.store.has_draft:  # a run that made its output again would write a part of a dataset
        raise Damaged(f"{worker.store.storage.place()} has gone, or its plan; the same command plans again")
    source = worker.source_of(shard)
    named = named_by(worker.plan, source)
    parts = {name: worker.store.write_part(name, shard, table, source=named) for name, table in sorted(tables.items())}
    record = ShardRecord(shard, parts, facts, source)
    worker.store.write_record(record)
    return record


def rows_measured(
    worker: Worker, shard: int, *, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """The rows of all tables of a shard, and the counts of its record. progress: as of `measure_shard`."""
    from attlas.extract.shard import measure_sequences

    sequences, documents = worker.rows_of(shard)
    planned = planned_tables(sequences, documents, tokens=worker.tokens)
    # a shard may lie within one document; a part without rows would stop `datasets`
    tables = {name: rows for name, rows in planned.items() if rows.num_rows}
    facts = {"positions": 0, "padded": 0}
    if sequences.num_rows:  # a later generation may have nothing but documents without tokens, or that are gone
        measured, facts = measure_sequences(
            worker.instrument,
            sequences,
            shard=shard,
            batch_tokens=worker.batch_tokens,
            sample=worker.sample,
            ablating=worker.ablating,
            progress=progress,
        )
        tables |= measured | derived_tables(planned | measured, worker.instrument.columns, shard=shard)
    if worker.plan.generation.number > 1:  # what only the model decides is in the first one
        tables = {name: rows for name, rows in tables.items() if TABLES[name].kind != "static"}
    return tables, facts


def finish(out: Location, *, card: Card | None = None, checking: Progress | None = None) -> Location:
    """Write card and manifest once every shard has its record. Returns `out`. Raises Unfinished.

    card: what the user says of the dataset. Of a finished dataset only the card is written again, if it is given.
    checking: compare every part with its checksum first, and call this after each shard.
    """
    store = Store.at(out)
    finished = store.manifest
    if finished is None or store.is_growing:
        plan = load_plan(store.storage)
        if plan is None:
            raise Damaged(f"{store.storage.place()} holds no plan; the same command plans again")
        records = _all_records(store, plan.to_measure, checking)
        manifest = complete_manifest(store.read_draft(), records, finished)
        concluded, source = rows_concluded(store.storage, manifest)
        parts = {name: store.write_part(name, 0, rows, source=source) for name, rows in concluded.items()}
        manifest = with_concluded(manifest, parts)
        store.finish(manifest, dataset_card(manifest, card))
    else:
        if card is not None:
            store.storage.put(CARD, dataset_card(finished, card).encode())
        if store.has_work:
            store.clear_work()
    store.unlock()
    return out


def _all_records(store: Store, shards: Sequence[int], checking: Progress | None) -> list[ShardRecord]:
    """The records of shards. Raises Unfinished if some are missing, or, where parts are checked, damaged."""
    records: list[ShardRecord] = []
    missing: list[int] = []
    for number, shard in enumerate(shards):
        record = store.read_record(shard)
        if record is None or (checking is not None and not store.is_intact(record)):
            missing.append(shard)
        else:
            records.append(record)
        if checking is not None:
            checking("check", number + 1, len(shards))
    if missing:
        raise Unfinished(
            f"a dataset is finished when all its shards are measured; missing or damaged of {len(shards)}: {_ranges(missing)}; run it again"
        )
    return records


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as people write them: 0, 3–7, 9."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != n + 1]
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True))


def rows_concluded(storage: Storage, manifest: Mapping[str, Any]) -> tuple[dict[str, pa.Table], str]:
    """The rows of the tables that are made of all shards, and what the names of their parts say of their source."""
    made_of = hashlib.sha256()

    def rows_of(table: str) -> Iterator[pa.Table]:
        for part in parts_of(manifest, table):
            made_of.update(part.sha256.encode())
            yield read_part(storage, part)

    concluded = concluded_tables(rows_of)
    return concluded, "" if generation_of(manifest) == 1 else made_of.hexdigest()


def _claim_and_plan(planned: PlannedRun, corpus: Corpus, progress: Progress) -> PlannedRun:
    """The run with its output claimed and locked and its shards planned; without a plan if the dataset is finished."""
    store, existed = planned.store, planned.store.exists
    store.refuse_another(planned.identity)
    if store.is_finished_for(planned.identity):
        return planned
    lock = store.lock()
    try:
        was_growing = store.is_growing
        is_new = store.claim(planned.identity)
        manifest = store.manifest
        if manifest is not None and store.is_of_corpus(planned.identity):
            # nothing to measure, only what an earlier run has left
            card = planned.options.card
            store.clear_work()
            finish(planned.options.out, card=(card or Card()) if was_growing else card)
            return planned
        if manifest is not None:
            store.storage.put(CARD, dataset_card(manifest, planned.options.card, is_growing=True).encode())
        try:
            plan = _read_or_make_plan(planned, corpus, progress)
        except Refusal:
            if is_new:
                store.clear_work()
            raise
        store.write_draft(draft_manifest(planned.identity, planned.instrument, plan))
    except BaseException:
        lock.release()
        if not existed:
            store.storage.remove_if_empty()
        raise
    return replace(planned, plan=plan, lock=lock)


def _read_or_make_plan(planned: PlannedRun, corpus: Corpus, progress: Progress) -> Plan:
    """The plan, with its means; what an earlier run has left is deleted unless it is intact and belongs to them."""
    store = planned.store
    store.clear_obstacles()
    was_begun = store.has_records
    plan = read_plan(store.storage)
    if plan is None:
        plan = make_plan_of(planned, corpus, _known_corpus(planned, corpus), progress)
        _refuse_changed(planned, corpus)
    progress("plan", plan.documents, plan.documents)
    means = read_or_make_means(planned, plan, progress)
    checking = progress if was_begun else _no_progress
    store.discard_leftovers(sound_records(store, plan, means, plan.to_measure, checking))
    return plan


def _refuse_changed(planned: PlannedRun, corpus: Corpus) -> None:
    """Discard a plan and raise Refusal if a file of the corpus was removed or changed in size while it was made.

    One that was added meanwhile is in the next generation.
    """
    if not corpus.files:  # made of token ids, or read from the hub
        return
    before, now = dict(corpus.files), dict(open_corpus_of(planned.options.corpus, planned.options).files)
    changed = sorted(name for name in before if before[name] != now.get(name))
    if changed:
        clear_plan(planned.store.storage)
        raise Refusal(
            f"a corpus stays as it is while it is read; {shortlist(changed)} of {planned.options.corpus} changed meanwhile; run it again"
        )


def sound_records(
    store: Store, plan: Plan, means: StoredMeans | None, shards: Sequence[int], progress: Progress
) -> list[ShardRecord]:
    """The records of shards that were measured from what is planned and whose parts are intact; the others are deleted."""
    found = []
    for number, shard in enumerate(shards):
        source = source_of(plan, means, shard)
        found.append(store.discard_damaged(shard, spool=source, source=named_by(plan, source)))
        progress("check", number + 1, len(shards))
    return [record for record in found if record is not None]


def make_plan_of(planned: PlannedRun, corpus: Corpus, known: KnownCorpus | None, progress: Progress) -> Plan:
    """Read the corpus and write the plan and its spools. known: the dataset of an earlier state of the corpus."""
    options, instrument = planned.options, planned.instrument
    common: dict[str, Any] = {
        "storage": planned.store.storage,
        "shard_sequences": options.shard_sequences,
        "digest_key": read_key(options.digest_key),
        "progress": lambda documents, _: progress("plan", documents, None),
    }
    images = instrument.measured_model.images
    if images is not None:
        return make_image_plan(corpus, images.preprocessing, strict=options.strict, known=known, **common)
    tokenizer, keep_text = instrument.encoder.tokenizer, options.tokens == "text"
    if corpus.generation is not None:
        documents = id_documents(corpus.generation, tokenizer)
        return make_id_plan(documents, tokenizer, limit=corpus.limit, keep_text=keep_text, **common)
    return make_plan(
        corpus,
        tokenizer,
        max_length=instrument.max_length,
        stride=options.stride,
        keep_text=keep_text,
        strict=options.strict,
        known=known,
        **common,
    )


def _known_corpus(planned: PlannedRun, corpus: Corpus) -> KnownCorpus | None:
    """The dataset of an earlier state of the corpus, which the run goes on with; None if there is none."""
    store, options = planned.store, planned.options
    manifest = store.manifest
    if manifest is None:
        return None
    if _has_means(options, planned.instrument):
        raise Refusal(
            f"means over a corpus change when it does, and with them every row of ablations; {store.storage.place()} is of another "
            "state of its corpus; give --out another folder"
        )
    return KnownCorpus(store.storage, manifest, key=read_key(options.digest_key), sizes=dict(corpus.files))


def _has_means(options: RunOptions, instrument: Instrument) -> bool:
    """Whether ablations set parts to their means."""
    return options.ablation.is_mean and ABLATIONS.name in instrument.columns


def read_or_make_means(planned: PlannedRun, plan: Plan, progress: Progress) -> StoredMeans | None:
    """The means over the sample of the plan, from the driver, so that every worker has the same; None if ablations use none."""
    if not _has_means(planned.options, planned.instrument):
        return None
    storage, options = planned.store.storage, planned.options
    means = load_means(storage, plan)
    if means is not None:
        return means
    from attlas.extract.sample_means import means_of_sample

    last = plan.sequences - (plan.shards - 1) * plan.shard_sequences
    total = (plan.shards - 1) * min(options.sample, plan.shard_sequences) + min(options.sample, last)
    progress("means", 0, total)
    vectors = means_of_sample(
        planned.instrument,
        (read_shard(storage, shard, digest=plan.spool_of(shard))[0] for shard in plan.to_measure),
        sample=options.sample,
        kinds=options.ablation.parts,
        progress=lambda done: progress("means", done, total),
    )
    return write_means(storage, plan, vectors)


def _no_progress(_stage: str, _done: int, _total: int | None) -> None:
    """Ignores progress."""


def _begun_batch_tokens(store: Store) -> int | None:
    """The batch size of the run in the store: it stays the same, whatever memory is free today."""
    identity = store.held_identity()
    return None if identity is None else identity.recipe.get("batch_tokens")
