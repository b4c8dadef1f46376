"""Measure one batch of any model: the entry point for notebooks."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from attlas.extract.capture.compiled import unwrap_model
from attlas.extract.capture.discovery.patch_layout import grids_of
from attlas.extract.capture.discovery.stacks import OF_TEXT
from attlas.extract.capture.layout import Layout
from attlas.extract.capture.modes import eval_mode, refuse_training
from attlas.extract.capture.runtime.ablation import Ablating, SequenceAblations
from attlas.extract.capture.runtime.batch import Batch
from attlas.extract.capture.runtime.instrumented_pass import instrumented_pass
from attlas.extract.capture.runtime.observer import BatchObserver
from attlas.extract.capture.runtime.part_means import means_over
from attlas.extract.capture.runtime.receiver import UnmeasuredRows
from attlas.extract.collector import Collector, open_collector
from attlas.extract.engines import Engine, choose
from attlas.extract.errors import Refusal, ResidualWarning
from attlas.extract.layouts import layout_of, with_current_layout
from attlas.extract.model.arguments import bind_inputs
from attlas.extract.model.inputs import batch_of, is_padded, main_input, sequence_count
from attlas.extract.model.modality import measured_part
from attlas.extract.model.packing import BatchPart, split_packed_texts
from attlas.extract.model.splitting import split_by_sequence, split_packed_images
from attlas.extract.model.token_classes import token_classes
from attlas.extract.tables import (
    CLASS_MASSES,
    CORE,
    TABLES,
    Columns,
    measured_columns,
    needs_of,
    statistics_named,
)
from attlas.extract.tables.ablations import TABLE as ABLATIONS
from attlas.extract.tables.ablations import AblateOption, ablate_option


def measure(
    model: nn.Module,
    *arguments: Any,
    tokenizer: Any = None,
    engine: str = "auto",
    tables: Collection[str] | None = None,
    statistics: str | Collection[str] = CORE,
    ablate: str | Collection[str] | None = None,
    edges: int = 8,
    **inputs: Any,
) -> dict[str, pa.Table]:
    """Measure one batch through any attention model: {"heads": …, "residual": …, "weights": …, …} as Arrow tables.

    arguments, inputs: what the model's forward takes: `input_ids` Int[batch, token] with `attention_mask` Int[batch,
    token] where there is padding (left or right), `pixel_values`, the `src` of an nn.TransformerEncoder. An
    encoder–decoder model without `decoder_input_ids` is measured by its encoder alone.
    tables: the names of those to measure; by default all that are not on request and not static, which take seconds and do not
    depend on the batch (`weights`, `norms`, `compositions`). Nothing else is computed.
    statistics: `core`, `all`, or the names of columns to measure besides the core, such as `query_norm`, and of .py files with
    columns of your own.
    ablate: measures the table `ablations`, and says which parts are left out (`heads`, `attention`, `mlp`; all by default) and how:
    set to `zero`, or to their `mean` over the tokens of the batch.
    edges: how many of the strongest keys of each query the table `edges` has.

    `sequence_id` is the row of the batch. Columns that need the tokenizer (the token classes) are absent without one.
    `residual` is absent where the model's stream could not be read exactly. Raises Refusal for inputs that cannot be
    measured, CaptureError where a pattern does not show.
    """
    model = unwrap_model(model)
    given = bind_inputs(model, arguments, inputs, options=_OPTIONS)
    model = measured_part(model, given)
    device = main_input(model, given).device
    row_engine, option = choose(engine, device=device.type), ablate_option(ablate)
    wanted = _columns_of(tables, statistics, on_request=() if ablate is None else (ABLATIONS.name,))
    classes = None if tokenizer is None else torch.as_tensor(token_classes(tokenizer), device=device)
    batch_of(model, given, classes)  # refuses what can't be measured before the model runs
    refuse_training(model, given)
    with eval_mode(model):
        measured, layout = with_current_layout(
            model,
            lambda: _measure_batch(
                model, given, classes, engine=row_engine, columns=wanted, edges=edges, ablate=option
            ),
        )
    if needs_of(wanted).reads_stream:
        _warn_of_absent_residual(layout)
    return {
        name: table.drop_columns(["document_id"] if "document_id" in table.column_names else [])
        for name, table in measured.items()
    }


# the parameters of `measure` that are not inputs of the model
_OPTIONS = tuple(n for n, p in inspect.signature(measure).parameters.items() if p.kind is p.KEYWORD_ONLY)


def _columns_of(
    tables: Collection[str] | None, statistics: str | Collection[str], *, on_request: tuple[str, ...]
) -> Columns:
    """The columns to measure of the named tables, or of those of every run, and of tables on request.

    Raises Refusal for an unknown name.
    """
    asked = (*statistics_named(statistics), *on_request)
    if tables is None:
        columns = measured_columns(asked)
        return {name: c for name, c in columns.items() if TABLES[name].kind != "static" or name in asked}
    recorded = [table.name for table in TABLES.values() if table.recorder is not None]
    tables = [*tables, *on_request]
    for name in tables:
        if name not in recorded:
            raise Refusal(
                f"the tables that can be measured are {', '.join(recorded)}; {name!r} is not one; choose another"
            )
    columns = measured_columns([*asked, *(name for name in tables if TABLES[name].on_request)])
    return {name: chosen for name, chosen in columns.items() if name in tables}


def _measure_batch(
    model: nn.Module,
    inputs: Mapping[str, Any],
    classes: Tensor | None,
    *,
    engine: Engine,
    columns: Columns,
    edges: int,
    ablate: AblateOption,
) -> tuple[dict[str, pa.Table], Layout]:
    """Run the model on the inputs, in as many parts as it needs, and return the tables."""
    parts = split_batch(model, inputs)
    batches = [batch_of(model, part.inputs, classes) for part in parts]
    layout = layout_of(model, parts[0].inputs)
    refuse_added_mask(model, layout, inputs)
    numbers = np.arange(sum(len(part.places) for part in parts))
    means = None
    if ablate.is_mean and ABLATIONS.name in columns:
        sequences = (inputs for part in parts for inputs in _alone(model, part.inputs, len(part.places)))
        means = means_over(model, layout, sequences, ablate.parts)
    collector = open_collector(
        columns,
        model,
        layout,
        sequence_ids=numbers,
        document_ids=numbers,
        edges=edges,
        ablating=Ablating(ablate.parts, means),
        without=frozenset(() if classes is not None else CLASS_MASSES),
    )
    is_static = all(TABLES[name].kind == "static" for name in columns)  # then no pass is needed
    for part, batch in () if is_static else zip(parts, batches, strict=True):
        collector.begin(part.places)
        with_grids = replace(batch, grids=grids_of(model, layout, part.inputs))
        observe(model, layout, part.inputs, batch=with_grids, engine=engine, collector=collector)
    return collector.tables(), layout


def _warn_of_absent_residual(layout: Layout) -> None:
    """Warn which part of `residual` is left out, and why."""
    if layout.residual_refusal is not None:
        reasons = {"residual": layout.residual_refusal}
    else:
        reasons = {f"residual of the {stack}": reason for stack, reason in layout.residual_refusals.items()}
    for what, reason in reasons.items():
        warnings.warn(f"{what} is left out: {reason}", ResidualWarning, stacklevel=3)


def split_batch(model: nn.Module, inputs: Mapping[str, Any]) -> list[BatchPart]:
    """The inputs in the parts that the model has to run on separately; usually one part.

    Packed texts and images are separated, and sequences whose results would depend on the padding of others.
    """
    texts = split_packed_texts(model, inputs)
    if texts is not None:
        return texts
    parts = split_packed_images(model, inputs)
    sequences = sequence_count(model, inputs)
    if len(parts) == 1 and sequences > 1:
        layout = layout_of(model, inputs)
        if not (layout.mixed or (attends_beyond_text(layout) and is_padded(inputs))):
            return [BatchPart([*range(sequences)], parts[0])]
        parts = split_by_sequence(model, inputs)
    return [BatchPart([number], part) for number, part in enumerate(parts)]


def attends_beyond_text(layout: Layout) -> bool:
    """Whether a stack of text also attends to something other than its tokens, such as images or patches of bytes.

    Padding would stand between those and the text, so that the model's own results depend on it.
    """
    return any(a.queries is None and not a.is_cross_attention and a.stack in OF_TEXT for a in layout.attentions)


def refuse_added_mask(model: nn.Module, layout: Layout, inputs: Mapping[str, Any]) -> None:
    """Refuse a 4-d mask of integers or booleans where transformers' eager code would add it to the scores."""
    mask = inputs.get("attention_mask")
    is_eager = getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager"
    if not is_eager or not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.is_floating_point():
        return
    if "interface" in layout.methods:
        raise Refusal(
            f"a 4-d attention_mask is added to the scores by {type(model).__name__}, which attends by eager code; this one "
            f"of {mask.dtype} would hide nothing; give 0 where a query sees a key and torch.finfo(dtype).min elsewhere"
        )


