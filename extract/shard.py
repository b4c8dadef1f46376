"""One shard through the model: batches of like length, every sequence's numbers at its own place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from extract.batching import batches
from extract.capture.watch import Batch
from extract.measurement import Collector, heads_table, observe, profiles_table, residual_table

if TYPE_CHECKING:
    from extract.capture.layout import Layout
    from extract.encoder import Encoder
    from extract.engines import Engine


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
    """The measured tables of a shard, and its padded and total positions for the manifest."""
    ids = [np.asarray(row.as_py(), np.int64) for row in sequences["token_ids"]]
    lengths = [len(row) for row in ids]
    collector = Collector(len(ids))
    positions = 0
    for chosen in batches(lengths, token_budget=instrument.batch_tokens):
        collector.at(chosen)
        inputs, batch = _batch(instrument, [ids[n] for n in chosen])
        observe(
            instrument.encoder.model,
            instrument.layout,
            inputs,
            batch=batch,
            engine=instrument.engine,
            collector=collector,
        )
        positions += batch.tokens * len(chosen)
        if progress is not None:
            progress(sum(lengths[n] for n in chosen))
    sequence_ids, document_ids = (sequences[n].to_numpy() for n in ("sequence_id", "document_id"))
    tables = {
        "heads": heads_table(collector.measured, sequence_ids, document_ids),
        "profiles": profiles_table(collector.measured, shard=shard),
    }
    if instrument.layout.residual_refusal is None:
        tables["residual"] = residual_table(collector.measured, instrument.layout, sequence_ids, document_ids)
    return tables, {"positions": positions, "padded": positions - sum(lengths)}


def _batch(instrument: Instrument, rows: list[np.ndarray]) -> tuple[dict[str, Any], Batch]:
    """Right-padded inputs of the model, and what is known of them."""
    encoder = instrument.encoder
    tokens = max(len(row) for row in rows)
    padding = encoder.tokenizer.pad_token_id
    ids = np.full((len(rows), tokens), 0 if padding is None else padding, np.int64)
    real = np.zeros((len(rows), tokens), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)], real[place, : len(row)] = row, 1
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(real)}
    inputs = {name: tensor.to(encoder.device) for name, tensor in inputs.items()}
    length = inputs["attention_mask"].sum(-1)
    if instrument.classes is None:
        known = {}
    else:
        classes = torch.from_numpy(instrument.classes[ids].astype(np.int64)).to(encoder.device)
        known = {"token_ids": inputs["input_ids"], "classes": classes}
    batch = Batch(torch.zeros_like(length), length, tokens, **known)
    # a decoder keeps no cache for tokens that never come
    cached = getattr(getattr(encoder.model, "config", None), "use_cache", False)
    return inputs | ({"use_cache": False} if cached else {}), batch
