"""`pairs`: how alike the patterns of two heads are, as float64 sums over rows, which merge by addition.

Patterns of all layers are compared once a batch has gone through, by matrix products over some of the rows of each sequence of the
sample. A learned sink is one more key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from attlas.extract.engines.needs import Needs
from attlas.extract.tables.column import Column
from attlas.extract.tables.patterns import call_over_sequences
from attlas.extract.tables.recording import AdditiveRecorder
from attlas.extract.tables.table import HEAD, LAYER, SHARD, STACK, Rule, Table

if TYPE_CHECKING:
    from jaxtyping import Float, Float64
    from torch import Tensor

    from attlas.extract.engines.rows import ChosenRows

# rows of a sequence that are compared: all, or as many as these, evenly spaced
MOST_ROWS = 16
_WEIGHTS_AT_ONCE = 1 << 23
_SUMS = ("bhattacharyya", "product", "jensen_shannon_nats", "rows")


class PairRecorder(AdditiveRecorder):
    """Adds up the comparisons of all heads of a stack: `sums` [4, head, other head], heads of all layers in a row."""

    def begin_batch(self) -> None:
        self._chosen: dict[Any, ChosenRows] = {}

    def keep_heads(self, layer: Any, sums: Any, calls: Any) -> None:
        call = call_over_sequences(sums, calls)
        rows = None if call is None else call.chosen_rows(MOST_ROWS)
        if rows is not None:
            self._chosen[layer] = rows

    def end_batch(self) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        for stack in dict.fromkeys(layer.stack for layer in self._chosen):
            yield stack, {"sums": self._compare_stack(stack)[None]}
        self._chosen = {}

    def _compare_stack(self, stack: str) -> Float[Tensor, "4 head head"]:
        """Sums over the chosen rows. Layers whose patterns have another shape, such as pooled ones, are compared among themselves."""
        first_heads, heads = _first_heads(self.scope.layout.of(stack))
        layers = {layer: chosen for layer, chosen in self._chosen.items() if layer.stack == stack}
        shapes = {layer: (chosen.patterns.shape[0], *chosen.patterns.shape[2:]) for layer, chosen in layers.items()}
        total = next(iter(layers.values())).patterns.new_zeros(len(_SUMS), heads, heads).double()
        for shape in dict.fromkeys(shapes.values()):
            of_shape = [layer for layer in layers if shapes[layer] == shape]
            places = [first_heads[layer] + head for layer in of_shape for head in range(layer.heads)]
            compared = _compare([layers[layer] for layer in of_shape])
            index = compared.new_tensor(places).long()
            total[:, index[:, None], index] = compared
        return total

    def rows(self) -> dict[str, Any]:
        parts = [self._rows_of(stack, sums) for stack, sums in sorted(self.sums.get("sums", {}).items())]
        names = [c.name for c in (*self.table.keys, *self.table.facts)]
        return {name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0) for name in names}

    def _rows_of(self, stack: str, sums: np.ndarray) -> dict[str, np.ndarray]:
        """A row for each pair of heads that has rows, each pair once, the head that comes first in the model first."""
        layers = self.scope.layout.of(stack)
        layer_of = np.repeat([layer.layer for layer in layers], [layer.heads for layer in layers])
        head_of = np.concatenate([np.arange(layer.heads) for layer in layers])
        order = np.lexsort((head_of, layer_of))
        sums, layer_of, head_of = sums[:, order][:, :, order], layer_of[order], head_of[order]
        one, other = np.nonzero(np.triu(sums[-1] > 0))
        columns = {
            "shard": np.full(len(one), self.scope.shard),
            "stack": np.full(len(one), stack),
            "layer": layer_of[one],
            "head": head_of[one],
            "other_layer": layer_of[other],
            "other_head": head_of[other],
        }
        columns |= {name: sums[number, one, other] for number, name in enumerate(_SUMS)}
        columns["jensen_shannon_nats"] = np.where(
            layer_of[one] == layer_of[other], columns["jensen_shannon_nats"], np.nan
        )
        return columns


def _first_heads(layers: Any) -> tuple[dict[Any, int], int]:
    """The place of each layer's first head among the heads of all layers, and their number."""
    places, heads = {}, 0
    for layer in layers:
        places[layer] = heads
        heads += layer.heads
    return places, heads


def _compare(layers: list[ChosenRows]) -> Float[Tensor, "4 head head"]:
    """The four sums of all pairs of heads of these layers; the divergence is 0 between layers."""
    import torch

    alike, product = (torch.zeros((), dtype=torch.float64, device=layers[0].patterns.device) for _ in range(2))
    for sequences, rows in _pieces(layers):
        patterns = torch.cat([layer.patterns[sequences, :, rows] for layer in layers], 1).flatten(2)
        product = product + _sum_of_products(patterns)
        alike = alike + _sum_of_products(patterns.sqrt_())
    measured = torch.cat([layer.measured for layer in layers], 1).double()
    return torch.stack((alike, product, torch.block_diag(*_divergences(layers)), _sum_of_products(measured)))


