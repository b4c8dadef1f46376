"""`weights`: what the matrices of each head do, from the parameters alone.

W_QK = W_Q W_Kᵀ · scale gives the scores of the states that a head reads, and W_OV = W_V W_O what it writes of them. Every
function takes a `LayerMaps` and gives an array [head], NaN where undefined, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from attlas.extract.tables.column import column, columns_of
from attlas.extract.tables.recording import Arrays, StaticRecorder, concatenate
from attlas.extract.tables.table import HEAD, LAYER, STACK, Rule, Table

if TYPE_CHECKING:  # the catalogue is read by commands that need no torch
    from jaxtyping import Float

    from attlas.extract.capture.head_maps import LowRank
    from attlas.extract.capture.layout import Attention

    PerHead = Float[np.ndarray, " head"]


class HeadProducts:
    """A Bᵀ of every head by small matrices: AᵀA, BᵀB and, if A Bᵀ is square, BᵀA.

    All that is known of a head with a parameter that is not finite is NaN; its matrices are 0, which have eigenvalues.
    """

    def __init__(self, product: LowRank) -> None:
        left, right = product.grams
        self.is_finite = np.asarray(np.isfinite(left).all((1, 2)) & np.isfinite(right).all((1, 2)))
        self.left, self.right = self._finite(left), self._finite(right)
        self.core = None if product.core is None else self._finite(product.core)

    def _finite(self, matrices: Float[np.ndarray, "head n n"]) -> Float[np.ndarray, "head n n"]:
        return np.where(self.is_finite[:, None, None], matrices, 0)

    @cached_property
    def norm(self) -> PerHead:
        return np.where(self.is_finite, np.sqrt(np.maximum((self.left * self.right).sum((1, 2)), 0)), np.nan)

    @cached_property
    def squared_singular_values(self) -> Float[np.ndarray, "head head_width"]:
        """The eigenvalues of Rᵀ AᵀA R with R Rᵀ = BᵀB: those of A Bᵀ times its transpose that are not zero."""
        root = _square_root(self.right)
        return np.maximum(np.linalg.eigvalsh(root.swapaxes(1, 2) @ self.left @ root), 0)

    @property
    def spectral(self) -> PerHead:
        return np.where(self.is_finite, np.sqrt(self.squared_singular_values.max(1)), np.nan)

    @property
    def effective_rank(self) -> PerHead:
        shares = _ratio(self.squared_singular_values, self.squared_singular_values.sum(1)[:, None])
        logarithms = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        return np.exp(-(shares * logarithms).sum(1))


def _square_root(grams: Float[np.ndarray, "head n n"]) -> Float[np.ndarray, "head n n"]:
    """R with R Rᵀ = G for every G; by eigenvectors, which take much longer, if one is singular."""
    try:
        return np.linalg.cholesky(grams)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(grams)
        return vectors * np.sqrt(np.maximum(values, 0))[:, None]


@dataclass(frozen=True)
class LayerMaps:
    """What the columns are functions of: W_QK and W_OV of a layer's heads, None where there is no such linear map."""

    query_key: HeadProducts | None
    output_value: HeadProducts | None
    is_self: bool  # queries and keys are of the same tokens


@column(formula="‖W_QK‖_F, W_QK = W_Q W_Kᵀ · scale of the scores (1/√d_h)", bounds=(0, None), nullable=True)
def qk_norm(maps: LayerMaps) -> PerHead | None:
    """How strongly what is read sets the scores; a head whose scores hardly depend on it is near 0."""
    return None if maps.query_key is None else maps.query_key.norm


@column(formula="largest singular value of W_QK", bounds=(0, None), nullable=True)
def qk_spectral(maps: LayerMaps) -> PerHead | None:
    """The most that a pair of states of norm 1 can score."""
    return None if maps.query_key is None else maps.query_key.spectral


@column(
    formula="exp −Σ s ln s, s = σ²/Σσ² of the singular values σ of W_QK; null if W_QK = 0",
    bounds=(1, None),
    reference="Roy 2007",
    nullable=True,
)
def qk_effective_rank(maps: LayerMaps) -> PerHead | None:
    """In how many directions a head compares queries with keys, at most the width of a head."""
    return None if maps.query_key is None else maps.query_key.effective_rank


@column(
    formula="‖(W_QK + W_QKᵀ)/2‖² / ‖W_QK‖²; null for cross-attention, or if W_QK = 0",
    bounds=(0, 1),
    nullable=True,
)
def qk_symmetry(maps: LayerMaps) -> PerHead | None:
    """Tokens score each other alike (1), the opposite of each other (0); ½ for unrelated queries and keys."""
    products = maps.query_key
    if products is None or products.core is None or not maps.is_self:
        return None
    trace = np.einsum("hij,hji->h", products.core, products.core)
    return np.clip(_ratio(products.norm**2 + trace, 2 * products.norm**2), 0, 1)