def observe(
    model: nn.Module,
    layout: Layout,
    inputs: Mapping[str, Any],
    *,
    batch: Batch,
    engine: Engine,
    collector: BatchObserver,
    factors: Mapping[int, Tensor] | None = None,
) -> None:
    """Run one measured forward pass; the collector takes its results once it has succeeded.

    `factors` are the model's write factors, if it has not changed since they were made.

    A GPU is not waited for before the end of the pass. If it then turns out that rows were not measured, which is rare, the
    pass is made again in the slow way, which gives the model its own output for these rows.
    """
    measure_pass = partial(
        instrumented_pass, model, layout, batch=batch, engine=engine, observer=collector, factors=factors
    )
    try:
        with torch.inference_mode(), measure_pass(waits=model in _NEEDS_WAITING):
            model(**inputs)
    except UnmeasuredRows:
        _NEEDS_WAITING.add(model)
        collector.drop()
        with torch.inference_mode(), measure_pass(waits=True):
            model(**inputs)
    if collector.needs.ablations:
        assert isinstance(collector, Collector), "only tables need ablations"
        _ablate(model, layout, inputs, batch, collector)
    collector.settle()


def _ablate(model: nn.Module, layout: Layout, inputs: Mapping[str, Any], batch: Batch, collector: Collector) -> None:
    """Give the sequences of the sample to the model again, without its heads and sublayers."""
    places = batch.sampled.tolist()
    if not places:
        return
    alone = _alone(model, inputs, batch.sequences)
    for place in places:
        collector.ablations(place, SequenceAblations(model, layout, alone[place], collector.ablating))


def _alone(model: nn.Module, inputs: Mapping[str, Any], sequences: int) -> list[dict[str, Any]]:
    """The inputs of each sequence of a batch, without padding."""
    return split_by_sequence(model, inputs) if sequences > 1 or is_padded(inputs) else [dict(inputs)]


# models of which a pass had to be made again: the next ones most likely would, too
_NEEDS_WAITING: weakref.WeakSet[nn.Module] = weakref.WeakSet()
