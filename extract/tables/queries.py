"""`queries`, on request: what a single row of a pattern is, of the sequences of the sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from attlas.extract.engines.needs import Needs
from attlas.extract.tables.column import Column
from attlas.extract.tables.patterns import OF_SAMPLE, sample_of
from attlas.extract.tables.recording import RaggedRecorder
from attlas.extract.tables.table import DOCUMENT_ID, HEAD, LAYER, SEQUENCE_ID, STACK, Table

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from attlas.extract.engines.block import Block

QUERY = Column(name="query", dtype="int32", formula="position of the query i among the sequence's tokens, from 0")
# columns that are row quantities as they are, by the names of those
_QUANTITIES = {
    "entropy_nats": "entropy",
    "collision_probability": "collision",
    "max_weight": "max_weight",
    "distance_tokens": "distance",
    "offset_tokens": "offset",
    "offset_std_tokens": "offset_std",
    "mass_sink": "sink",
    "score_max": "score_max",
    "score_mean": "score_mean",
    "context_norm": "context_norm",
    "output_norm": "output_norm",
}


def _first(block: Block) -> Float[Tensor, "batch head row"]:
    """Weights of the rows on the first token of their sequence."""
    first = block.call.visibility.keys.start - block.keys.start
    within = (first >= 0) & (first < block.pattern.shape[-1])
    index = first.clamp(0, block.pattern.shape[-1] - 1)[:, None, None, None].expand(*block.pattern.shape[:-1], 1)
    return block.pattern.gather(-1, index).squeeze(-1) * within[:, None, None]


def _own(block: Block) -> Float[Tensor, "batch head row"] | None:
    """Weights of the rows on themselves; None where queries and keys are different tokens."""
    if block.call.visibility.is_cross_attention:
        return None
    return (block.pattern * (block.distances == 0)).sum(-1)


# columns that are read from blocks of the pattern
_FROM_BLOCKS: dict[str, Callable[[Block], Any]] = {
    "max_key": lambda block: (
        block.pattern.argmax(-1) + block.keys.start - block.call.visibility.keys.start[:, None, None]
    ),
    "mass_self": _own,
    "mass_first": _first,
}


class QueryRecorder(RaggedRecorder):
    """Keeps the measured rows of every layer."""

    def keep_heads(self, layer: Any, sums: Any, calls: Any) -> Mapping[str, Tensor] | None:
        import torch

        sample = sample_of(sums, calls)
        if sample is None:
            return None
        rows, visibility = sample.heads.rows, sample.heads.visibility
        columns = {name: rows[quantity] for name, quantity in _QUANTITIES.items() if quantity in rows}
        parts: dict[str, list[Tensor]] = {name: [] for name in _FROM_BLOCKS}
        for block in sample.heads.blocks():
            for name, compute in _FROM_BLOCKS.items():
                values = compute(block)
                if values is not None:
                    parts[name].append(values)
        columns |= {name: torch.cat(values, -1) for name, values in parts.items() if values}
        sequence, head, place = rows.measured.nonzero(as_tuple=True)
        kept = {
            c.name: columns[c.name][sequence, head, place].double() for c in self.scope.columns if c.name in columns
        }
        unknown = {c.name for c in self.scope.columns} - kept.keys()
        query = visibility.queries.positions[sequence, place]
        return {
            "sequence": sample.places[sequence],
            "head": head,
            "query": query,
            **kept,
            **{name: query.double() * torch.nan for name in unknown},
        }


def _fact(
    name: str, formula: str, *, unit: str = "", dtype: Any = "float32", bounds: Any, nullable: bool = False
) -> Column:
    return Column(name=name, formula=formula, unit=unit, dtype=dtype, bounds=bounds, nullable=nullable)


TABLE = Table(
    name="queries",
    row="sequence × stack × layer × head × query",
    kind="ragged",
    keys=(SEQUENCE_ID, DOCUMENT_ID, STACK, LAYER, HEAD, QUERY),
    facts=(
        _fact("entropy_nats", "H_i = −Σ_j p ln p", unit="nats", bounds=(0, "ln n")),
        _fact("collision_probability", "Σ_j p²", bounds=(0, 1)),
        _fact("max_weight", "max_j p", bounds=(0, 1)),
        _fact(
            "max_key",
            "the j of max_weight (lowest on ties)",
            unit="position",
            dtype="int32",
            bounds=(0, "n−1"),
        ),
        _fact("distance_tokens", "Σ_j p·|d|", unit="tokens", bounds=(0, "n−1"), nullable=True),
        _fact("offset_tokens", "Σ_j p·d", unit="tokens", bounds=("−(n−1)", "n−1"), nullable=True),
        _fact("offset_std_tokens", "√(Σ_j p d² − (Σ_j p d)²)", unit="tokens", bounds=(0, None), nullable=True),
        _fact("mass_self", "p[i,i]", bounds=(0, 1), nullable=True),
        _fact("mass_first", "p[i,0]", bounds=(0, 1)),
        _fact("mass_sink", "mass of the learned sink; null where there is none", bounds=(0, 1), nullable=True),
        _fact(
            "score_max",
            "max of s over visible keys; null where only the pattern is seen",
            bounds=(None, None),
            nullable=True,
        ),
        _fact("score_mean", "mean of s over visible keys; null where score_max is", bounds=(None, None), nullable=True),
        _fact("context_norm", "‖c_i‖, c_i = Σ_j p v_j before W_O", bounds=(0, None)),
        _fact("output_norm", "‖c_i W_O^h‖", bounds=(0, None), nullable=True),
    ),
    order=("stack", "layer", "head", "sequence_id", "query"),
    on_request=True,
    example="SELECT layer, head, query, {column} FROM queries WHERE sequence_id = 0 ORDER BY {column} DESC LIMIT 5",
    needs=lambda columns: Needs(
        rows=frozenset(_QUANTITIES[c.name] for c in columns if c.name in _QUANTITIES), patterns=True
    ),
    recorder=QueryRecorder,
    notes=f"{OF_SAMPLE} Rows that are not measured have none here; columns about distance are null in `cross`. "
    "Layers that attend over windows of a sequence have no rows.",
)
