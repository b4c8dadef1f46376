"""A dense table: a row for each sequence and layer."""

from attlas.extract.engines.needs import Needs
from attlas.extract.tables import Rule, Table
from attlas.extract.tables.column import Column
from attlas.extract.tables.recording import DenseRecorder
from attlas.extract.tables.table import DOCUMENT_ID, LAYER, SEQUENCE_ID, STACK


class LayerRecorder(DenseRecorder):
    def keep_heads(self, layer, sums, calls):
        names = self.scope.needs.head_names
        entropy, rows = (sums.values[names.index(name)] for name in ("entropy", "rows"))
        return {"values": (entropy.sum(-1) / rows.sum(-1))[None]}

    def facts(self, values):
        return {"layer_entropy_nats": values[0]}


TABLE = Table(
    name="toy_layers",
    row="sequence × stack × layer",
    kind="dense",
    keys=(SEQUENCE_ID, DOCUMENT_ID, STACK, LAYER),
    facts=(
        Column(
            name="layer_entropy_nats", formula="mean of H_i over rows of all heads", unit="nats", bounds=(0, "ln n")
        ),
    ),
    order=("stack", "layer", "sequence_id"),
    needs=lambda columns: Needs(head_quantities=frozenset({"entropy", "rows"})),
    recorder=LayerRecorder,
    rules=(Rule("toy", "layer_entropy_nats > 5", "more entropy than a toy has"),),
)
