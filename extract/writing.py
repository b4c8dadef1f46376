"""What a run leaves on disk: a shard's parts and its record, and at the end the manifest."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from attlas.extract.collector import left_to_reference
from attlas.extract.model.token_classes import class_sizes
from attlas.extract.store import Part, ShardRecord, Store
from attlas.extract.tables import SCHEMA_VERSION, TABLES, Table

if TYPE_CHECKING:
    from attlas.extract.capture.layout import Attention
    from attlas.extract.job import Job
    from attlas.extract.planning import Plan

_SOFTWARE = ("attlas", "torch", "transformers", "pyarrow", "numpy")
# what each mode of `tokens` keeps of the tokens themselves
_KEPT: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    "classes": frozenset(),
    "ids": frozenset({"token_ids"}),
    "text": frozenset({"token_ids", "text"}),
}


def planned_tables(job: Job, sequences: pa.Table, documents: pa.Table) -> dict[str, pa.Table]:
    """A shard's sequences and documents, as far as the dataset may tell of them."""
    planned, kept = {"sequences": sequences, "documents": documents}, _KEPT[job.options.tokens]
    return {name: _conformed(TABLES[name], rows, optional=kept) for name, rows in planned.items()}


def write_shard(
    store: Store, shard: int, tables: Mapping[str, pa.Table], facts: Mapping[str, Any], *, spool: str
) -> ShardRecord:
    """Write the parts of a shard and then its record: with that, it is done. `spool`: SHA-256 of what was measured."""
    parts = {name: store.write_part(name, shard, table) for name, table in sorted(tables.items())}
    record = ShardRecord(shard, parts, facts, spool)
    store.write_record(record)
    return record


def manifest_of(job: Job, plan: Plan, records: list[ShardRecord]) -> dict[str, Any]:
    """What was measured, with what, and every part of it."""
    padded, positions = (sum(r.facts[n] for r in records) for n in ("padded", "positions"))
    return {
        "schema_version": SCHEMA_VERSION,
        "run": dict(job.run),
        "model": _model_facts(job),
        **_reader_facts(job),
        "corpus": {
            "name": job.run["corpus"],
            "digest": plan.corpus_digest,
            "digest_keyed": job.run["digest_keyed"],
            "documents": plan.documents,
            "sequences": plan.sequences,
            "tokens": plan.tokens,
            "content_tokens": plan.content_tokens,
            "dropped": dict(Counter(plan.dropped)),
        },
        "software": {"python": platform.python_version()}
        | {name: version(name) for name in (*_SOFTWARE, *(("pillow",) if job.measured_model.images else ()))},
        "engine": job.engine.name,
        "by_reference": _left_to_reference(job),
        "device": job.run["device"],
        "dtype": job.run["dtype"],
        "shards": plan.shards,
        "padding_waste": padded / positions if positions else 0.0,
        "tables": {name: _table_facts(name, records) for name in TABLES if any(name in r.parts for r in records)},
    }


def _left_to_reference(job: Job) -> dict[str, list[str]]:
    images = job.measured_model.images
    has_grids = images is not None and bool(images.grids)
    return left_to_reference(job.tables, job.layout, job.engine, absent=() if has_grids else ("grid",))


def _reader_facts(job: Job) -> dict[str, Any]:
    """What made the model's inputs out of documents: a tokenizer, or a preprocessor and what becomes of an image."""
    images = job.measured_model.images
    if images is None:
        return {"tokenizer": _tokenizer_facts(job)}
    preprocessing = images.preprocessing
    facts = {
        "preprocessor": type(preprocessing.processor).__name__,
        "digest": job.run["processor_digest"],
        "pixels": list(preprocessing.shape),
        "tokens": preprocessing.tokens,
        "grids": {
            stack: {"rows": g.rows, "columns": g.columns, "first_patch": g.prefix} for stack, g in images.grids.items()
        },
    }
    return {"images": facts}


def _tokenizer_facts(job: Job) -> dict[str, Any]:
    """`classes`: how many tokens of each class the vocabulary has; `notes`: what its folder says and was not done."""
    tokenizer, classes = job.encoder.tokenizer, job.token_classes
    return {
        "name": type(tokenizer).__name__,
        "digest": job.run["tokenizer_digest"],
        "inputs": job.measured_model.input_names,
        "lower_case": job.encoder.settings.lower_case,
        "classes": None if classes is None else class_sizes(tokenizer, classes),
        "notes": list(job.encoder.settings.notes),
    }


def _model_facts(job: Job) -> dict[str, Any]:
    """`stack`, `layers` and `heads` are there where one number says it: one stack, whose layers have as many heads each."""
    layout = job.layout
    grids = {} if job.measured_model.images is None else job.measured_model.images.grids
    stacks = [_stack_facts(stack, layout.of(stack), is_grid=stack in grids) for stack in layout.stacks]
    single = stacks[0] if len(stacks) == 1 else dict.fromkeys(("stack", "layers", "heads"))
    return single | {
        "name": job.encoder.name,
        "title": job.encoder.title or job.encoder.name,
        "revision": job.encoder.revision,
        "weights_digest": job.run["weights_digest"],
        "architecture": type(job.encoder.model).__name__,
        "measured": type(job.measured_model.model).__name__,
        "stacks": stacks,
        "width": layout.width,
        "parameters": sum(p.numel() for p in job.encoder.model.parameters()),
        "residual": layout.residual_refusal or "measured",
        "layout": layout.description,
    }


def _stack_facts(stack: str, attentions: Sequence[Attention], *, is_grid: bool) -> dict[str, Any]:
    """`of_tokens`: the queries and the keys of every layer are the tokens that `sequences` counts."""
    heads = {a.heads for a in attentions}
    return {
        "stack": stack,
        "layers": len(attentions),
        "heads": heads.pop() if len(heads) == 1 else None,
        "of_tokens": is_grid or all(None not in (a.queries, a.keys) for a in attentions),
    }


def _table_facts(name: str, records: list[ShardRecord]) -> dict[str, Any]:
    parts: list[Part] = [r.parts[name] for r in records if name in r.parts]
    return {"rows": sum(p.rows for p in parts), "parts": [asdict(p) for p in parts]}


def _conformed(table: Table, rows: pa.Table, *, optional: frozenset[str] = frozenset()) -> pa.Table:
    schema = table.schema(optional=optional & table.optional)
    return rows.select(schema.names).cast(schema)
