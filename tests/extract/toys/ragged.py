"""A ragged table on request: a row for each measured query of each head."""

import torch

from attlas.extract.engines.needs import Needs
from attlas.extract.tables import Table
from attlas.extract.tables.column import Column
from attlas.extract.tables.recording import RaggedRecorder
from attlas.extract.tables.table import DOCUMENT_ID, HEAD, LAYER, SEQUENCE_ID, STACK


class QueryRecorder(RaggedRecorder):
    def keep_heads(self, layer, sums, calls):
        (call,) = calls
        sequence, head, place = call.rows.measured.nonzero(as_tuple=True)
        return {
            "sequence": sequence,
            "head": head,
            "query": torch.gather(call.visibility.queries.positions[sequence], 1, place[:, None])[:, 0],
            "row_entropy_nats": call.rows["entropy"][sequence, head, place],
        }


TABLE = Table(
    name="toy_queries",
    row="sequence × stack × layer × head × query",
    kind="ragged",
    keys=(SEQUENCE_ID, DOCUMENT_ID, STACK, LAYER, HEAD, Column(name="query", dtype="int32", formula="position")),
    facts=(Column(name="row_entropy_nats", formula="H_i", unit="nats", bounds=(0, "ln n")),),
    order=("stack", "layer", "head", "sequence_id", "query"),
    on_request=True,
    needs=lambda columns: Needs(rows=frozenset({"entropy"})),
    recorder=QueryRecorder,
)