def _pieces(layers: list[ChosenRows]) -> Iterator[tuple[slice, slice]]:
    """Sequences and rows whose patterns in all layers are compared at once."""
    sequences, _, rows, _ = layers[0].patterns.shape
    at_once = max(1, sequences * rows * _WEIGHTS_AT_ONCE // sum(layer.patterns.numel() for layer in layers))
    sizes = (1, at_once) if at_once < rows else (at_once // rows, rows)
    for sequence in range(0, sequences, sizes[0]):
        for row in range(0, rows, sizes[1]):
            yield slice(sequence, sequence + sizes[0]), slice(row, row + sizes[1])


def _sum_of_products(x: Float[Tensor, "sequence head number"]) -> Float64[Tensor, "head head"]:
    import torch

    return (x @ x.mT).sum(0, dtype=torch.float64)


def _divergences(layers: list[ChosenRows]) -> list[Float64[Tensor, "head head"]]:
    """Σ over rows of the Jensen–Shannon divergence of each pair of heads of each layer, for layers of as many heads at once."""
    import torch

    divergences: dict[int, Tensor] = {}
    heads = [layer.measured.shape[1] for layer in layers]
    for number in dict.fromkeys(heads):
        places = [place for place, of_layer in enumerate(heads) if of_layer == number]
        mixed = torch.stack([layers[place].mixed for place in places])
        own = mixed.diagonal(dim1=-2, dim2=-1)
        measured = torch.stack([layers[place].measured for place in places]).transpose(-1, -2)
        of_rows = (mixed - (own[..., None] + own[..., None, :]) / 2).clamp_min(0)
        both = measured[..., None] & measured[..., None, :]
        sums = (of_rows * both).sum((1, 2), dtype=torch.float64).triu(1)
        divergences |= zip(places, sums + sums.mT, strict=True)
    return [divergences[place] for place in range(len(layers))]


def _sum(
    name: str, formula: str, meaning: str, *, bounds: tuple[float | str | None, ...], reference: str = ""
) -> Column:
    low, high = bounds
    return Column(
        name=name,
        dtype="float64",
        unit="nats" if name.endswith("nats") else "",
        formula=formula,
        meaning=meaning,
        bounds=(low, high),
        reference=reference,
        nullable=name.endswith("nats"),
    )


_MORE = 1 + 1e-4  # than a sum of float32 products may exceed its bound
TABLE = Table(
    name="pairs",
    row="shard × head × other head",
    kind="additive",
    keys=(
        SHARD,
        STACK,
        LAYER,
        HEAD,
        Column(name="other_layer", dtype="int16", formula="number of the other head's layer, at least `layer`"),
        Column(name="other_head", dtype="int16", formula="number of the other head within its layer"),
    ),
    facts=(
        _sum(
            "bhattacharyya",
            "Σ over rows of Σ_j √(p_j q_j)",
            "Divided by rows: 1 if the two patterns are equal, 0 if they look at different keys.",
            bounds=(0, "rows"),
        ),
        _sum(
            "product",
            "Σ over rows of Σ_j p_j q_j",
            "The cosine of two patterns is this, divided by the root of the product of both heads' own.",
            bounds=(0, "rows"),
        ),
        _sum(
            "jensen_shannon_nats",
            "Σ over rows of H((p+q)/2) − (H(p)+H(q))/2; null between layers",
            "Divided by rows: 0 if the two patterns are equal, ln 2 if they look at different keys.",
            bounds=(0, "rows · ln 2"),
            reference="Clark 2019",
        ),
        _sum("rows", "rows measured in both heads", "What to divide the sums by.", bounds=(0, None)),
    ),
    order=("stack", "layer", "head", "other_layer", "other_head"),
    is_newer=True,
    example="SELECT layer, head, other_layer, other_head, SUM({column}) / SUM(rows) AS {column} FROM pairs WHERE layer <> other_layer OR head <> other_head GROUP BY ALL ORDER BY 5 DESC LIMIT 5",
    needs=lambda columns: Needs(patterns=True),
    recorder=PairRecorder,
    rules=(
        Rule("pairs", f"bhattacharyya > rows * {_MORE} OR product > bhattacharyya * {_MORE}", "more alike than equal"),
        Rule("pairs", f"jensen_shannon_nats > rows * {math.log(2) * _MORE}", "further apart than different keys"),
        Rule(
            "pairs",
            "layer > other_layer OR (layer = other_layer AND head > other_head)",
            "a pair stands with its first head first",
        ),
    ),
    notes=f"Over at most {MOST_ROWS} evenly spaced rows of each sequence of the sample. A pair stands once; with itself, for the Σ p².",
)
