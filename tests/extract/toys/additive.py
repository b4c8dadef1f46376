"""An additive table: sums of a shard that agree with the rows of `heads`."""

from attlas.extract.engines.needs import Needs
from attlas.extract.tables import Agreement, Table
from attlas.extract.tables.column import Column
from attlas.extract.tables.recording import AdditiveRecorder
from attlas.extract.tables.table import LAYER, SHARD, STACK


class CountRecorder(AdditiveRecorder):
    def keep_heads(self, layer, sums, calls):
        return {"totals": sums.values[self.scope.needs.head_names.index("rows")].sum()}

    def rows(self):
        places = sorted(self.sums["totals"], key=lambda layer: (layer.stack, layer.layer))
        return {
            "shard": [self.scope.shard] * len(places),
            "stack": [place.stack for place in places],
            "layer": [place.layer for place in places],
            "rows_of_heads": [float(self.sums["totals"][place]) for place in places],
        }


TABLE = Table(
    name="toy_counts",
    row="shard × stack × layer",
    kind="additive",
    keys=(SHARD, STACK, LAYER),
    facts=(Column(name="rows_of_heads", dtype="float64", formula="measured rows of all heads", bounds=(0, None)),),
    order=("stack", "layer"),
    needs=lambda columns: Needs(head_quantities=frozenset({"rows"})),
    recorder=CountRecorder,
    agreements=(
        Agreement(
            "toy sums",
            "heads",
            by=("stack", "layer"),
            this="SUM(rows_of_heads)",
            that="SUM(query_rows)",
            message="layers whose rows are not those of their heads",
        ),
    ),
)
