"""One shard through the model: batches of like length, every sequence's numbers at its own place."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from extract.batching import batches, padded_positions
from extract.capture.watch import Batch
from extract.errors import Refusal
from extract.measurement import Collector, Measurements, heads_table, observe, profiles_table, residual_table
from extract.memory import is_out_of_memory, let_go

if TYPE_CHECKING:
    from extract.capture.layout import Layout
    from extract.encoder import Encoder
    from extract.engines import Engine


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


def measured_tables(
    instrument: Instrument, sequences: pa.Table, *, shard: int, progress: Callable[[int], None] | None = None
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """The measured tables of a shard, and its padded and total positions for the manifest.

    Threads that measure shards take turns at the model; what comes before and after it, they do side by side.
    """
    ids = [np.asarray(row.as_py(), np.int64) for row in sequences["token_ids"]]
    lengths = [len(row) for row in ids]
    planned = batches(lengths, token_budget=instrument.batch_tokens)
    with _ONE_AT_A_TIME:
        measured = _measured(instrument, ids, planned, progress or (lambda tokens: None))
    sequence_ids, document_ids = (sequences[n].to_numpy() for n in ("sequence_id", "document_id"))
    tables = {
        "heads": heads_table(measured, sequence_ids, document_ids),
        "profiles": profiles_table(measured, shard=shard),
    }
    if instrument.layout.residual_refusal is None:
        tables["residual"] = residual_table(measured, instrument.layout, sequence_ids, document_ids)
    # of the batches as planned: a day on which memory was short leaves the same manifest
    positions = padded_positions(lengths, planned)
    return tables, {"positions": positions, "padded": positions - sum(lengths)}


def _measured(
    instrument: Instrument, ids: Sequence[np.ndarray], planned: Sequence[list[int]], progress: Callable[[int], None]
) -> Measurements:
    """The sums of all sequences. A batch that does not fit into memory is done again in halves."""
    collector = Collector(len(ids))
    waiting = deque(planned)
    while waiting:
        chosen = waiting.popleft()
        rows = [ids[n] for n in chosen]
        collector.at(chosen)
        try:
            _observe(instrument, rows, collector)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise _too_long(rows[0], instrument, error) from error
            let_go(error, instrument.encoder.device)
            middle = len(chosen) // 2
            waiting.extendleft((chosen[middle:], chosen[:middle]))
        else:
            progress(sum(map(len, rows)))
    return collector.measured


def _observe(instrument: Instrument, rows: list[np.ndarray], collector: Collector) -> None:
    inputs, batch = _batch(instrument, rows)
    observe(
        instrument.encoder.model,
        instrument.layout,
        inputs,
        batch=batch,
        engine=instrument.engine,
        collector=collector,
    )


def _too_long(row: np.ndarray, instrument: Instrument, error: Exception) -> Refusal:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Refusal(
        f"a sequence must fit into memory by itself; one of {len(row)} tokens does not, on {instrument.encoder.device} "
        f"({said}); use a smaller --max-length, a --dtype of fewer bytes, or a machine with more memory"
    )


def _batch(instrument: Instrument, rows: list[np.ndarray]) -> tuple[dict[str, Any], Batch]:
    """Right-padded inputs of the model, and what is known of them."""
    encoder = instrument.encoder
    tokens = max(len(row) for row in rows)
    padding = encoder.tokenizer.pad_token_id
    ids = np.full((len(rows), tokens), 0 if padding is None else padding, np.int64)
    real = np.zeros((len(rows), tokens), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)], real[place, : len(row)] = row, 1
    inputs = {name: _on(encoder.device, of) for name, of in (("input_ids", ids), ("attention_mask", real))}
    length = inputs["attention_mask"].sum(-1)
    if instrument.classes is None:
        known = {}
    else:
        classes = _on(encoder.device, instrument.classes[ids].astype(np.int64))
        known = {"token_ids": inputs["input_ids"], "classes": classes}
    batch = Batch(torch.zeros_like(length), length, tokens, **known)
    # a decoder keeps no cache for tokens that never come
    cached = getattr(getattr(encoder.model, "config", None), "use_cache", False)
    return inputs | ({"use_cache": False} if cached else {}), batch


def _on(device: torch.device, values: np.ndarray) -> torch.Tensor:
    """The values on a device; CUDA fetches them from pinned memory by itself, while this thread goes on."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
