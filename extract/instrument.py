"""A model in memory with everything that measures it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from attlas.extract.engines import Engine, choose
from attlas.extract.errors import Refusal
from attlas.extract.memory import keep_freed_memory, tokens_that_fit
from attlas.extract.model.encoder import Encoder, load_encoder
from attlas.extract.model.id_documents import longest_sequence
from attlas.extract.model.images import processor_digest
from attlas.extract.model.measured_model import MeasuredModel, examine_image_model, examine_text_model
from attlas.extract.model.token_classes import token_classes
from attlas.extract.options import Progress, RunOptions
from attlas.extract.tables import Columns, measured_columns, needs_of

# the largest batches by default, in tokens: larger ones are no faster, and need more padding
BATCH_TOKENS = 4096
CUDA_BATCH_TOKENS = 65_536


@dataclass(frozen=True)
class Instrument:
    """A loaded model, the part of it that is measured, the engine, and the columns to record of each table.

    `max_length`: the length of the longest sequence in tokens, special ones included. `classes`: the class of every token id;
    None if the tables learn neither ids nor classes. `edges`: the strongest keys of a query that the table of them has.
    """

    encoder: Encoder
    measured_model: MeasuredModel
    engine: Engine
    max_length: int
    classes: np.ndarray | None = None
    columns: Columns = field(default_factory=measured_columns)
    edges: int = 8

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the weights, and of the tokenizer or image processor."""
        encoder = self.encoder
        if encoder.processor is None:
            reader = {"tokenizer_digest": encoder.tokenizer_digest()}
        else:
            reader = {"processor_digest": processor_digest(encoder.processor)}
        return {"weights_digest": encoder.weights_digest(), **reader}

    @property
    def default_batch_tokens(self) -> int:
        """The largest batch, in tokens, that fits into memory now, within a maximum; at least one sequence."""
        device, model = self.encoder.device, self.measured_model
        most = CUDA_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS
        fitting = tokens_that_fit(model.model, model.layout, device, longest=self.max_length)
        return max(self.max_length, min(most, fitting or most))


def open_instrument(options: RunOptions, *, images: Path | None, progress: Progress) -> Instrument:
    """Load the model, examine it and make the engine ready. Raises Refusal.

    images: the folder of an image corpus; None for texts.
    """
    progress("model", 0, None)
    columns = options.columns
    encoder = load_encoder(
        options.model,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        modality="texts" if images is None else "images",
        with_head=needs_of(columns).ablations,
    )
    instrument = instrument_of(encoder, options, images=images, progress=progress)
    keep_freed_memory(longest=instrument.max_length)
    progress("model", 1, 1)
    return instrument


def instrument_of(
    encoder: Encoder, options: RunOptions, *, images: Path | None = None, progress: Progress | None = None
) -> Instrument:
    """Examine a loaded model and make the engine ready. Raises Refusal."""
    columns = options.columns
    engine = choose(options.engine, device=encoder.device.type)
    if progress is not None and not engine.is_ready():
        progress("engine", 0, None)
    engine.make_ready()
    measured_model = _measured_model(options, encoder, images)
    max_length = _max_length(options, encoder, measured_model)
    has_classes = options.tokens != "none" and encoder.tokenizer is not None
    classes = token_classes(encoder.tokenizer) if has_classes else None
    return Instrument(encoder, measured_model, engine, max_length, classes, columns, options.edges)


def _measured_model(options: RunOptions, encoder: Encoder, images: Path | None) -> MeasuredModel:
    if images is None:
        return examine_text_model(encoder.model, encoder.tokenizer, stacks=options.stacks, device=encoder.device)
    return examine_image_model(encoder.model, encoder.processor, images, device=encoder.device, dtype=encoder.dtype)


def _max_length(options: RunOptions, encoder: Encoder, measured_model: MeasuredModel) -> int:
    """The length of the longest sequence: the user's, or the model's own."""
    if measured_model.images is not None:
        return measured_model.images.preprocessing.tokens
    limit, asked, generation = encoder.max_positions, options.max_length, options.generation
    if generation is not None:
        return longest_sequence(generation, encoder.tokenizer, limit=limit)
    if asked is None:
        return encoder.default_length
    if limit is not None and asked > limit:
        raise Refusal(
            f"max_length {asked} is beyond this model's {limit} positions; use --max-length {limit} or a model with more"
        )
    return asked
