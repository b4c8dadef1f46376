"""The manifest of a run: a draft of it when the run is planned, the parts once they are written."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attlas.extract.collector import left_to_reference
from attlas.extract.instrument import Instrument
from attlas.extract.model.token_classes import class_sizes
from attlas.extract.plan import Plan, planned_schema
from attlas.extract.software import software_version
from attlas.extract.store import Identity, Part, ShardRecord, parts_of, shard_of
from attlas.extract.tables import SCHEMA_VERSION, TABLES, own_facts

if TYPE_CHECKING:
    from attlas.extract.capture.layout import Attention

_SOFTWARE = ("attlas", "torch", "transformers", "pyarrow", "numpy")


def draft_manifest(identity: Identity, instrument: Instrument, plan: Plan) -> dict[str, Any]:
    """Everything about a run but what its shards add: what is measured, and with what."""
    recipe = identity.recipe
    images = instrument.measured_model.images
    software = (*_SOFTWARE, *(() if images is None else ("pillow",)))
    return {
        "schema_version": SCHEMA_VERSION,
        "run": dict(recipe),
        "model": _model_facts(recipe, instrument),
        **_reader_facts(recipe, instrument),
        "corpus": {
            **identity.corpus,
            "digest": plan.corpus_digest,
            "digest_keyed": recipe["digest_keyed"],
            "documents": plan.documents,
            "sequences": plan.sequences,
            "tokens": plan.tokens,
            "content_tokens": plan.content_tokens,
            "dropped": plan.dropped,
        },
        "software": {"python": platform.python_version()} | {name: software_version(name) for name in software},
        "engine": recipe["engine"],
        "by_reference": _left_to_reference(instrument),
        "device": recipe["device"],
        "dtype": recipe["dtype"],
        "shards": plan.shards,
        "generation": asdict(plan.generation),
        **({"own_statistics": own} if (own := own_facts(instrument.columns)) else {}),
        "tables": {name: {"columns": names} for name, names in _columns(recipe, instrument).items()},
    }


def complete_manifest(
    draft: Mapping[str, Any], records: Iterable[ShardRecord], before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The draft with the parts and counts of all shards. before: the manifest of the generation before, if there is one.

    `padding_waste` is that of the shards that this generation measured.
    """
    records = list(records)
    padded, positions = (sum(record.facts[name] for record in records) for name in ("padded", "positions"))
    measured = {record.shard for record in records}
    parts = {
        name: sorted(
            (*_reused(before, name, measured), *(r.parts[name] for r in records if name in r.parts)), key=_shard
        )
        for name in draft["tables"]
    }
    return {
        **draft,
        "generation": {**draft["generation"], "measured_shards": len(measured)},
        "padding_waste": padded / positions if positions else 0.0,
        "tables": {name: facts | _rows_and_parts(parts[name]) for name, facts in draft["tables"].items()},
    }


def with_concluded(manifest: Mapping[str, Any], concluded: Mapping[str, Part]) -> dict[str, Any]:
    """The manifest with the parts of the tables that are made of all shards, and without tables that have no part."""
    tables = {
        name: facts | (_rows_and_parts([concluded[name]]) if name in concluded else {})
        for name, facts in manifest["tables"].items()
    }
    return {**manifest, "tables": {name: facts for name, facts in tables.items() if facts["parts"]}}


def _reused(before: Mapping[str, Any] | None, table: str, measured: Collection[int]) -> Iterator[Part]:
    """The parts of a table of shards that were not measured again, and of what only the model decides."""
    is_static = TABLES[table].kind == "static"
    if before is not None:
        yield from (part for part in parts_of(before, table) if is_static or _shard(part) not in measured)


def _shard(part: Part) -> int:
    shard = shard_of(part.path)
    assert shard is not None, "it is the part of a shard"
    return shard


