"""One batch through a model, every head and every residual update measured: the notebook's way in."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor, nn

from extract.capture.batch import Batch
from extract.capture.compiled import unwrap_model
from extract.capture.grid import sight_of
from extract.capture.layout import Attention, Layout, Site
from extract.capture.modes import eval_mode, refuse_training
from extract.capture.stacks import OF_TEXT
from extract.capture.watch import watching
from extract.engines import Engine, choose
from extract.engines.patches import Grid
from extract.errors import CaptureError, Refusal, ResidualWarning
from extract.layouts import forget_layouts, layout_of
from extract.model.arguments import bind_inputs
from extract.model.inputs import batch_of, is_padded, main_input, sequence_count
from extract.model.packing import BatchPart, split_packed_texts
from extract.model.splitting import split_by_sequence, split_packed_images
from extract.model.token_classes import token_classes
from extract.schema import CLASS_MASSES, HEADS, PROFILES, RESIDUAL, Table
from extract.statistics.attention import HeadQuantities, Values
from extract.statistics.profiles import PROFILE_COLUMNS
from extract.statistics.registry import Column
from extract.statistics.sums import HeadSums


@dataclass
class Measurements:
    """What is known of some sequences: numbers only, nothing of the size of the model's states."""

    heads: dict[Attention, np.ndarray] = field(default_factory=dict)  # [quantity, sequence, head]
    residual: dict[Site, np.ndarray] = field(default_factory=dict)  # [column, sequence]
    profiles: dict[Attention, np.ndarray] = field(default_factory=dict)  # [2, head, profile column]


