"""`edges`, on request: the strongest keys of each query, of the sequences of the sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attlas.extract.engines.needs import Needs
from attlas.extract.tables.column import Column
from attlas.extract.tables.patterns import OF_SAMPLE, sample_of
from attlas.extract.tables.queries import QUERY
from attlas.extract.tables.recording import RaggedRecorder
from attlas.extract.tables.table import DOCUMENT_ID, HEAD, LAYER, SEQUENCE_ID, STACK, Table

if TYPE_CHECKING:
    from torch import Tensor


class EdgeRecorder(RaggedRecorder):
    """Keeps the strongest keys of the measured rows of every layer; keys without weight are none."""

    def keep_heads(self, layer: Any, sums: Any, calls: Any) -> Mapping[str, Tensor] | None:
        import torch

        sample = sample_of(sums, calls)
        if sample is None:
            return None
        heads = sample.heads
        norms = heads.rows.get("value_norm")
        parts: list[dict[str, Tensor]] = []
        for block in heads.blocks():
            # stable: of equal weights the first key comes first, on every device
            weights, keys = block.pattern.sort(dim=-1, descending=True, stable=True)
            weights, keys = weights[..., : self.scope.edges], keys[..., : self.scope.edges] + block.keys.start
            sequence, head, row, rank = (weights * block.measured[..., None] > 0).nonzero(as_tuple=True)
            weight, place = weights[sequence, head, row, rank].double(), keys[sequence, head, row, rank]
            norm = weight * torch.nan if norms is None else weight * norms[sequence, head, place].double()
            parts.append(
                {
                    "sequence": sample.places[sequence],
                    "head": head,
                    "query": heads.visibility.queries.positions[sequence, row + block.first],
                    "rank": rank,
                    "key": heads.visibility.keys.positions[sequence, place],
                    "weight": weight,
                    "write_norm": norm,
                }
            )
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        wanted = {"sequence", "head", "query", "rank", *(c.name for c in self.scope.columns)}
        return {name: values for name, values in columns.items() if name in wanted}


TABLE = Table(
    name="edges",
    row="sequence × stack × layer × head × query × rank",
    kind="ragged",
    keys=(
        SEQUENCE_ID,
        DOCUMENT_ID,
        STACK,
        LAYER,
        HEAD,
        QUERY,
        Column(name="rank", dtype="int16", formula="number of the key in the order of weights, from 0"),
    ),
    facts=(
        Column(
            name="key",
            dtype="int32",
            unit="position",
            formula="position of the key j among the sequence's tokens, from 0; the first of equal weights comes first",
            bounds=(0, "n−1"),
        ),
        Column(name="weight", formula="p[i,j]", bounds=(0, 1)),
        Column(
            name="write_norm",
            formula="p[i,j]·‖v_j W_O^h‖; null where the values or the output projection are not known",
            bounds=(0, None),
            reference="Kobayashi 2020",
            nullable=True,
        ),
    ),
    order=("stack", "layer", "head", "sequence_id", "query", "rank"),
    on_request=True,
    example="SELECT layer, head, query, key, weight FROM edges WHERE sequence_id = 0 AND rank = 0 ORDER BY weight DESC LIMIT 5",
    needs=lambda columns: Needs(rows=frozenset({"value_norm"}), patterns=True),
    recorder=EdgeRecorder,
    notes=f"{OF_SAMPLE} At most `--edges` keys of a query, and none without weight.",
)
