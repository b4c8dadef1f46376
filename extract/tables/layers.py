"""`layers`: what a whole layer, all of its sublayers together, does to the residual stream of one sequence.

x is the stream before the layer's first sublayer, x' after its last. Columns are means over the sequence's real tokens. Every
function takes a `ResidualObservation` of which only x and x' are there, and gives a tensor [batch], NaN where undefined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from attlas.extract.engines.needs import Needs
from attlas.extract.engines.observations import ResidualObservation
from attlas.extract.tables.column import column, columns_of
from attlas.extract.tables.recording import DenseRecorder
from attlas.extract.tables.table import DOCUMENT_ID, LAYER, SEQUENCE_ID, STACK, Table

if TYPE_CHECKING:  # the catalogue is read by commands that need no torch
    from jaxtyping import Float
    from torch import Tensor

    from attlas.extract.engines.stream_profiles import SiteSums

    PerSequence = Float[Tensor, " batch"]


@column(formula="1 − mean of cos(x, x')", bounds=(0, 2), reference="ShortGPT 2024", nullable=True)
def block_influence(o: ResidualObservation) -> PerSequence | None:
    """How much the layer turns the stream: near 0, it could be left out."""
    return None if o.chords is None else o.mean(o.chords[0].square() / 2)


@column(formula="mean of arccos(cos(x, x')) ÷ π", bounds=(0, 1), reference="Gromov 2024", nullable=True)
def block_angle(o: ResidualObservation) -> PerSequence | None:
    """The same as an angle: 0 in the same direction, 1 in the opposite one."""
    return None if o.chords is None else o.mean(2 / math.pi * o.chords[0].atan2(o.chords[1]))


@column(formula="mean of ‖x'‖ / ‖x‖", bounds=(0, None), nullable=True)
def block_gain(o: ResidualObservation) -> PerSequence | None:
    """How much the layer grows the stream."""
    return None if o.stream_norms is None else o.mean(o.after_norms / o.stream_norms)


class LayerRecorder(DenseRecorder):
    """Keeps the columns of every layer."""

    def keep_layer(self, layer: Any, sums: SiteSums) -> Mapping[str, Tensor]:
        return {"values": sums.values}

    def facts(self, values: np.ndarray) -> dict[str, np.ndarray]:
        places = {name: place for place, name in enumerate(self.scope.needs.layer_names)}
        return {c.name: values[places[c.name]] for c in self.scope.columns}


TABLE = Table(
    name="layers",
    row="sequence × stack × layer",
    kind="dense",
    weight="tokens",
    of_stream=True,
    keys=(SEQUENCE_ID, DOCUMENT_ID, STACK, LAYER),
    facts=columns_of(dict(globals())),
    order=("stack", "layer", "sequence_id"),
    example="SELECT stack, layer, AVG({column}) AS {column} FROM layers GROUP BY ALL ORDER BY {column} LIMIT 5",
    needs=lambda columns: Needs(layers={c.name: c.compute for c in columns if c.compute is not None}),
    recorder=LayerRecorder,
    notes="A layer is there if the stream is known before its first sublayer and after its last.",
)
