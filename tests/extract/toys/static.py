"""A static table: once per run, from the parameters alone."""

from attlas.extract.tables import Table
from attlas.extract.tables.column import Column
from attlas.extract.tables.recording import StaticRecorder
from attlas.extract.tables.table import HEAD, LAYER, STACK


class ValueRecorder(StaticRecorder):
    def rows(self):
        columns = {"stack": [], "layer": [], "head": [], "value_weight_norm": []}
        for layer in self.scope.layout.attentions:
            weight = self.scope.model.get_submodule(layer.module).value.weight.unflatten(0, (layer.heads, -1))
            for head, norm in enumerate(weight.flatten(1).norm(dim=1).tolist()):
                for name, value in zip(columns, (layer.stack, layer.layer, head, norm), strict=True):
                    columns[name].append(value)
        return columns


TABLE = Table(
    name="toy_weights",
    row="stack × layer × head",
    kind="static",
    keys=(STACK, LAYER, HEAD),
    facts=(Column(name="value_weight_norm", formula="‖W_V^h‖", bounds=(0, None)),),
    order=("stack", "layer", "head"),
    recorder=ValueRecorder,
)