class Collector:
    """An observer that keeps the sums of every observation, each at its sequence's place.

    A batch counts when it is settled, and as a whole: one that failed half-way leaves nothing behind.
    """

    def __init__(self, sequences: int) -> None:
        self.measured = Measurements()
        self._sequences = sequences
        self.at(range(sequences))

    def at(self, places: Sequence[int] | np.ndarray) -> None:
        """The batch that comes is of these sequences; what is left of one that failed is dropped."""
        self._places = np.asarray(places)
        self._heads: dict[Attention, HeadSums] = {}
        self._residual: dict[Site, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def heads(self, attention: Attention, sums: HeadSums) -> None:
        self._heads[attention] = HeadSums(*map(self._sent_home, sums))

    def residual(self, site: Site, values: Float[Tensor, "column batch"]) -> None:
        self._residual[site] = self._sent_home(values)

    def settle(self) -> None:
        """Count the batch: its forward pass went through."""
        if self._copied is not None:
            self._copied.synchronize()
        settled, places = self.measured, self._places
        for attention, (values, profiles) in self._heads.items():
            shape = (len(values), self._sequences, attention.heads)
            self._of(settled.heads, attention, shape)[:, places] = values.numpy()
            total = settled.profiles.setdefault(attention, np.zeros(profiles.shape))
            total += profiles.numpy()
        for site, values in self._residual.items():
            self._of(settled.residual, site, (len(values), self._sequences))[:, places] = values.numpy()
        self.at(places)

    def _sent_home(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU. CUDA is not waited for until the batch is settled: the model goes on meanwhile."""
        if tensor.device.type != "cuda":
            return tensor.cpu()
        home = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(tensor.device))
        return home

    @staticmethod
    def _of(held: dict[Any, np.ndarray], key: Any, shape: tuple[int, ...]) -> np.ndarray:
        if key not in held:
            held[key] = np.full(shape, np.nan)
        return held[key]


def measure(
    model: nn.Module,
    *arguments: Any,
    tokenizer: Any = None,
    engine: str = "auto",
    residual: bool = True,
    **inputs: Any,
) -> dict[str, pa.Table]:
    """Measure one batch through any attention model: {"heads": …, "residual": …, "profiles": …} as Arrow tables.

    arguments, inputs: what the model's forward takes: `input_ids` Int[batch, token] with `attention_mask` Int[batch,
    token] where there is padding (left or right), `pixel_values`, the `src` of an nn.TransformerEncoder. An
    encoder–decoder model without `decoder_input_ids` is measured by its encoder alone. `sequence_id` is the row of the
    batch. Columns that need the tokenizer (the token classes) are absent without one. `residual` is absent where the
    model's stream could not be read exactly. Raises Refusal for inputs that cannot be measured, CaptureError where a
    pattern does not show.
    """
    model = unwrap_model(model)
    given = bind_inputs(model, arguments, inputs, options=_OPTIONS)
    model = measured_part(model, given)
    device = main_input(model, given).device
    chosen = choose(engine, device=device.type)
    classes = None if tokenizer is None else torch.as_tensor(token_classes(tokenizer), device=device)
    batch_of(model, given, classes)  # what cannot be measured is refused before the model runs
    refuse_training(model, given)
    with eval_mode(model):
        try:
            measured, layout = _measured(model, given, classes, engine=chosen, residual=residual)
        except CaptureError:
            if not forget_layouts(model):
                raise
            # it changed in a way that nothing told: once more from the beginning
            measured, layout = _measured(model, given, classes, engine=chosen, residual=residual)
    if residual:
        _warn_of_absent(layout)
    return _tables(measured, layout, with_classes=classes is not None, residual=residual)


# what `measure` takes besides a model's inputs
_OPTIONS = tuple(n for n, p in inspect.signature(measure).parameters.items() if p.kind is p.KEYWORD_ONLY)


def _measured(
    model: nn.Module, given: Mapping[str, Any], classes: Tensor | None, *, engine: Engine, residual: bool
) -> tuple[Measurements, Layout]:
    parts = parts_of(model, given)
    batches = [batch_of(model, part.inputs, classes) for part in parts]
    layout = layout_of(model, parts[0].inputs)
    _refuse_added_mask(model, layout, given)
    collector = Collector(sum(len(part.places) for part in parts))
    for part, batch in zip(parts, batches, strict=True):
        collector.at(part.places)
        found = _as_found(batch, model, layout, part.inputs)
        observe(model, layout, part.inputs, batch=found, engine=engine, collector=collector, residual=residual)
    return collector.measured, layout


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
    if of_pairs is not None and eager and "interface" in layout.ways and not of_pairs.is_floating_point():
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
    return any(a.queries is None and not a.crosses and a.stack in OF_TEXT for a in layout.attentions)


def _as_found(batch: Batch, model: nn.Module, layout: Layout, inputs: Mapping[str, Any]) -> Batch:
    """The batch with what is known of it once the model is examined."""
    return replace(batch, grids=grids_of(model, layout, inputs))


def grids_of(model: nn.Module, layout: Layout, inputs: Mapping[str, Any]) -> dict[str, Grid]:
    """Where the patches of images stand among the tokens of a stack that reads them."""
    sight = sight_of(model, layout, inputs)
    return {} if sight is None or sight.grid is None else {sight.stack: sight.grid}


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
    residual: bool = True,
) -> None:
    """One watched forward pass; the collector counts it when it went through."""
    with (
        torch.inference_mode(),
        watching(model, layout, batch=batch, engine=engine, observer=collector, residual=residual),
    ):
        model(**inputs)
    collector.settle()


def _tables(measured: Measurements, layout: Layout, *, with_classes: bool, residual: bool) -> dict[str, pa.Table]:
    sequences = np.arange(next(iter(measured.heads.values())).shape[1])
    tables = {
        "heads": heads_table(measured, sequences, sequences).drop_columns(
            ["document_id", *(() if with_classes else CLASS_MASSES)]
        ),
        "profiles": profiles_table(measured, shard=0),
    }
    if residual and layout.residual_refusal is None:
        tables["residual"] = residual_table(measured, sequences, sequences).drop_columns(["document_id"])
    return tables


def heads_table(measured: Measurements, sequence_ids: np.ndarray, document_ids: np.ndarray) -> pa.Table:
    """The `heads` rows of some sequences, sorted by stack, layer, head, sequence."""
    blocks = sorted(measured.heads.items(), key=lambda item: (item[0].stack, item[0].layer))
    keys = {"stack": [], "layer": [], "head": []}
    for attention, _ in blocks:
        rows = attention.heads * len(sequence_ids)
        keys["stack"].append(np.full(rows, attention.stack))
        keys["layer"].append(np.full(rows, attention.layer))
        keys["head"].append(np.repeat(np.arange(attention.heads), len(sequence_ids)))
    facts = {
        c.name: np.concatenate([_computed(c, HeadQuantities(values)).T.ravel() for _, values in blocks])
        for c in HEADS.facts
    }
    return _table(HEADS, _with_ids(keys, sequence_ids, document_ids) | facts)


def _computed(column: Column[HeadQuantities, Values], quantities: HeadQuantities) -> Values:
    assert column.compute is not None, "every fact of a head is computed"
    return column.compute(quantities)


def residual_table(measured: Measurements, sequence_ids: np.ndarray, document_ids: np.ndarray) -> pa.Table:
    """The `residual` rows of some sequences, sorted by stack, layer, site, sequence."""
    blocks = sorted(measured.residual.items(), key=lambda item: (item[0].stack, item[0].layer, item[0].name))
    count = len(sequence_ids)
    keys = {
        "stack": [np.full(count, site.stack) for site, _ in blocks],
        "layer": [np.full(count, site.layer) for site, _ in blocks],
        "site": [np.full(count, site.name) for site, _ in blocks],
    }
    facts = {c.name: np.concatenate([values[n] for _, values in blocks]) for n, c in enumerate(RESIDUAL.facts)}
    return _table(RESIDUAL, _with_ids(keys, sequence_ids, document_ids) | facts)


def profiles_table(measured: Measurements, *, shard: int) -> pa.Table:
    """The `profiles` rows of a shard, sorted by stack, layer, head, profile, bin; empty bins are left out."""
    rows = [
        (attention.stack, attention.layer, head, *PROFILE_COLUMNS[column], *sums[:, head, column])
        for attention, sums in measured.profiles.items()
        for head, column in np.argwhere(sums.any(0)).tolist()
    ]
    columns = list(zip(*sorted(rows), strict=True)) or [[] for _ in range(7)]
    named = dict(
        zip(("stack", "layer", "head", "profile", "bin", "sum", "count"), map(np.asarray, columns), strict=True)
    )
    return _table(PROFILES, {"shard": np.full(len(rows), shard)} | named)


def _with_ids(
    keys: Mapping[str, list[np.ndarray]], sequence_ids: np.ndarray, document_ids: np.ndarray
) -> dict[str, np.ndarray]:
    joined = {name: np.concatenate(parts) for name, parts in keys.items()}
    repeats = len(next(iter(joined.values()))) // len(sequence_ids)
    return {"sequence_id": np.tile(sequence_ids, repeats), "document_id": np.tile(document_ids, repeats)} | joined


def _table(table: Table, columns: Mapping[str, np.ndarray]) -> pa.Table:
    schema = table.schema()
    return pa.table([_arrow(columns[f.name], f.type) for f in schema], schema=schema)


def _arrow(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Null where a value is undefined; neither NaN nor infinity is ever written."""
    if pa.types.is_dictionary(kind):
        return pa.array(values.tolist(), kind.value_type).cast(kind)
    if pa.types.is_floating(kind):
        values = values.astype(kind.to_pandas_dtype())
    defined = np.isfinite(values)
    return pa.array(np.where(defined, values, 0).astype(kind.to_pandas_dtype()), kind, mask=~defined)