def _columns(recipe: Mapping[str, Any], instrument: Instrument) -> dict[str, list[str]]:
    """The names of all columns of each table, keys included."""
    names = {}
    for table in TABLES.values():
        if table.kind == "plan":
            names[table.name] = planned_schema(table, tokens=recipe["tokens"]).names
        elif table.derive is not None or table.conclude is not None:
            names[table.name] = [c.name for c in table.columns]
        elif table.name in instrument.columns:
            names[table.name] = [c.name for c in (*table.keys, *table.of_facts(instrument.columns[table.name]))]
    return names


def _rows_and_parts(parts: Sequence[Part]) -> dict[str, Any]:
    return {"rows": sum(part.rows for part in parts), "parts": [asdict(part) for part in parts]}


def _left_to_reference(instrument: Instrument) -> dict[str, list[str]]:
    images = instrument.measured_model.images
    has_grids = images is not None and bool(images.grids)
    absent = () if has_grids else ("grid",)
    return left_to_reference(instrument.columns, instrument.measured_model.layout, instrument.engine, absent=absent)


def _reader_facts(recipe: Mapping[str, Any], instrument: Instrument) -> dict[str, Any]:
    """The tokenizer, or the image processor and what an image becomes."""
    images = instrument.measured_model.images
    if images is None:
        return {"tokenizer": _tokenizer_facts(recipe, instrument)}
    preprocessing = images.preprocessing
    facts = {
        "preprocessor": type(preprocessing.processor).__name__,
        "digest": recipe["processor_digest"],
        "pixels": list(preprocessing.shape),
        "tokens": preprocessing.tokens,
        "grids": {
            stack: {"rows": g.rows, "columns": g.columns, "first_patch": g.prefix} for stack, g in images.grids.items()
        },
    }
    return {"images": facts}


def _tokenizer_facts(recipe: Mapping[str, Any], instrument: Instrument) -> dict[str, Any]:
    """`classes`: the number of tokens of each class in the vocabulary; `notes`: settings of its folder that are ignored."""
    encoder, classes = instrument.encoder, instrument.classes
    return {
        "name": type(encoder.tokenizer).__name__,
        "digest": recipe["tokenizer_digest"],
        "inputs": instrument.measured_model.input_names,
        "lower_case": encoder.settings.lower_case,
        "classes": None if classes is None else class_sizes(encoder.tokenizer, classes),
        "notes": list(encoder.settings.notes),
    }


def _model_facts(recipe: Mapping[str, Any], instrument: Instrument) -> dict[str, Any]:
    """`stack`, `layers` and `heads` are null if there are several stacks, `heads` also if layers differ."""
    encoder, measured_model = instrument.encoder, instrument.measured_model
    layout = measured_model.layout
    grids = {} if measured_model.images is None else measured_model.images.grids
    stacks = [_stack_facts(stack, layout.of(stack), is_grid=stack in grids) for stack in layout.stacks]
    single = stacks[0] if len(stacks) == 1 else dict.fromkeys(("stack", "layers", "heads"))
    return single | {
        "name": encoder.name,
        "title": encoder.title or encoder.name,
        "revision": encoder.revision,
        "weights_digest": recipe["weights_digest"],
        "architecture": type(encoder.model).__name__,
        "measured": type(measured_model.model).__name__,
        "stacks": stacks,
        "width": layout.width,
        "parameters": sum(p.numel() for p in encoder.model.parameters()),
        "residual": layout.residual_refusal or "measured",
        "layout": layout.description,
    }


def _stack_facts(stack: str, attentions: Sequence[Attention], *, is_grid: bool) -> dict[str, Any]:
    """`of_tokens`: whether the queries and the keys of every layer are the tokens that `sequences` counts."""
    heads = {a.heads for a in attentions}
    return {
        "stack": stack,
        "layers": len(attentions),
        "heads": heads.pop() if len(heads) == 1 else None,
        "of_tokens": is_grid or all(None not in (a.queries, a.keys) for a in attentions),
    }
