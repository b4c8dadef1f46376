"""Quantities by name: what an engine measures of one attention call.

A record here, a function in the reference engine (`engines/reference.py`), and a column that uses the quantity are all
that a new one needs: the place of each in buffers and in compiled code follows from its name, and an engine that does
not make it yet is complemented by the reference engine, for that quantity alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

# what an attention call has, or has not: the scores themselves rather than only the pattern; one axis of positions for
# queries and keys; the tokens' ids; the classes of its keys; the values; the output projection; a learned sink; the grid
# of an image's patches
Fact = Literal["scores", "positions", "token_ids", "classes", "values", "projection", "sink", "grid"]
# how a number of a head in one window of a sequence becomes that of the whole sequence; None: it is not known then
Merge = Literal["sum", "max"]

TOKEN_CLASSES = ("bos", "separator", "special", "whitespace", "punctuation", "number", "word_start", "subword")


@dataclass(frozen=True, kw_only=True)
class RowQuantity:
    """A quantity of the rows of a pattern.

    `axis` says what there is one of: a number for each query (of its row), key or distance (sums over rows), or for the
    whole head. A row that is not measured (padding, fully masked, non-finite scores) has 0 and adds to no sum. `merge`
    says how the rows of a head become one number of the sequence: by their sum, by the largest, or, where it is None, not
    at all. It is known of calls that have all that it `needs`.
    """

    name: str
    formula: str
    axis: Literal["query", "key", "distance", "head"] = "query"
    merge: Merge | None = "sum"
    needs: tuple[Fact, ...] = ()


ROW_QUANTITIES: dict[str, RowQuantity] = {
    quantity.name: quantity
    for quantity in (
        RowQuantity(name="entropy", formula="−Σ p ln p, nats; a learned sink is one more outcome"),
        RowQuantity(name="collision", formula="Σ p²"),
        RowQuantity(name="max_weight", formula="max p"),
        RowQuantity(name="distance", formula="Σ p·|d|", needs=("positions",)),
        RowQuantity(name="offset", formula="Σ p·d", needs=("positions",)),
        RowQuantity(name="offset_std", formula="√(Σ p d² − (Σ p d)²)", needs=("positions",)),
        RowQuantity(name="score_max", formula="max s over visible keys", merge="max", needs=("scores",)),
        RowQuantity(name="score_mean", formula="mean of s over visible keys", merge=None, needs=("scores",)),
        RowQuantity(name="score_variance", formula="variance of s over visible keys", merge=None, needs=("scores",)),
        RowQuantity(name="context_norm", formula="‖c‖, c = Σ p v"),
        RowQuantity(name="output_norm", formula="‖c W_O^h‖", needs=("projection",)),
        RowQuantity(name="sink", formula="mass of the learned sink", needs=("sink",)),
        RowQuantity(name="received", formula="Σ_i p[i, key]", axis="key", merge=None),
        RowQuantity(name="value_norm", formula="‖v W_O^h‖", axis="key", merge=None, needs=("projection", "values")),
        RowQuantity(
            name="offsets",
            formula="Σ_i p[i, i+d] at index d + queries − 1",
            axis="distance",
            merge=None,
            needs=("positions",),
        ),
        RowQuantity(
            name="same_token",
            formula="Σ_i Σ_j p over j ≠ i with the same id",
            axis="head",
            needs=("positions", "token_ids"),
        ),
        RowQuantity(
            name="induction",
            formula="Σ_i Σ_j p over j ≤ i with id j−1 = id i, j−1 ≠ i",
            axis="head",
            needs=("positions", "token_ids"),
        ),
        RowQuantity(
            name="patch_distance",
            formula="Σ_i of Σ_j p·√(Δrow² + Δcolumn²) / Σ_j p over patches i and j",
            axis="head",
            needs=("grid",),
        ),
        RowQuantity(name="patch_mass", formula="Σ_i Σ_j p over patches i and j", axis="head", needs=("grid",)),
        RowQuantity(name="patch_rows", formula="patches i that see any patch", axis="head", needs=("grid",)),
    )
}


def known_quantities(names: Iterable[str], facts: Collection[Fact]) -> frozenset[str]:
    """Those of the named row quantities whose needs are among the facts of a call."""
    return frozenset(name for name in names if set(ROW_QUANTITIES[name].needs) <= set(facts))


def needs_of(names: Iterable[str]) -> frozenset[Fact]:
    """Everything that the named row quantities need of a call."""
    return frozenset(fact for name in names for fact in ROW_QUANTITIES[name].needs)
