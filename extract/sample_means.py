"""The means that ablations set parts of a model to: over the tokens of the sample of every shard."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import pyarrow as pa

from attlas.extract.batch_inputs import batch_inputs, sequence_inputs
from attlas.extract.capture.runtime.part_means import PartMeans, PartSums
from attlas.extract.capture.runtime.parts import Part
from attlas.extract.instrument import Instrument
from attlas.extract.memory import is_out_of_memory
from attlas.extract.shard import one_batch_at_a_time, too_long


def means_of_sample(
    instrument: Instrument,
    shards: Iterable[pa.Table],
    *,
    sample: int,
    kinds: Collection[Part],
    progress: Callable[[int], None],
) -> PartMeans:
    """The means over the first `sample` sequences of each shard, given as planned; a pass for each, in their order.

    progress(sequences): called after each pass with the number of sequences that are done.
    """
    measured_model = instrument.measured_model
    sums, done = PartSums(measured_model.model, measured_model.layout, kinds), 0
    for sequences in shards:
        for sequence in sequence_inputs(instrument, sequences.slice(0, sample), sample=None):
            inputs, _ = batch_inputs(instrument, [sequence])
            try:
                with one_batch_at_a_time:
                    sums.add(inputs)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise too_long(sequence, instrument, error) from error
            done += 1
            progress(done)
    return sums.means()
