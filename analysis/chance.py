"""The chance level of a head's masses: what a head that attends evenly to all it may see would show on the same sequences.

How many keys each row sees follows from the sequences' lengths and the (query, key) pairs that the profile `offset` counts, so the
levels of mass_previous, mass_next, mass_self and mass_first are closed forms. Those of masses that depend on the text
come from the profile `class_flow` if it was measured, and otherwise from the head that attends most evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD
from attlas.extract.tables import CLASS_MASSES

Floats = NDArray[np.float64]
OFFSETS = ("mass_previous", "mass_next", "mass_self", "mass_first")
MASSIVE = "mass_massive"
COPIES = ("mass_same_token", "mass_induction")
_CLASS_FLOW = "class_flow"


@dataclass(frozen=True)
class Chance:
    """Chance levels in a fixed order of heads.

    `levels`: of each column, in [0, 1). `lone`: the share of rows that see themselves alone (row 0 of causal heads; 0 for others),
    which the levels leave out. `opening`: sequences per row. `sources`: where the levels come from, by column and stack.
    """

    levels: Mapping[str, Floats]
    lone: Floats
    opening: Floats
    sources: pl.DataFrame


@dataclass(frozen=True)
class Visible:
    """The keys that rows of a head see: all up to the query (`is_causal`) or on both sides, at most `window` away.

    A causal window counts the query, one on both sides does not. `is_exact`: the pairs in the data are as many as this mask has.
    """

    is_causal: bool
    window: int
    is_exact: bool

    @classmethod
    def of(
        cls, pairs: float | None, *, is_causal: bool, lengths: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> Visible:
        """The narrowest window with as many pairs over sequences of these lengths; no limit where pairs are not known."""
        low, high = 0, int(lengths.max(initial=1))
        if pairs is None:
            return cls(is_causal, high, is_exact=False)
        while low < high:
            middle = (low + high) // 2
            if _pairs(lengths, middle, is_causal=is_causal) @ counts < pairs - 0.5:
                low = middle + 1
            else:
                high = middle
        return cls(is_causal, low, is_exact=bool(abs(_pairs(lengths, low, is_causal=is_causal) @ counts - pairs) < 0.5))

    def describe(self, longest: int) -> str:
        """The mask in words."""
        is_full = self.window >= longest - (not self.is_causal)
        keys = "all keys" if is_full else f"a window of {self.window} keys"
        side = " up to the query" if self.is_causal else "" if is_full else " on each side"
        return f"closed form for rows that see {keys}{side}" + ("" if self.is_exact else ", an approximation")

    def levels(self, lengths: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[str, float]:
        """The chance level of OFFSETS, and `lone` and `opening`: row-weighted over sequences."""
        sums = _causal_sums(lengths, self.window) if self.is_causal else _two_sided_sums(lengths, self.window)
        rows, sequences = float(lengths @ counts), float(counts.sum())
        measured = rows - sequences if self.is_causal else rows
        levels = {name: float(total @ counts) / measured if measured else np.nan for name, total in sums.items()}
        opening = sequences / rows if rows else np.nan
        return levels | {"lone": opening if self.is_causal else 0.0, "opening": opening}


def _pairs(n: NDArray[np.int64], window: int, *, is_causal: bool) -> Floats:
    """The visible (query, key) pairs of sequences of n tokens."""
    if is_causal:
        k = np.minimum(n, window)
        return (k * (k + 1) / 2 + (n - k) * k).astype(np.float64)
    k = np.minimum(window, n - 1)
    return (n + 2 * n * k - k * (k + 1)).astype(np.float64)


def _causal_sums(n: NDArray[np.int64], window: int) -> dict[str, Floats]:
    """Σ 1/m_i over the rows i ≥ 1 that see the key in question, m_i = min(i + 1, window)."""
    k = np.minimum(n, window)
    early = _harmonic(k) - 1  # rows that see all keys up to them
    every = early + (n - k) / window
    return {
        "mass_self": every,
        "mass_previous": every if window > 1 else np.zeros(len(n)),
        "mass_next": np.zeros(len(n)),
        "mass_first": early,
    }


def _two_sided_sums(n: NDArray[np.int64], window: int) -> dict[str, Floats]:
    """The same over all rows, m_i = min(i, window) + min(n − 1 − i, window) + 1."""
    edge = np.clip(n - 1 - window, 0, window)  # rows at either end that see fewer keys than those between
    between = np.minimum(2 * window + 1, n)
    at_edge = _harmonic(window + edge) - _harmonic(np.full(len(n), window))
    every = 2 * at_edge + (n - 2 * edge) / between
    neighbour = every - 1 / (np.minimum(n - 1, window) + 1) if window else np.zeros(len(n))
    first = at_edge + (np.minimum(window, n - 1) - edge + 1) / between
    return {"mass_self": every, "mass_previous": neighbour, "mass_next": neighbour, "mass_first": first}


def _harmonic(n: NDArray[np.int64]) -> Floats:
    """1 + 1/2 + … + 1/n."""
    from scipy.special import digamma

    return np.asarray(digamma(n + 1.0) + np.euler_gamma, dtype=np.float64)


def chance_of(dataset: Dataset, means: pl.DataFrame) -> Chance:
    """The chance levels of the heads of `means`, which has HEAD, `entropy_normalized` and masses."""
    lengths = dataset.scan("sequences").group_by("tokens").len().sort("tokens").collect()
    n, counts = (lengths[name].cast(pl.Int64).to_numpy() for name in ("tokens", "len"))
    heads = means.select(HEAD).join(_pairs_of_heads(dataset), on=HEAD, how="left", maintain_order="left")
    masks = heads.select("pairs", "forward").unique(maintain_order=True)
    visible = [Visible.of(pairs, is_causal=forward == 0, lengths=n, counts=counts) for pairs, forward in masks.rows()]
    closed = masks.with_columns(
        pl.DataFrame(
            [v.levels(n, counts) for v in visible], schema=dict.fromkeys((*OFFSETS, "lone", "opening"), pl.Float64)
        ),
        source=pl.Series([v.describe(int(n.max(initial=1))) for v in visible], dtype=pl.String),
    )
    of_heads = heads.join(closed, on=("pairs", "forward"), how="left", nulls_equal=True, maintain_order="left")
    levels = {name: of_heads[name].to_numpy() for name in OFFSETS}
    levels[MASSIVE] = levels["mass_first"]
    of_text = _levels_of_text(dataset, means)
    for name in (*CLASS_MASSES, *COPIES):
        levels[name] = (
            means.select("stack").join(of_text, on="stack", how="left", maintain_order="left")[name].to_numpy()
        )
    return Chance(levels, of_heads["lone"].to_numpy(), of_heads["opening"].to_numpy(), _sources(of_heads, of_text))


def _pairs_of_heads(dataset: Dataset) -> pl.DataFrame:
    """Visible (query, key) pairs of each head, and those of them with the key after the query."""
    profile = dataset.scan("profiles").filter(pl.col("profile") == "offset")
    sums = {"pairs": pl.col("count").sum(), "forward": pl.col("count").filter(pl.col("bin") > 0).sum()}
    return profile.group_by(HEAD).agg(**sums).collect()


def _levels_of_text(dataset: Dataset, means: pl.DataFrame) -> pl.DataFrame:
    """A row per stack: the levels of the token classes and of COPIES, with `classes_from` and `copies_from`."""
    names = [name for name in (*CLASS_MASSES, *COPIES) if name in means.columns]
    most_even = (
        means.sort(pl.col("entropy_normalized").fill_null(-1), descending=True, maintain_order=True)
        .group_by("stack", maintain_order=True)
        .first()
        .with_columns(
            copies_from=pl.format(
                "estimated by L{}H{}, which attends most evenly ({} % of the largest entropy)",
                "layer",
                "head",
                (100 * pl.col("entropy_normalized")).round(0).cast(pl.Int64),
            )
        )
        .select(
            "stack",
            "copies_from",
            *(pl.col(name).cast(pl.Float64) for name in names),
            *(pl.lit(None, pl.Float64).alias(name) for name in (*CLASS_MASSES, *COPIES) if name not in names),
        )
    )
    shares = _class_shares(dataset)
    has_shares = pl.col("mass_subword_share").is_not_null()
    return most_even.join(shares, on="stack", how="left").select(
        "stack",
        "copies_from",
        *COPIES,
        *(pl.coalesce(f"{name}_share", name).alias(name) for name in CLASS_MASSES),
        classes_from=pl.when(has_shares).then(pl.lit(f"shares of tokens, from {_CLASS_FLOW}")).otherwise("copies_from"),
    )


def _class_shares(dataset: Dataset) -> pl.DataFrame:
    """The share of each class among the tokens of a stack, `<column>_share`; no rows if class_flow was not measured.

    Its counts are the rows of the query's class, and every token is a query.
    """
    flow = dataset.scan("profiles").filter(pl.col("profile") == _CLASS_FLOW)
    tokens = (
        flow.group_by(*HEAD, "bin")
        .agg(pl.col("count").sum())
        .group_by("stack", query_class=pl.col("bin") // len(CLASS_MASSES))
        .agg(pl.col("count").max())
    )
    shares = [
        (pl.col("count").filter(pl.col("query_class") == number).sum() / pl.col("count").sum()).alias(f"{name}_share")
        for number, name in enumerate(CLASS_MASSES)
    ]
    return tokens.group_by("stack").agg(*shares).collect()


def _sources(of_heads: pl.DataFrame, of_text: pl.DataFrame) -> pl.DataFrame:
    """`stack`, `columns` and `source`, in words."""
    masks = of_heads.group_by("stack", "source", maintain_order=True).len()
    positions = masks.select("stack", columns=pl.lit(", ".join(OFFSETS)), source="source")
    classes = of_text.select("stack", columns=pl.lit("token classes"), source="classes_from")
    copies = of_text.select("stack", columns=pl.lit(", ".join(COPIES)), source="copies_from")
    massive = of_text.select(
        "stack", columns=pl.lit(MASSIVE), source=pl.lit("as if one token of each sequence were massive")
    )
    return pl.concat([positions, classes, copies, massive])
