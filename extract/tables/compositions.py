"""`compositions`: how much of what a head writes later heads read, from the parameters alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attlas.extract.tables.column import Column
from attlas.extract.tables.recording import Arrays, StaticRecorder, concatenate
from attlas.extract.tables.table import HEAD, LAYER, STACK, Table

if TYPE_CHECKING:
    from attlas.extract.capture.compositions import LayerPair

_SCORES = ("q_composition", "k_composition", "v_composition")


class CompositionRecorder(StaticRecorder):
    """A row for every pair of a head and a head of a later layer of its stack."""

    def rows(self) -> Arrays:
        layout = self.scope.layout
        return concatenate([part for stack in sorted(layout.stacks) for part in self._rows_of(stack)], self)

    def _rows_of(self, stack: str) -> list[Arrays]:
        """Sorted by layer, head, later layer, later head."""
        from attlas.extract.capture.compositions import layer_pairs

        by_layer: dict[int, list[LayerPair]] = {}
        for pair in layer_pairs(self.scope.model, stack, self.scope.layout.of(stack)):
            by_layer.setdefault(pair.layer, []).append(pair)
        return [
            _rows(stack, pairs, head)
            for _, pairs in sorted(by_layer.items())
            for head in range(pairs[0].scores.shape[1])
        ]


def _rows(stack: str, pairs: list[LayerPair], head: int) -> Arrays:
    """The rows of one head, with all heads of later layers."""
    counts = [pair.scores.shape[2] for pair in pairs]
    rows = sum(counts)
    scores = np.concatenate([pair.scores[:, head] for pair in pairs], axis=1)
    return {
        "stack": np.full(rows, stack),
        "layer": np.full(rows, pairs[0].layer),
        "head": np.full(rows, head),
        "later_layer": np.repeat([pair.later_layer for pair in pairs], counts),
        "later_head": np.concatenate([np.arange(count) for count in counts]),
        **dict(zip(_SCORES, scores, strict=True)),
        "random_composition": np.repeat([pair.random for pair in pairs], counts),
    }


def _score(name: str, formula: str, meaning: str) -> Column:
    return Column(
        name=name,
        formula=f"{formula}; null where there is no such map, or where one is 0",
        meaning=meaning,
        bounds=(0, 1),
        reference="Elhage 2021",
        nullable=True,
    )


TABLE = Table(
    name="compositions",
    row="stack × layer × head × later layer × later head",
    kind="static",
    is_newer=True,
    keys=(
        STACK,
        LAYER,
        HEAD,
        Column(name="later_layer", dtype="int16", formula="number of a later layer of the same stack"),
        Column(name="later_head", dtype="int16", formula="number of a head of the later layer"),
    ),
    facts=(
        _score(
            "q_composition",
            "‖W_OV W_QK‖ / (‖W_OV‖ ‖W_QK‖), W_OV of the head, W_QK of the later head",
            "How much of what the head writes the later head's queries read.",
        ),
        _score(
            "k_composition",
            "‖W_OV W_QKᵀ‖ / (‖W_OV‖ ‖W_QK‖)",
            "How much of what the head writes the later head's keys read: an induction head's keys read the previous-token head.",
        ),
        _score(
            "v_composition",
            "‖W_OV W_OV'‖ / (‖W_OV‖ ‖W_OV'‖), W_OV' of the later head",
            "How much of what the head writes the later head's values read: together they move tokens as one head would.",
        ),
        Column(
            name="random_composition",
            formula="(1 − v/8)/√d: mean of the scores for products of random Gaussian factors of the same shapes",
            meaning=(
                "What to compare the scores with. The mean of their squares is 1/d exactly; v = 2d²/((d−1)(d+2)) · e_A · e_B "
                "is its relative variance, e = (1+1/d)(d+r+1)/(rd) + (1+2/(rd))/d − 1/d for a product of rank r. "
                "Within 0.5 % of simulation for heads of width 4 and more."
            ),
            bounds=(0, 1),
        ),
    ),
    order=("stack", "layer", "head", "later_layer", "later_head"),
    recorder=CompositionRecorder,
    notes="""\
From the parameters alone, in the first shard's part; matrices as in `weights`, norms are Frobenius. Only within a stack whose
queries, keys and values are of the same tokens, so not for cross-attention, and only between layers of the same width. A pair
for which none of the three is defined has no row. What stands between the layers is left out: the gains and the centring of
norms are not folded into the matrices, nor are MLPs.""",
)
