"""Measure the sequences of one shard: group them into batches, run the model, collect the rows of all tables."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from attlas.extract.batch_inputs import SequenceInput, batch_inputs, sequence_inputs
from attlas.extract.batching import batches, padded_positions
from attlas.extract.capture.rng import fixed_rng
from attlas.extract.capture.runtime.ablation import Ablating
from attlas.extract.capture.runtime.batch import Batch
from attlas.extract.capture.runtime.instrumented_pass import factors_for
from attlas.extract.capture.runtime.observer import BatchObserver
from attlas.extract.collector import Collector, open_collector
from attlas.extract.errors import Refusal, first_line
from attlas.extract.instrument import Instrument
from attlas.extract.measurement import attends_beyond_text, observe
from attlas.extract.memory import is_out_of_memory, release_memory
from attlas.extract.model.measured_model import MeasuredModel

Progress = Callable[[int, int], None]
# one batch keeps a device busy, and may be as large as memory allows
one_batch_at_a_time = threading.Lock()


def measure_sequences(
    instrument: Instrument,
    sequences: pa.Table,
    *,
    shard: int,
    batch_tokens: int,
    sample: int | None = None,
    ablating: Ablating | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """The measured tables of a shard, and the numbers of its positions and of the padded ones among them.

    sample: the number of sequences, from the first on, for which sampled columns are computed; None: all.
    ablating: what the table ablations leaves out, and how, if it is measured.
    Threads take turns at the model, and do everything before and after it concurrently.
    progress(tokens, documents): called after each batch with its tokens, and the number of documents whose last sequence was
    in it.
    """
    measured_model = instrument.measured_model
    inputs = sequence_inputs(instrument, sequences, sample=sample)
    lengths = [sequence.tokens for sequence in inputs]
    planned = plan_batches(measured_model, lengths, batch_tokens=batch_tokens)
    sequence_ids, document_ids = (sequences[name].to_numpy() for name in ("sequence_id", "document_id"))
    collector = open_collector(
        instrument.columns,
        measured_model.model,
        measured_model.layout,
        sequence_ids=sequence_ids,
        document_ids=document_ids,
        shard=shard,
        edges=instrument.edges,
        ablating=ablating,
    )
    report = _batch_progress(progress, lengths, document_ids.tolist()) if progress else (lambda batch: None)
    with one_batch_at_a_time:
        _measure_batches(instrument, inputs, planned, collector, report)
        of_parameters = collector.tables_of_parameters()
    # of the planned batches, so that a batch split for lack of memory does not change the manifest
    positions = padded_positions(lengths, planned)
    tables = collector.tables_of_passes() | of_parameters
    return tables, {"positions": positions, "padded": positions - sum(lengths)}


def plan_batches(measured_model: MeasuredModel, lengths: Sequence[int], *, batch_tokens: int) -> list[list[int]]:
    """Batches of sequences of similar length; of equal length, or of one, if padding or other sequences change results."""
    layout = measured_model.layout
    if layout.mixed:
        return [[n] for n in range(len(lengths))]
    if not (attends_beyond_text(layout) or measured_model.padding_matters):
        return batches(lengths, token_budget=batch_tokens)
    groups = (np.flatnonzero(np.asarray(lengths) == length).tolist() for length in sorted(set(lengths)))
    return [
        [group[n] for n in batch]
        for group in groups
        for batch in batches([lengths[n] for n in group], token_budget=batch_tokens)
    ]


def _batch_progress(
    progress: Progress, lengths: Sequence[int], documents: Sequence[int]
) -> Callable[[Sequence[int]], None]:
    """A function that reports a batch, given its sequences."""
    remaining = Counter(documents)

    def report(batch: Sequence[int]) -> None:
        in_batch = [documents[n] for n in batch]
        remaining.subtract(in_batch)
        progress(sum(lengths[n] for n in batch), sum(remaining[document] == 0 for document in set(in_batch)))

    return report


def _measure_batches(
    instrument: Instrument,
    sequences: Sequence[SequenceInput],
    planned: Sequence[list[int]],
    collector: Collector,
    report: Callable[[list[int]], None],
) -> None:
    """Measure every batch. One that does not fit into memory is split in halves."""
    waiting = deque(planned)
    measured_model = instrument.measured_model
    factors = factors_for(measured_model.model, measured_model.layout, collector.needs)
    while waiting:
        batch = waiting.popleft()
        collector.begin(batch)
        try:
            observe_batch(instrument, *batch_inputs(instrument, [sequences[n] for n in batch]), collector, factors)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise too_long(sequences[batch[0]], instrument, error) from error
            collector.drop()
            release_memory(error, instrument.encoder.device)
            middle = len(batch) // 2
            waiting.extendleft((batch[middle:], batch[:middle]))
        else:
            report(batch)


def observe_batch(
    instrument: Instrument,
    inputs: Mapping[str, Any],
    batch: Batch,
    collector: BatchObserver,
    factors: Mapping[int, Tensor] | None = None,
) -> None:
    """Run one measured pass of an instrument's model, as a run does. `factors`: see `observe`."""
    measured_model = instrument.measured_model
    with fixed_rng():  # nothing random enters a dataset
        observe(
            measured_model.model,
            measured_model.layout,
            inputs,
            batch=batch,
            engine=instrument.engine,
            collector=collector,
            factors=factors,
        )


def too_long(sequence: SequenceInput, instrument: Instrument, error: Exception) -> Refusal:
    """The refusal of a sequence that does not fit into memory by itself."""
    return Refusal(
        f"a sequence must fit into memory by itself; one of {sequence.tokens} tokens does not, on "
        f"{instrument.encoder.device} ({first_line(error)}); use a smaller --max-length, a --dtype of fewer bytes, or a "
        "machine with more memory"
    )
