"""One shard through the model: batches of like length, every sequence's numbers at its own place."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int

from attlas.extract.batching import batches, padded_positions
from attlas.extract.capture.layout import Layout
from attlas.extract.capture.rng import fixed_rng
from attlas.extract.capture.runtime.batch import Batch, Tokens
from attlas.extract.collector import Collector, open_collector
from attlas.extract.engines import Engine
from attlas.extract.engines.visibility import Axis
from attlas.extract.errors import Refusal, first_line
from attlas.extract.measurement import has_others_among_text, observe
from attlas.extract.memory import is_out_of_memory, release_memory
from attlas.extract.model.encoder import Encoder
from attlas.extract.model.inputs import MASK_OF
from attlas.extract.model.measured_model import TOKEN_INPUTS, TOKEN_TYPES, ImageCorpus
from attlas.extract.model.modality import accepts_input
from attlas.extract.planning import SpecialTokens
from attlas.extract.tables import Table, recorded_tables

Progress = Callable[[int, int], None]
# one batch keeps a machine busy, and may be as large as its memory allows
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Instrument:
    """A model and what measures it."""

    encoder: Encoder
    layout: Layout
    engine: Engine
    batch_tokens: int
    classes: np.ndarray | None  # of every id of the vocabulary; None: neither classes nor ids are looked at
    inputs: tuple[str, ...] = TOKEN_INPUTS  # of the model, that a sequence is given to
    images: ImageCorpus | None = None  # what sequences are, if not ids
    special: SpecialTokens | None = None  # what token types follow from, where the model is given them
    padding_matters: bool = False  # to what the model gives of a sequence
    tables: tuple[Table, ...] = field(default_factory=recorded_tables)


class _Row(NamedTuple):
    """A sequence: how many tokens it is, and its ids, or the name and SHA-256 of its image."""

    tokens: int
    given: Any


def measure_sequences(
    instrument: Instrument, sequences: pa.Table, *, shard: int, progress: Progress | None = None
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """The measured tables of a shard, and its padded and total positions for the manifest.

    Threads that measure shards take turns at the model; what comes before and after it, they do side by side.
    After each batch `progress` is told its tokens, and how many documents have had their last sequence in it.
    """
    rows = _rows(instrument, sequences)
    lengths = [row.tokens for row in rows]
    planned = _planned(instrument, lengths)
    sequence_ids, document_ids = (sequences[n].to_numpy() for n in ("sequence_id", "document_id"))
    done = _told(progress, lengths, document_ids.tolist()) if progress else (lambda chosen: None)
    collector = open_collector(
        instrument.tables,
        instrument.encoder.model,
        instrument.layout,
        sequence_ids=sequence_ids,
        document_ids=document_ids,
        shard=shard,
    )
    with _ONE_AT_A_TIME:
        _measure_batches(instrument, rows, planned, collector, done)
    # of the batches as planned: a day on which memory was short leaves the same manifest
    positions = padded_positions(lengths, planned)
    return collector.tables(), {"positions": positions, "padded": positions - sum(lengths)}


def _planned(instrument: Instrument, lengths: Sequence[int]) -> list[list[int]]:
    """Batches of like length; of the same length, or of one sequence, where the model's numbers depend on the others."""
    layout = instrument.layout
    if layout.mixed:
        return [[n] for n in range(len(lengths))]
    if not (has_others_among_text(layout) or instrument.padding_matters):
        return batches(lengths, token_budget=instrument.batch_tokens)
    places = (np.flatnonzero(np.asarray(lengths) == length).tolist() for length in sorted(set(lengths)))
    alike = ((of, batches([lengths[n] for n in of], token_budget=instrument.batch_tokens)) for of in places)
    return [[of[n] for n in batch] for of, planned in alike for batch in planned]


def _told(progress: Progress, lengths: Sequence[int], documents: Sequence[int]) -> Callable[[Sequence[int]], None]:
    """What tells `progress` of a batch, given the sequences that were in it."""
    left = Counter(documents)

    def done(chosen: Sequence[int]) -> None:
        seen = [documents[n] for n in chosen]
        left.subtract(seen)
        progress(sum(lengths[n] for n in chosen), sum(left[document] == 0 for document in set(seen)))

    return done


