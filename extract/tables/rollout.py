"""`rollout`, on request: attention followed through the layers (Abnar 2020), of the sequences of the sample.

Ã = (mean over heads of p + I)/2 is what a layer does to the tokens if every token keeps half of itself; the rollout to a layer is the
product of the Ã up to it. A row that is not measured keeps all of itself; a learned sink's share is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attlas.extract.engines.needs import Needs
from attlas.extract.tables.column import Column
from attlas.extract.tables.patterns import OF_SAMPLE, Sampled, sample_of
from attlas.extract.tables.recording import RaggedRecorder
from attlas.extract.tables.table import DOCUMENT_ID, LAYER, SEQUENCE_ID, STACK, Table

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class RolloutRecorder(RaggedRecorder):
    """Multiplies the layers of a batch as they come."""

    def begin_batch(self) -> None:
        self._rollouts: dict[str, Tensor] = {}
        self._broken: set[str] = set()

    def keep_heads(self, layer: Any, sums: Any, calls: Any) -> Mapping[str, Tensor] | None:
        sample = sample_of(sums, calls)
        if sample is None or sample.heads.visibility.is_cross_attention:
            return None
        step = _step(sample)
        before = self._rollouts.get(layer.stack)
        if layer.stack in self._broken or (before is not None and before.shape != step.shape):
            self._broken.add(layer.stack)  # the tokens of this layer are not those of the one before
            return None
        rollout = self._rollouts[layer.stack] = step if before is None else step @ before
        return {"sequence": sample.places, **_columns(rollout, sample)}


def _step(sample: Sampled) -> Float[Tensor, "sequence query key"]:
    """Ã of one layer; rows sum to 1."""
    import torch

    axis = sample.heads.visibility.queries
    step = torch.zeros(len(sample.places), axis.tokens, axis.tokens, dtype=torch.float64, device=axis.start.device)
    for block in sample.heads.blocks():
        step[:, block.rows, block.keys] = block.pattern.double().mean(1)
    total = step.sum(-1, keepdim=True)
    own = torch.eye(axis.tokens, dtype=step.dtype, device=step.device)
    return ((step / total.where(total > 0, 1)).where(total > 0, own) + own) / 2


def _columns(rollout: Float[Tensor, "sequence query key"], sample: Sampled) -> dict[str, Tensor]:
    """Means over the real tokens of each sequence."""
    axis = sample.heads.visibility.queries
    distance = (axis.place[None, :] - axis.place[:, None]).abs()
    first = axis.start[:, None, None].expand(*rollout.shape[:2], 1)
    of_rows = {
        "rollout_entropy_nats": -rollout.xlogy(rollout).sum(-1),
        "rollout_distance_tokens": (rollout * distance).sum(-1),
        "rollout_mass_first": rollout.gather(-1, first).squeeze(-1),
    }
    return {name: (rows * axis.real).sum(-1) / axis.length for name, rows in of_rows.items()}


TABLE = Table(
    name="rollout",
    row="sequence × stack × layer",
    kind="ragged",
    keys=(SEQUENCE_ID, DOCUMENT_ID, STACK, LAYER),
    facts=(
        Column(
            name="rollout_entropy_nats",
            unit="nats",
            formula="mean of −Σ_j r ln r, r the rows of the rollout to this layer",
            bounds=(0, "ln n"),
            reference="Abnar 2020",
        ),
        Column(name="rollout_distance_tokens", unit="tokens", formula="mean of Σ_j r·|d|", bounds=(0, "n−1")),
        Column(name="rollout_mass_first", formula="mean of r[i,0]", bounds=(0, 1)),
    ),
    order=("stack", "layer", "sequence_id"),
    on_request=True,
    example="SELECT stack, layer, AVG({column}) AS {column} FROM rollout GROUP BY ALL ORDER BY stack, layer",
    needs=lambda columns: Needs(patterns=True),
    recorder=RolloutRecorder,
    notes=f"{OF_SAMPLE} Self-attention alone; a stack ends where a layer has other tokens than the one before.",
)
