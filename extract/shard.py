"""One shard through the model: batches of like length, every sequence's numbers at its own place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from extract.batching import batches
from extract.capture import Batch
from extract.measurement import Collector, heads_table, observe, profiles_table, residual_table

if TYPE_CHECKING:
    from extract.pipeline import Job


def measured_tables(
    job: Job, shard: int, sequences: pa.Table, *, progress: Callable[[int], None] | None = None
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """The measured tables of a shard, and its padded and total positions for the manifest."""
    ids = [np.asarray(row.as_py(), np.int64) for row in sequences["token_ids"]]
    lengths = [len(row) for row in ids]
    collector = Collector(len(ids))
    positions = 0
    for chosen in batches(lengths, token_budget=job.run["batch_tokens"]):
        collector.at(chosen)
        inputs, batch = _batch(job, [ids[n] for n in chosen])
        observe(job.encoder.model, job.layout, inputs, batch=batch, engine=job.engine, collector=collector)
        positions += batch.tokens * len(chosen)
        if progress is not None:
            progress(sum(lengths[n] for n in chosen))
    sequence_ids, document_ids = (sequences[n].to_numpy() for n in ("sequence_id", "document_id"))
    tables = {
        "heads": heads_table(collector.measured, sequence_ids, document_ids),
        "profiles": profiles_table(collector.measured, shard=shard),
    }
    if job.layout.residual_refusal is None:
        tables["residual"] = residual_table(collector.measured, job.layout, sequence_ids, document_ids)
    return tables, {"positions": positions, "padded": positions - sum(lengths)}


def _batch(job: Job, rows: list[np.ndarray]) -> tuple[dict[str, Any], Batch]:
    """Right-padded inputs of the model, and what is known of them."""
    device = job.encoder.device
    tokens = max(len(row) for row in rows)
    padding = job.encoder.tokenizer.pad_token_id
    ids = np.full((len(rows), tokens), 0 if padding is None else padding, np.int64)
    real = np.zeros((len(rows), tokens), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)], real[place, : len(row)] = row, 1
    inputs = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(real).to(device)}
    known = job.options.tokens != "none"
    classes = (
        None if job.token_classes is None else torch.from_numpy(job.token_classes[ids].astype(np.int64)).to(device)
    )
    length = inputs["attention_mask"].sum(-1)
    batch = Batch(torch.zeros_like(length), length, tokens, inputs["input_ids"] if known else None, classes)
    return inputs | _quiet(job), batch


def _quiet(job: Job) -> dict[str, Any]:
    """A decoder keeps no cache for tokens that never come."""
    config = getattr(job.encoder.model, "config", None)
    return {"use_cache": False} if getattr(config, "use_cache", False) else {}
