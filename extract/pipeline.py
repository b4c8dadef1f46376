"""A run: prepare it, measure its shards in any order and by anyone, finish it.

Each step can be killed and called again; a shard is done when its record is there. Shards may be measured by several
threads: they take turns at the model, so that one shard is in it while another one is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from attlas.extract.corpus import Corpus, open_corpus
from attlas.extract.dictionary import dataset_card
from attlas.extract.engines import choose
from attlas.extract.errors import Refusal
from attlas.extract.job import Job, Progress, RunOptions
from attlas.extract.memory import keep_freed_memory, tokens_that_fit
from attlas.extract.model.encoder import Encoder, load_encoder
from attlas.extract.model.folder import check_model_name
from attlas.extract.model.images import processor_digest
from attlas.extract.model.measured_model import MeasuredModel, examine_image_model, examine_text_model
from attlas.extract.resuming import begin_or_resume, read_key
from attlas.extract.store import Location, ShardRecord, Store
from attlas.extract.tables import SCHEMA_VERSION, recorded_tables
from attlas.extract.writing import manifest_of, planned_tables, write_shard

if TYPE_CHECKING:
    import torch


# most tokens of a batch, padding included, where the user names no number: more keep a machine no busier, and put
# sequences together that differ more in length
BATCH_TOKENS = 4096
CUDA_BATCH_TOKENS = 16_384
# one shard in the model and one on its way to the disk: if writing is slow, the model waits and memory stays
SHARDS_UNDER_WAY = 2


def run(*, tables: Collection[str] = (), progress: Progress | None = None, **options: Any) -> Location:
    """Measure a corpus with a model in this process: the dataset that `attlas run` writes, without Prefect or a report.

    options: the fields of RunOptions, such as model, corpus and out. tables: those on request that are written besides the
    ones of every run. progress(stage, done, total): told while the model is loaded and the corpus planned. Gives the
    dataset's place. A run that was interrupted goes on where it stopped. Raises Refusal for what can't be measured.
    """
    job = prepare(RunOptions(**options), tables=tables, progress=progress)
    measure_shards(job, job.remaining)
    return finish(job)


def check(options: RunOptions) -> Corpus:
    """Refuse what can be refused before anything is loaded; gives the opened corpus."""
    for name, lowest in (("max_length", 1), ("stride", 0), ("limit", 1), ("shard_sequences", 1), ("batch_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise Refusal(f"{name} must be at least {lowest}; got {value}; give a larger number")
    check_model_name(options.model, trust_remote_code=options.trust_remote_code)
    read_key(options.digest_key)
    store = Store.at(options.out)
    store.refuse_foreign()
    store.refuse_busy()
    corpus = open_corpus(
        options.corpus,
        text_column=options.text_column,
        unit=options.unit,
        delimiter=options.delimiter,
        encoding=options.encoding,
        limit=options.limit,
        strict=options.strict,
    )
    if corpus.has_images:
        _refuse_options_of_texts(options)
    return corpus


def _refuse_options_of_texts(options: RunOptions) -> None:
    asked = {
        "--max-length": options.max_length is not None,
        "--stride": options.stride > 0,
        f"--tokens {options.tokens}": options.tokens in ("ids", "text"),
        "--stacks all": options.stacks == "all",
    }
    given = [name for name, is_given in asked.items() if is_given]
    if given:
        raise Refusal(
            f"an image is one sequence, without ids, text or tokens for a decoder; {', '.join(given)} can't be asked of "
            f"{options.corpus}; leave it out"
        )


def prepare(options: RunOptions, *, tables: Collection[str] = (), progress: Progress | None = None) -> Job:
    """Check the options, load and examine the model, take the output folder, plan the shards (or read the plan).

    `tables`: those on request that are written besides the ones of every run.
    """
    say = progress or (lambda stage, done, total: None)
    recorded = recorded_tables(tables)
    corpus = check(options)
    say("model", 0, None)
    encoder = load_encoder(
        options.model,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        modality="images" if corpus.has_images else "texts",
    )
    engine = choose(options.engine, device=encoder.device.type)
    if not engine.is_ready():
        say("engine", 0, None)
    engine.make_ready()
    measured_model = _measured_model(options, encoder, corpus)
    max_length = (
        _max_length(options, encoder) if measured_model.images is None else measured_model.images.preprocessing.tokens
    )
    keep_freed_memory(longest=max_length)
    say("model", 1, 1)
    store = Store.at(options.out)
    batch_tokens = options.batch_tokens or _batch_tokens(store, measured_model, encoder.device, max_length)
    run = _run(options, encoder, corpus, engine.name, max_length, batch_tokens) | {
        "tables": [table.name for table in recorded]
    }
    return begin_or_resume(Job(options, encoder, engine, store, run, measured_model, recorded), corpus, max_length, say)


def measure_shards(
    job: Job, shards: Iterable[int], *, progress: Callable[[int, int], None] | None = None
) -> list[ShardRecord]:
    """Measure shards, each being written while the next one is in the model; gives their records in the same order.

    The first error is raised once the shard beside it has ended too; a shard without a record is not done.
    """
    with ThreadPoolExecutor(SHARDS_UNDER_WAY) as threads:
        return list(threads.map(lambda shard: measure_shard(job, shard, progress=progress), shards))


def measure_shard(job: Job, shard: int, *, progress: Callable[[int, int], None] | None = None) -> ShardRecord:
    """Measure one shard and write its parts and its record; a shard that has one is left as it is.

    `progress` is told the tokens of each batch as it is done, and the documents that are done with it.
    """
    done = job.store.read_record(shard)
    if done is not None:
        return done
    from attlas.extract.shard import Instrument, measure_sequences

    assert job.plan is not None, "a finished dataset has no shard to measure"
    sequences, documents = job.planned(shard)
    measured_model = job.measured_model
    encoder = replace(job.encoder, model=measured_model.model)
    batch_tokens = job.run["batch_tokens"]
    instrument = Instrument(
        encoder,
        measured_model.layout,
        job.engine,
        batch_tokens,
        job.token_classes,
        inputs=measured_model.inputs,
        images=measured_model.images,
        special=measured_model.special,
        padding_matters=measured_model.padding_matters,
        tables=job.tables,
    )
    tables, facts = measure_sequences(instrument, sequences, shard=shard, progress=progress)
    tables |= planned_tables(job, sequences, documents)
    return write_shard(job.store, shard, tables, facts, spool=job.plan.spools[shard])


def finish(job: Job) -> Location:
    """Write card and manifest once every shard is done; gives where the dataset is."""
    if job.plan is None:
        return job.options.out
    records = [job.store.read_record(s) for s in range(job.plan.shards)]
    missing = [str(n) for n, r in enumerate(records) if r is None]
    if missing:
        raise RuntimeError(
            f"a dataset is finished when all its shards are; missing: {', '.join(missing)}; run it again"
        )
    manifest = manifest_of(job, job.plan, [r for r in records if r is not None])
    job.store.finish(manifest, dataset_card(manifest))
    if job.lock is not None:
        job.lock.release()
    return job.options.out


def _max_length(options: RunOptions, encoder: Encoder) -> int:
    """The window's length: given, or the model's own."""
    limit = encoder.max_positions
    asked = options.max_length
    if asked is None:
        return encoder.default_length
    if limit is not None and asked > limit:
        raise Refusal(
            f"max_length {asked} is beyond this model's {limit} positions; use --max-length {limit} or a model with more"
        )
    return asked


def _measured_model(options: RunOptions, encoder: Encoder, corpus: Corpus) -> MeasuredModel:
    """What of the model is measured, and what it is given."""
    if corpus.folder is None:
        return examine_text_model(encoder.model, encoder.tokenizer, stacks=options.stacks, device=encoder.device)
    return examine_image_model(
        encoder.model, encoder.processor, corpus.folder, device=encoder.device, dtype=encoder.dtype
    )


def _batch_tokens(store: Store, measured_model: MeasuredModel, device: torch.device, max_length: int) -> int:
    """The batch's size where none was given: as the run was begun, whatever memory is free today; else what fits."""
    begun = (store.held_run() or {}).get("batch_tokens")
    if begun is not None:
        return begun
    most = CUDA_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS
    fitting = tokens_that_fit(measured_model.model, measured_model.layout, device, longest=max_length)
    return max(max_length, min(most, fitting or most))


def _reader_digest(encoder: Encoder) -> dict[str, str]:
    """Of what makes the model's inputs out of documents."""
    if encoder.processor is not None:
        return {"processor_digest": processor_digest(encoder.processor)}
    return {"tokenizer_digest": encoder.tokenizer_digest()}


def _run(
    options: RunOptions, encoder: Encoder, corpus: Corpus, engine: str, max_length: int, batch_tokens: int
) -> dict[str, Any]:
    """What makes two runs the same run: their options and what these stand for."""
    left_out = {"out", "digest_key", "device", "dtype", "engine", "model", "corpus"}
    return {f.name: getattr(options, f.name) for f in fields(options) if f.name not in left_out} | {
        "schema_version": SCHEMA_VERSION,
        "attlas": version("attlas"),
        "model": encoder.name,
        "revision": encoder.revision,
        "weights_digest": encoder.weights_digest(),
        **_reader_digest(encoder),
        "corpus": corpus.name,
        "corpus_files": [list(f) for f in corpus.files],
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "device": encoder.device.type,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "engine": engine,
        "digest_keyed": options.digest_key is not None,
    }
