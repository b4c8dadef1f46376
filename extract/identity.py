"""The identity of a run: its recipe, and the snapshot of the corpus that it was made from.

Two runs with the same identity write the same dataset. With the same recipe they measure the same way, possibly another
state of the corpus.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from attlas.extract.corpus import Corpus
from attlas.extract.corpus.options import MAX_DOCUMENT_BYTES
from attlas.extract.instrument import Instrument
from attlas.extract.options import RunOptions
from attlas.extract.software import software_version
from attlas.extract.store import Identity
from attlas.extract.tables import SCHEMA_VERSION, TABLES, columns_beyond_core
from attlas.extract.tables.ablations import TABLE as ABLATIONS

# options that do not change the dataset, or are represented by what they stand for
_NOT_IN_RECIPE = {
    "out",
    "corpus",
    "model",
    "digest_key",
    "device",
    "dtype",
    "engine",
    "seed",
    "blocks",
    "length",
    "depths",
    "ablate",
    "card",
    "max_document_bytes",
}


def identity_of(options: RunOptions, instrument: Instrument, corpus: Corpus, *, batch_tokens: int) -> Identity:
    """The identity of a run that is about to be planned."""
    snapshot = {"name": corpus.name, "files": dict(corpus.files)}
    return Identity(recipe_of(options, instrument, batch_tokens=batch_tokens), snapshot)


def recipe_of(options: RunOptions, instrument: Instrument, *, batch_tokens: int) -> dict[str, Any]:
    """Everything besides the corpus that decides what is written: model, tokenizer, settings, tables, versions."""
    encoder, generation = instrument.encoder, options.generation
    of_corpus = {} if generation is None else generation.recipe
    return (
        of_corpus
        | _own_statistics(instrument)
        | _ablate(options, instrument)
        | _max_document_bytes(options)
        | {f.name: getattr(options, f.name) for f in fields(options) if f.name not in _NOT_IN_RECIPE}
        | {
            "schema_version": SCHEMA_VERSION,
            "attlas": software_version("attlas"),
            "model": encoder.name,
            "revision": encoder.revision,
            **instrument.digests,
            "statistics": columns_beyond_core(TABLES.values(), instrument.columns),
            "max_length": instrument.max_length,
            "batch_tokens": batch_tokens,
            "device": encoder.device.type,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "engine": instrument.engine.name,
            "digest_keyed": options.digest_key is not None,
        }
    )


def _ablate(options: RunOptions, instrument: Instrument) -> dict[str, str]:
    """What ablations leave out, and how, unless it is the default."""
    text = options.ablation.text if ABLATIONS.name in instrument.columns else ""
    return {"ablate": text} if text else {}


def _max_document_bytes(options: RunOptions) -> dict[str, int]:
    """From what size on documents are dropped, unless it is the default."""
    chosen = options.max_document_bytes
    return {} if chosen == MAX_DOCUMENT_BYTES else {"max_document_bytes": chosen}


def _own_statistics(instrument: Instrument) -> dict[str, Any]:
    """The files with statistics of the user's own, and their SHA-256."""
    origins = {column.origin for chosen in instrument.columns.values() for column in chosen if column.origin}
    return {"own_statistics": sorted(origins)} if origins else {}
