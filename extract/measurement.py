"""One batch through a model, every head and every residual update measured: the notebook's way in."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from attlas.extract.capture.compiled import unwrap_model
from attlas.extract.capture.discovery.patch_layout import find_patch_layout
from attlas.extract.capture.discovery.stacks import OF_TEXT
from attlas.extract.capture.layout import Layout
from attlas.extract.capture.modes import eval_mode, refuse_training
from attlas.extract.capture.runtime.batch import Batch
from attlas.extract.capture.runtime.instrumented_pass import instrumented_pass
from attlas.extract.collector import Collector, open_collector
from attlas.extract.engines import Engine, choose
from attlas.extract.engines.patches import Grid
from attlas.extract.errors import CaptureError, Refusal, ResidualWarning
from attlas.extract.layouts import forget_layouts, layout_of
from attlas.extract.model.arguments import bind_inputs
from attlas.extract.model.inputs import batch_of, is_padded, main_input, sequence_count
from attlas.extract.model.packing import BatchPart, split_packed_texts
from attlas.extract.model.splitting import split_by_sequence, split_packed_images
from attlas.extract.model.token_classes import token_classes
from attlas.extract.tables import CLASS_MASSES, TABLES, Table, recorded_tables


def measure(
    model: nn.Module,
    *arguments: Any,
    tokenizer: Any = None,
    engine: str = "auto",
    tables: Collection[str] | None = None,
    **inputs: Any,
) -> dict[str, pa.Table]:
    """Measure one batch through any attention model: {"heads": …, "residual": …, "profiles": …} as Arrow tables.

    arguments, inputs: what the model's forward takes: `input_ids` Int[batch, token] with `attention_mask` Int[batch,
    token] where there is padding (left or right), `pixel_values`, the `src` of an nn.TransformerEncoder. An
    encoder–decoder model without `decoder_input_ids` is measured by its encoder alone.
    tables: the names of those to measure; by default all that are not on request. Nothing else is computed.

    `sequence_id` is the row of the batch. Columns that need the tokenizer (the token classes) are absent without one.
    `residual` is absent where the model's stream could not be read exactly. Raises Refusal for inputs that cannot be
    measured, CaptureError where a pattern does not show.
    """
    model = unwrap_model(model)
    given = bind_inputs(model, arguments, inputs, options=_OPTIONS)
    model = measured_part(model, given)
    device = main_input(model, given).device
    chosen, wanted = choose(engine, device=device.type), _chosen_tables(tables)
    classes = None if tokenizer is None else torch.as_tensor(token_classes(tokenizer), device=device)
    batch_of(model, given, classes)  # what cannot be measured is refused before the model runs
    refuse_training(model, given)
    with eval_mode(model):
        try:
            collector, layout = _measure_parts(model, given, classes, engine=chosen, tables=wanted)
        except CaptureError:
            if not forget_layouts(model):
                raise
            # it changed in a way that nothing told: once more from the beginning
            collector, layout = _measure_parts(model, given, classes, engine=chosen, tables=wanted)
    if any(table.needs(table.facts).residual for table in wanted):
        _warn_of_absent(layout)
    measured = collector.tables()
    return {
        name: table.drop_columns(["document_id"] if "document_id" in table.column_names else [])
        for name, table in measured.items()
    }


# what `measure` takes besides a model's inputs
_OPTIONS = tuple(n for n, p in inspect.signature(measure).parameters.items() if p.kind is p.KEYWORD_ONLY)


def _chosen_tables(names: Collection[str] | None) -> tuple[Table, ...]:
    if names is None:
        return recorded_tables()
    known = [table.name for table in TABLES.values() if table.recorder is not None]
    for name in names:
        if name not in known:
            raise Refusal(
                f"the tables that can be measured are {', '.join(known)}; {name!r} is not one; choose another"
            )
    return tuple(TABLES[name] for name in known if name in names)


def _measure_parts(
    model: nn.Module, given: Mapping[str, Any], classes: Tensor | None, *, engine: Engine, tables: Iterable[Table]
) -> tuple[Collector, Layout]:
    parts = parts_of(model, given)
    batches = [batch_of(model, part.inputs, classes) for part in parts]
    layout = layout_of(model, parts[0].inputs)
    _refuse_added_mask(model, layout, given)
    numbers = np.arange(sum(len(part.places) for part in parts))
    collector = open_collector(
        tables,
        model,
        layout,
        sequence_ids=numbers,
        document_ids=numbers,
        without=frozenset(() if classes is not None else CLASS_MASSES),
    )
    for part, batch in zip(parts, batches, strict=True):
        collector.begin(part.places)
        found = _as_found(batch, model, layout, part.inputs)
        observe(model, layout, part.inputs, batch=found, engine=engine, collector=collector)
    return collector, layout


def _warn_of_absent(layout: Layout) -> None:
    """Say which part of `residual` is left out, and why."""
    if layout.residual_refusal is not None:
        reasons = {"residual": layout.residual_refusal}
    else:
        reasons = {f"residual of the {stack}": reason for stack, reason in layout.residual_refusals.items()}
    for what, reason in reasons.items():
        warnings.warn(f"{what} is left out: {reason}", ResidualWarning, stacklevel=3)


def parts_of(model: nn.Module, inputs: Mapping[str, Any]) -> list[BatchPart]:
    """The inputs as they are given to the model: at once, or apart.

    That is where texts are packed in a row, where a tower packs sequences together, and where padding of the text would
    stand between other tokens.
    """
    texts = split_packed_texts(model, inputs)
    if texts is not None:
        return texts
    parts = split_packed_images(model, inputs)
    if len(parts) == 1 and sequence_count(model, inputs) > 1:
        if not _is_one_by_one(layout_of(model, inputs), inputs):
            return [BatchPart([*range(sequence_count(model, inputs))], parts[0])]
        parts = split_by_sequence(model, inputs)
    return [BatchPart([number], part) for number, part in enumerate(parts)]


def _refuse_added_mask(model: nn.Module, layout: Layout, inputs: Mapping[str, Any]) -> None:
    """Eager code of transformers adds a mask to the scores, whatever its type, where the interface would hide by it."""
    mask = inputs.get("attention_mask")
    eager = getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager"
    of_pairs = mask if isinstance(mask, torch.Tensor) and mask.dim() == 4 else None
    if of_pairs is not None and eager and "interface" in layout.methods and not of_pairs.is_floating_point():
        raise Refusal(
            f"a 4-d attention_mask is added to the scores by {type(model).__name__}, which attends by eager code; this one "
            f"of {of_pairs.dtype} would hide nothing; give 0 where a query sees a key and torch.finfo(dtype).min elsewhere"
        )


def _is_one_by_one(layout: Layout, inputs: Mapping[str, Any]) -> bool:
    return layout.mixed or (has_others_among_text(layout) and is_padded(inputs))


def has_others_among_text(layout: Layout) -> bool:
    """Whether a stack of text attends to what is none of its tokens, such as images or patches of bytes.

    Padding of the text stands between those, so that the model's own numbers depend on it.
    """
    return any(a.queries is None and not a.is_cross_attention and a.stack in OF_TEXT for a in layout.attentions)


def _as_found(batch: Batch, model: nn.Module, layout: Layout, inputs: Mapping[str, Any]) -> Batch:
    """The batch with what is known of it once the model is examined."""
    return replace(batch, grids=grids_of(model, layout, inputs))


def grids_of(model: nn.Module, layout: Layout, inputs: Mapping[str, Any]) -> dict[str, Grid]:
    """Where the patches of images stand among the tokens of a stack that reads them."""
    patch_layout = find_patch_layout(model, layout, inputs)
    return {} if patch_layout is None or patch_layout.grid is None else {patch_layout.stack: patch_layout.grid}


def measured_part(model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    """The encoder of an encoder–decoder model whose decoder is given nothing; else the model."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return model
    encoder: Any = model.get_encoder()  # pyright: ignore
    takes = inspect.signature(encoder.forward).parameters if isinstance(encoder, nn.Module) else {}
    return encoder if set(inputs) <= set(takes) else model


def observe(
    model: nn.Module,
    layout: Layout,
    inputs: Mapping[str, Any],
    *,
    batch: Batch,
    engine: Engine,
    collector: Collector,
) -> None:
    """One watched forward pass; the collector counts it when it went through."""
    with torch.inference_mode(), instrumented_pass(model, layout, batch=batch, engine=engine, observer=collector):
        model(**inputs)
    collector.settle()
