"""Which places of two models are compared with each other: the same ones, the same relative depth, or the heads most alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from attlas.analysis.dataset import Dataset
from attlas.analysis.distance import offset_shares
from attlas.analysis.heads import HEAD, head_means
from attlas.analysis.inference import jackknife
from attlas.analysis.summaries import averaged_columns, means_of, places, summarize_rows
from attlas.extract.tables import CLASS_MASSES

Match = Literal["place", "depth", "heads"]
MATCHES: Mapping[str, Match] = {"place": "place", "depth": "depth", "heads": "heads"}


def stack_pairs(a: Dataset, b: Dataset) -> list[tuple[str, str]]:
    """The stacks to compare: those of one name, or the only one of each."""
    first, second = (places(d, "heads")["stack"].unique(maintain_order=True).to_list() for d in (a, b))
    common = [(name, name) for name in first if name in second]
    return common or ([(first[0], second[0])] if len(first) == len(second) == 1 else [])


def means_by_depth(a: Dataset, b: Dataset, table: str, columns: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Means over all heads (or sites of a name) in bands of relative depth, as many as the shallower model has layers.

    Two frames with `stack`, `depth` (the middle of the band, from 0 to 1), `site`, `column` and the fields of `jackknife`.
    """
    found = []
    for pair in stack_pairs(a, b):
        depths = [_layers(dataset, stack) for dataset, stack in zip((a, b), pair, strict=True)]
        name = pair[0] if pair[0] == pair[1] else "/".join(pair)
        found.append(
            tuple(
                _means_in_bands(dataset, table, columns, stack, layers, name=name, bands=min(depths))
                for dataset, stack, layers in zip((a, b), pair, depths, strict=True)
            )
        )
    first, second = zip(*found, strict=True)
    return pl.concat(first), pl.concat(second)


def _layers(dataset: Dataset, stack: str) -> int:
    return places(dataset, "heads").filter(stack=stack)["layer"].n_unique()


def _means_in_bands(
    dataset: Dataset, table: str, columns: Sequence[str], stack: str, layers: int, *, name: str, bands: int
) -> pl.DataFrame:
    band = ((pl.col("layer") + 0.5) / layers * bands).floor()
    by = ["stack", "depth", *(["site"] if table == "residual" else [])]

    def in_bands(rows: pl.LazyFrame) -> pl.LazyFrame:
        return rows.filter(stack=stack).with_columns(stack=pl.lit(name), depth=(band + 0.5) / bands)

    sums = summarize_rows(dataset, table, columns, by, prepare=in_bands)
    return jackknife(sums, [*by, "column"], min_documents=dataset.min_documents).collect()


def means_of_heads_alike(a: Dataset, b: Dataset, columns: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Means of every head of a and of the head of b that it is matched with, each head at most once.

    The second frame has the keys of a's heads; both have `other_layer` and `other_head`, those of b.
    """
    matches = match_heads(a, b)
    x, y = (means_of(dataset, "heads", columns) for dataset in (a, b))
    keys = ["stack", "layer", "head", "other_layer", "other_head"]
    names = matches.select(*keys, "other_stack")
    of_b = names.join(y, left_on=["other_stack", "other_layer", "other_head"], right_on=list(HEAD))
    return names.join(x, on=HEAD).drop("other_stack"), of_b.drop("other_stack")


def match_heads(a: Dataset, b: Dataset) -> pl.DataFrame:
    """Pairs of heads of two models that are most alike: an assignment of least total cost (Hungarian method).

    The cost of a pair is 1 − Σ √(p q) of their offset profiles, plus the same of their class masses, plus the difference of
    their normalised entropies: 0 for heads that are the same in all three, 3 at most.
    """
    from scipy.optimize import linear_sum_assignment

    frames = []
    for pair in stack_pairs(a, b):
        heads, others = (_Heads(dataset, stack) for dataset, stack in zip((a, b), pair, strict=True))
        cost = heads.cost(others)
        rows, columns = linear_sum_assignment(cost)
        keys = others.keys[columns].rename({"stack": "other_stack", "layer": "other_layer", "head": "other_head"})
        frames.append(
            heads.keys[rows].hstack(keys).with_columns(pl.Series("cost", cost[rows, columns])).sort("layer", "head")
        )
    schema = {"stack": pl.String, "layer": pl.Int16, "head": pl.Int16}
    others_schema = {f"other_{name}": kind for name, kind in schema.items()}
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema | others_schema | {"cost": pl.Float64})


class _Heads:
    """What the heads of a stack look at, as distributions: Float64[head, outcome]."""

    def __init__(self, dataset: Dataset, stack: str) -> None:
        present = averaged_columns(dataset, "heads")
        names = [name for name in (*CLASS_MASSES, "entropy_normalized") if name in present]
        means = head_means(dataset, names).filter(stack=stack)
        self.keys = means.select(HEAD)
        masses = means.select(pl.col([n for n in names if n != "entropy_normalized"]).fill_null(0)).to_numpy()
        self._distributions = (offset_shares(dataset, self.keys), masses)
        self._entropy = means["entropy_normalized"].cast(pl.Float64).fill_null(0).to_numpy()

    def cost(self, others: _Heads) -> NDArray[np.float64]:
        cost = np.abs(self._entropy[:, None] - others._entropy)
        for these, those in zip(self._distributions, others._distributions, strict=True):
            if these.shape[1] == those.shape[1] and these.any() and those.any():
                cost += 1 - np.minimum(np.sqrt(these) @ np.sqrt(those).T, 1)
        return cost