@column(formula="‖W_OV‖_F, W_OV = W_V W_O", bounds=(0, None), nullable=True)
def ov_norm(maps: LayerMaps) -> PerHead | None:
    """How much a head can write of what it reads; a head that is switched off is near 0."""
    return None if maps.output_value is None else maps.output_value.norm


@column(formula="largest singular value of W_OV", bounds=(0, None), nullable=True)
def ov_spectral(maps: LayerMaps) -> PerHead | None:
    """The most that a head writes of a state of norm 1."""
    return None if maps.output_value is None else maps.output_value.spectral


@column(
    formula="exp −Σ s ln s, s = σ²/Σσ² of the singular values σ of W_OV; null if W_OV = 0",
    bounds=(1, None),
    reference="Roy 2007",
    nullable=True,
)
def ov_effective_rank(maps: LayerMaps) -> PerHead | None:
    """How many directions a head passes on, at most the width of a head."""
    return None if maps.output_value is None else maps.output_value.effective_rank


@column(
    formula="Σ Re λ / Σ|λ| over the eigenvalues λ of W_OV; null for cross-attention, or if all are 0",
    bounds=(-1, 1),
    reference="Elhage 2021",
    nullable=True,
)
def ov_copying(maps: LayerMaps) -> PerHead | None:
    """Copies what it reads (towards 1), writes its opposite (towards −1)."""
    products = maps.output_value
    if products is None or products.core is None or not maps.is_self:
        return None
    values = np.linalg.eigvals(products.core)
    return np.clip(_ratio(values.real.sum(1), np.abs(values).sum(1)), -1, 1)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a/b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), np.nan), where=b > 0)


class WeightRecorder(StaticRecorder):
    """A row for every head of every attention layer."""

    def rows(self) -> Arrays:
        attentions = sorted(self.scope.layout.attentions, key=lambda a: (a.stack, a.layer))
        return concatenate([self._rows_of(attention) for attention in attentions], self)

    def _rows_of(self, attention: Attention) -> Arrays:
        from attlas.extract.capture.head_maps import head_maps

        maps = head_maps(self.scope.model, attention)
        query_key, output_value = maps.query_key, maps.output_value
        layer = LayerMaps(
            None if query_key is None else HeadProducts(query_key),
            None if output_value is None else HeadProducts(output_value),
            maps.is_self,
        )
        heads = attention.heads
        keys = {"stack": [attention.stack] * heads, "layer": [attention.layer] * heads, "head": range(heads)}
        return {name: np.asarray(values) for name, values in keys.items()} | {
            c.name: values_of(c.compute, layer, heads) for c in self.scope.columns
        }


def values_of(compute: Callable[[LayerMaps], PerHead | None] | None, layer: LayerMaps, heads: int) -> PerHead:
    """A column of a layer's heads, NaN where it is undefined."""
    values = None if compute is None else compute(layer)
    return np.full(heads, np.nan) if values is None else values


def _at_most_norm(name: str) -> Rule:
    return Rule(
        "norms",
        f"{name}_spectral > {name}_norm * 1.00001",
        f"{name}_spectral is above {name}_norm, the root of the sum of the squares of all singular values",
    )


TABLE = Table(
    name="weights",
    row="stack × layer × head",
    kind="static",
    is_newer=True,
    keys=(STACK, LAYER, HEAD),
    facts=columns_of(dict(globals())),
    order=("stack", "layer", "head"),
    recorder=WeightRecorder,
    rules=(_at_most_norm("qk"), _at_most_norm("ov")),
    notes="""\
From the parameters alone, in the first shard's part. Matrices act on row vectors: x W_Q, x W_K and x W_V are a head's query,
key and value of the state x that the layer reads, and c W_O is what it writes of its context c. They are what the modules
do, not what they store: adapters, quantisation and hooks count. Biases do not, nor do the gains and the centring of the norms
before and after, nor a cap of the scores. Heads that share keys and values are each counted with their group's. Where queries and keys are rotated by
their positions, W_QK is that of a query and a key at the same position. The scale is that of the model's own call.

All four `qk_` columns are null where scores are not bilinear in the states (queries and keys that are normalised or otherwise
changed after their projection, as with QK-norm), where they are made by two matrices in a row (latent attention), and where
the model computes scores itself, unless these are products of what two modules write, apart from terms of the positions alone
(which needs two sequences to be seen). All four `ov_` columns are null where values or what
reads the contexts are not one linear map each. The manifest's `layout` names the modules (`query`, `key`, `value`,
`projection`), or the reasons (`no_query_key`, `no_value`, `no_projection`).""",
)
