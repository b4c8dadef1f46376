"""`tokens`, on request: what happens to each token in each layer, of the sequences of the sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from attlas.extract.engines.needs import Needs
from attlas.extract.tables.column import Column
from attlas.extract.tables.patterns import OF_SAMPLE, sample_of
from attlas.extract.tables.recording import Arrays
from attlas.extract.tables.table import DOCUMENT_ID, LAYER, SEQUENCE_ID, STACK, Recorder, Scope, Table

if TYPE_CHECKING:
    from torch import Tensor

    from attlas.extract.engines.observations import ResidualObservation

_OF_HEADS = ("received_mass", "received_max", "entropy_nats")
_SUBLAYERS = ("attention", "mlp")
_OF_SITES = ("stream_norm", "attention_update_norm", "mlp_update_norm", "max_abs")


class TokenRecorder(Recorder):
    """Keeps values of tokens by layer, from its attention and from its residual sites, which come one after the other."""

    def __init__(self, table: Table, scope: Scope) -> None:
        super().__init__(table, scope)
        # by stack and layer, then by sequence: the columns, each with a value for each token
        self._values: dict[tuple[str, int], dict[int, Arrays]] = {}

    def keep_heads(self, layer: Any, sums: Any, calls: Any) -> Mapping[str, Tensor] | None:
        sample = sample_of(sums, calls)
        if sample is None or sample.heads.visibility.is_cross_attention:
            return None
        heads = sample.heads
        measured = heads.rows.measured
        shares = heads.received / measured.sum(-1, keepdim=True)
        entropy = heads.entropy.where(measured, 0).sum(1) / measured.sum(1)
        return {
            "sequence": sample.places,
            "real": heads.visibility.keys.real,
            "received_mass": heads.received.sum(1) / measured.sum((1, 2))[:, None],
            "received_max": shares.amax(1),
            "entropy_nats": entropy,
        }

    def keep_state(self, site: Any, o: ResidualObservation) -> Mapping[str, Tensor] | None:
        if o.update_norms is None or site.name not in _SUBLAYERS:
            return None
        chosen = o.sampled
        if not len(chosen):
            return None
        # the sites of a layer come in order: what the last one says of the stream stays
        return {
            "sequence": chosen,
            "real": o.real[chosen],
            f"{site.name}_update_norm": o.update_norms[chosen],
            "stream_norm": o.after_norms[chosen],
            "max_abs": o.after.abs().amax(-1)[chosen],
        }

    def add(self, place: Any, sequences: np.ndarray, kept: Mapping[str, np.ndarray]) -> None:
        columns = dict(kept)
        chosen, real = sequences[columns.pop("sequence")], columns.pop("real")
        of_layer = self._values.setdefault((place.stack, place.layer), {})
        for row, sequence in enumerate(chosen.tolist()):
            of_sequence = of_layer.setdefault(sequence, {})
            of_sequence |= {name: values[row][real[row]].astype(np.float64) for name, values in columns.items()}

    def rows(self) -> Arrays:
        names = [c.name for c in self.scope.columns]
        parts: list[Arrays] = []
        for (stack, layer), of_layer in sorted(self._values.items()):
            for sequence, columns in sorted(of_layer.items()):
                tokens = max(map(len, columns.values()))
                same = {name: values for name, values in columns.items() if len(values) == tokens}
                keys = {
                    "sequence_id": self.scope.sequence_ids[sequence],
                    "document_id": self.scope.document_ids[sequence],
                    "stack": stack,
                    "layer": layer,
                }
                parts.append(
                    {name: np.full(tokens, key) for name, key in keys.items()}
                    | {"token": np.arange(tokens)}
                    | {name: same.get(name, np.full(tokens, np.nan)) for name in names}
                )
        every = [c.name for c in self.table.keys] + names
        return {name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0) for name in every}


def _fact(name: str, formula: str, *, unit: str = "", bounds: Any = (0, None)) -> Column:
    return Column(name=name, formula=formula, unit=unit, bounds=bounds, nullable=True)


TABLE = Table(
    name="tokens",
    row="sequence × stack × layer × token",
    kind="ragged",
    keys=(
        SEQUENCE_ID,
        DOCUMENT_ID,
        STACK,
        LAYER,
        Column(name="token", dtype="int32", formula="position of the token in its sequence, from 0"),
    ),
    facts=(
        _fact("received_mass", "Σ_i p[i,j] over the rows of all heads ÷ their number", bounds=(0, 1)),
        _fact("received_max", "the largest over heads of Σ_i p[i,j] ÷ the head's rows", bounds=(0, 1)),
        _fact("entropy_nats", "mean over heads of H_i of the token's own row", unit="nats", bounds=(0, "ln n")),
        _fact("stream_norm", "‖x'‖ after the last sublayer of the layer"),
        _fact("attention_update_norm", "‖F(x)‖ of the attention sublayer"),
        _fact("mlp_update_norm", "‖F(x)‖ of the MLP sublayer"),
        _fact("max_abs", "max |x'| after the last sublayer of the layer"),
    ),
    order=("stack", "layer", "sequence_id", "token"),
    on_request=True,
    example="SELECT sequence_id, layer, token, {column} FROM tokens ORDER BY {column} DESC LIMIT 5",
    needs=lambda columns: Needs(rows=frozenset({"received", "entropy"}), patterns=True, states=True),
    recorder=TokenRecorder,
    notes=f"{OF_SAMPLE} Columns of the stream are null where it is not known, columns of attention where a layer attends over windows.",
)