def _rows(instrument: Instrument, sequences: pa.Table) -> list[_Row]:
    if instrument.images is None:
        ids = (np.asarray(row.as_py(), np.int64) for row in sequences["token_ids"])
        return [_Row(len(of_row), of_row) for of_row in ids]
    names = ("tokens", "image", "sha256")
    return [
        _Row(tokens, (image, sha256))
        for tokens, image, sha256 in zip(*(sequences[n].to_pylist() for n in names), strict=True)
    ]


def _measure_batches(
    instrument: Instrument,
    sequences: Sequence[_Row],
    planned: Sequence[list[int]],
    collector: Collector,
    done: Callable[[list[int]], None],
) -> None:
    """Measure every batch. One that does not fit into memory is done again in halves."""
    waiting = deque(planned)
    while waiting:
        chosen = waiting.popleft()
        rows = [sequences[n] for n in chosen]
        collector.begin(chosen)
        try:
            _observe(instrument, rows, collector)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise _too_long(rows[0], instrument, error) from error
            release_memory(error, instrument.encoder.device)
            middle = len(chosen) // 2
            waiting.extendleft((chosen[middle:], chosen[:middle]))
        else:
            done(chosen)


def _observe(instrument: Instrument, rows: list[_Row], collector: Collector) -> None:
    given = [row.given for row in rows]
    images = instrument.images
    inputs, batch = _batch(instrument, given) if images is None else _image_batch(instrument, images, given)
    with fixed_rng():  # nothing random goes into a dataset
        observe(
            instrument.encoder.model,
            instrument.layout,
            inputs,
            batch=batch,
            engine=instrument.engine,
            collector=collector,
        )


def _too_long(row: _Row, instrument: Instrument, error: Exception) -> Refusal:
    said = first_line(error)
    return Refusal(
        f"a sequence must fit into memory by itself; one of {row.tokens} tokens does not, on {instrument.encoder.device} "
        f"({said}); use a smaller --max-length, a --dtype of fewer bytes, or a machine with more memory"
    )


def _image_batch(
    instrument: Instrument, images: ImageCorpus, rows: list[tuple[str, str]]
) -> tuple[dict[str, Any], Batch]:
    """Pixels of the model's type, all of one shape: there is no padding."""
    pixels = np.stack([images.pixels(*row) for row in rows])
    (name,) = instrument.inputs
    given = _on(instrument.encoder.device, pixels).to(instrument.encoder.dtype)
    return {name: given}, Batch(len(rows), grids=images.grids)


def _batch(instrument: Instrument, rows: list[np.ndarray]) -> tuple[dict[str, Any], Batch]:
    """Right-padded inputs of the model, and what is known of them."""
    encoder = instrument.encoder
    tokens = max(len(row) for row in rows)
    padding = encoder.tokenizer.pad_token_id
    ids = np.full((len(rows), tokens), 0 if padding is None else padding, np.int64)
    real = np.zeros((len(rows), tokens), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)], real[place, : len(row)] = row, 1
    given, mask = _on(encoder.device, ids), _on(encoder.device, real)
    length = mask.sum(-1)
    if instrument.classes is None:
        known = {}
    else:
        classes = _on(encoder.device, instrument.classes[ids].astype(np.int64))
        known = {"ids": given, "classes": classes}
    inputs: dict[str, Any] = {} if instrument.special is None else _types(instrument, instrument.special, rows, tokens)
    texts = {}
    for name in instrument.inputs:
        inputs |= {name: given, MASK_OF[name]: mask}
        # to each input an axis of its own: queries and keys that share one are the same tokens
        texts[name] = Tokens(Axis(torch.zeros_like(length), length, tokens), **known)
    # a decoder keeps no cache for tokens that never come
    cached = getattr(getattr(encoder.model, "config", None), "use_cache", False) and accepts_input(
        encoder.model, "use_cache"
    )
    return inputs | ({"use_cache": False} if cached else {}), Batch(len(rows), texts)


def _types(
    instrument: Instrument, special: SpecialTokens, rows: list[np.ndarray], tokens: int
) -> dict[str, Int[torch.Tensor, "batch token"]]:
    """The token types that the tokenizer gives these sequences."""
    types = np.zeros((len(rows), tokens), np.int64)
    for place, row in enumerate(rows):
        types[place, : len(row)] = special.types_of(len(row))
    return {TOKEN_TYPES: _on(instrument.encoder.device, types)}


def _on(device: torch.device, values: np.ndarray) -> torch.Tensor:
    """The values on a device; CUDA fetches them from pinned memory by itself, while this thread goes on."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
