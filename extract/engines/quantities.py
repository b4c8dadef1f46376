"""Row quantities: what an engine measures of one attention call.

A new quantity only needs a record here, a function in the reference engine (`engines/reference.py`) and a column that uses
it. Its place in buffers and in compiled code follows from its name. If an engine does not compute it, the reference engine
does so for that quantity alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

# what an attention call may have: queries and keys as vectors; scores rather than only the pattern; common positions of
# queries and keys; token ids; token classes of the keys; values; the output projection; a learned sink; the grid of an
# image's patches; the residual stream that the layer reads; rows that read an answer in a needle
Fact = Literal[
    "queries",
    "scores",
    "positions",
    "token_ids",
    "classes",
    "values",
    "projection",
    "sink",
    "grid",
    "stream",
    "reading",
]
# how numbers of windows are combined into that of the sequence; None if they cannot be
Merge = Literal["sum", "max"]

_WRITTEN: tuple[Fact, ...] = ("projection", "values")

TOKEN_CLASSES = ("bos", "separator", "special", "whitespace", "punctuation", "number", "word_start", "subword")


@dataclass(frozen=True, kw_only=True)
class RowQuantity:
    """A quantity of the rows of a pattern.

    `axis`: there is a number per query (of its row), per key or bin of distances (summed over rows), or per head. Rows that are not
    measured (padding, fully masked, non-finite scores) have 0 and add to no sum. `merge`: how the rows of a head are
    combined into a number of the sequence, by sum or maximum; None if they are not. A call must have all that it `needs`.
    `sampled`: computed for the sequences of the sample only, NaN for others.
    """

    name: str
    formula: str
    axis: Literal["query", "key", "bin", "head"] = "query"
    merge: Merge | None = "sum"
    needs: tuple[Fact, ...] = ()
    sampled: bool = False


_of_sample = partial(RowQuantity, sampled=True)

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
        RowQuantity(
            name="self_score",
            formula="s[i,i]; −10³⁸ if i does not see itself",
            merge=None,
            needs=("scores", "positions"),
        ),
        RowQuantity(name="query_norm", formula="‖q_i‖", needs=("queries",)),
        RowQuantity(
            name="key_norm",
            formula="‖k_j‖, of grouped heads the keys that they share",
            axis="key",
            needs=("queries",),
        ),
        RowQuantity(name="sink", formula="mass of the learned sink", needs=("sink",)),
        RowQuantity(name="received", formula="Σ_i p[i, key]", axis="key", merge=None),
        RowQuantity(name="value_norm", formula="‖v W_O^h‖", axis="key", needs=("projection", "values")),
        RowQuantity(
            name="offset_bins",
            formula="Σ_i Σ_j p over j − i in a doubling bin, at index bin + 24 (`profiles.OFFSET_BINS` of them)",
            axis="bin",
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
            name="class_flow",
            formula="Σ_i Σ_j p over queries of a class and keys of a class, at index 8·(class of the query) + class of the key",
            axis="bin",
            merge=None,
            needs=("classes",),
        ),
        RowQuantity(
            name="class_rows", formula="measured rows of each class", axis="bin", merge=None, needs=("classes",)
        ),
        RowQuantity(
            name="patch_distance",
            formula="Σ_i of Σ_j p·√(Δrow² + Δcolumn²) / Σ_j p over patches i and j",
            axis="head",
            needs=("grid",),
        ),
        RowQuantity(name="patch_mass", formula="Σ_i Σ_j p over patches i and j", axis="head", needs=("grid",)),
        _of_sample(name="keys_for_half_mass", formula="fewest keys with half of Σ p"),
        _of_sample(name="keys_for_90_mass", formula="fewest keys with 0.9 of Σ p"),
        _of_sample(name="gini", formula="Σ_j Σ_k |p_j − p_k| / (2 m Σ p)"),
        _of_sample(name="mass_top_4", formula="Σ of the 4 largest p"),
        _of_sample(name="mass_top_16", formula="Σ of the 16 largest p"),
        _of_sample(name="mass_top_64", formula="Σ of the 64 largest p"),
        _of_sample(name="mass_streaming", formula="Σ p over j < 4 or i − 64 < j ≤ i", needs=("positions",)),
        _of_sample(
            name="mixture_entropy",
            formula="−Σ p̄ ln p̄, p̄ the mean of all heads' p; a learned sink is one more outcome",
            merge=None,
        ),
        _of_sample(name="norm_entropy", formula="−Σ q ln q, q = p ‖v W_O^h‖ / Σ p ‖v W_O^h‖", needs=_WRITTEN),
        _of_sample(name="norm_distance", formula="Σ q·|d|", needs=(*_WRITTEN, "positions")),
        _of_sample(name="norm_max_weight", formula="max q", needs=_WRITTEN),
        _of_sample(
            name="pattern_rank",
            formula="exp of the entropy of σ²/Σσ², σ the singular values of the pattern",
            axis="head",
            merge=None,
        ),
        _of_sample(name="norm_rows", formula="1 if Σ p ‖v W_O^h‖ > 0", needs=_WRITTEN),
        RowQuantity(name="reading_rows", formula="rows that read the answer", axis="head", needs=("reading",)),
        RowQuantity(
            name="retrieved",
            formula="rows that read the answer and have their largest p (lowest j on ties) on the needle",
            axis="head",
            needs=("reading",),
        ),
        RowQuantity(
            name="copied",
            formula="rows that read the answer and have their largest p on a token of the needle with the id that they read",
            axis="head",
            needs=("reading", "token_ids"),
        ),
        RowQuantity(name="patch_rows", formula="patches i that see any patch", axis="head", needs=("grid",)),
    )
}


def known_quantities(names: Iterable[str], facts: Collection[Fact]) -> frozenset[str]:
    """The named row quantities whose needs a call with these facts meets."""
    return frozenset(name for name in names if set(ROW_QUANTITIES[name].needs) <= set(facts))


def needs_of(names: Iterable[str]) -> frozenset[Fact]:
    """Everything that the named row quantities need from a call."""
    return frozenset(fact for name in names for fact in ROW_QUANTITIES[name].needs)
