"""Similarity of heads: which heads of a stack look at the same keys, and which of them form clusters.

The similarity of two heads is the Bhattacharyya coefficient of their patterns p and q, BC = Σ_j √(p_j q_j) of a row, averaged over the
rows of the sample: 1 for equal patterns, 0 for patterns without a common key. 1 − BC is the squared Hellinger distance. Patterns of
similarity BC differ on average in at most √(1 − BC²) of their weight (total variation): 0.31 at 0.95, 0.6 at 0.8.

Clusters are those of average linkage on 1 − BC: the two clusters whose heads have the largest mean similarity are joined, for as long as
it is at least a threshold. Heads at rest are alike whatever they do awake, and so are heads that attend evenly: read clusters beside
kinds. `pairs` adds up all documents of a shard, so there are no intervals over documents.

    import attlas
    from attlas.analysis import head_clusters, head_similarity

    dataset = attlas.open_dataset("data/demo")
    head_similarity(dataset).sort("bhattacharyya", descending=True).head(10)
    head_clusters(dataset).group_by("stack", "cluster").len()

Source: Bhattacharyya 1943; Clark 2019 (clusters of heads); Sokal & Michener 1958 (average linkage); Bar-Joseph 2001 (order of leaves).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from attlas.analysis.dataset import Dataset
from attlas.analysis.distance import offset_shares
from attlas.analysis.heads import HEAD
from attlas.analysis.leaf_order import best_leaf_order
from attlas.analysis.summaries import places
from attlas.extract.store import Refusal

By = Literal["pattern", "offset"]
PAIR = (*HEAD, "other_layer", "other_head")
SUMS = ("bhattacharyya", "product", "jensen_shannon_nats", "rows")
SAME_CLUSTER = 0.8  # least mean similarity of clusters that are joined
MOST_ORDERED = 2000  # heads; the best order of so many takes three seconds, of twice as many eight times as long
SCHEMA = {
    "stack": pl.String,
    "layer": pl.Int16,
    "head": pl.Int16,
    "other_layer": pl.Int16,
    "other_head": pl.Int16,
    "bhattacharyya": pl.Float64,
    "cosine": pl.Float64,
    "jensen_shannon_nats": pl.Float64,
    "rows": pl.Float64,
}


@dataclass(frozen=True)
class StackSimilarity:
    """How alike the heads of one stack are.

    `heads`: a row per head, HEAD. `matrix`: float32[head, head] of Bhattacharyya coefficients, symmetric, 1 on the diagonal, NaN for
    pairs without a common row.
    """

    heads: pl.DataFrame
    matrix: NDArray[np.float32]


def head_similarity(dataset: Dataset, *, by: By = "pattern") -> pl.DataFrame:
    """How alike each two heads of a stack are: a row per pair, the head that comes first in the model first.

    by: `pattern` compares the keys that heads look at row by row (the table `pairs`); `offset` compares only how their attention is
    distributed over signed distance (`profiles`), which every dataset has, but for cross-attention.
    Columns: PAIR; `bhattacharyya`, the mean coefficient, 1 if equal; `cosine`, Σ p q / √(Σ p² · Σ q²); `jensen_shannon_nats`, the mean divergence, 0 if equal and ln 2 at most, null between layers; `rows`,
    how many rows were compared. With `offset` the last three are null. Raises Refusal if there is nothing to compare.
    """
    _check(dataset, by)
    if by == "offset":
        return _concat(
            _frame(s.heads, {"bhattacharyya": s.matrix[np.triu_indices(s.heads.height)]}) for s in _by_offset(dataset)
        )
    return _concat(_frame(heads, _measures(heads, sums)) for heads, sums in _pair_sums(dataset, SUMS))


def stack_similarities(dataset: Dataset, *, by: By = "pattern") -> list[StackSimilarity]:
    """The same as matrices of `bhattacharyya`, one for each stack. Raises Refusal if there is nothing to compare."""
    _check(dataset, by)
    return list(_by_offset(dataset) if by == "offset" else _by_pattern(dataset))


def reason_unknown(dataset: Dataset) -> str | None:
    """Why patterns of heads cannot be compared; None if they can."""
    if dataset.manifest["tables"].get("pairs", {}).get("rows"):
        return None
    return (
        "not measured: pairs, the sums that compare patterns, which every run writes since attlas 0.5, of --sample sequences of each "
        "shard; measure again"
    )


def head_clusters(
    dataset: Dataset,
    *,
    by: By = "pattern",
    threshold: float = SAME_CLUSTER,
    similarities: Sequence[StackSimilarity] | None = None,
) -> pl.DataFrame:
    """Clusters of heads, a row per head: `stack, layer, head, order, cluster`, sorted by stack and `order`.

    `order` is the head's place, from 0, where like heads are next to each other: the best order of the dendrogram's leaves, of more than
    MOST_ORDERED heads any of its orders. `cluster` counts from 0 in this order. threshold: clusters are joined while the mean similarity
    between their heads is at least this. Pairs that were not compared count as 0. similarities: if they are at hand.
    Raises Refusal for another threshold than one from 0 to 1, and if there is nothing to compare.
    """
    check_similarity(threshold)
    stacks = stack_similarities(dataset, by=by) if similarities is None else similarities
    schema = {name: SCHEMA[name] for name in HEAD} | {"order": pl.Int64, "cluster": pl.Int64}
    return pl.concat([pl.DataFrame(schema=schema), *(_clusters(stack, threshold) for stack in stacks)])


def check_similarity(threshold: float) -> None:
    """Raise Refusal for a threshold that no similarity can have."""
    if not 0 <= threshold <= 1:
        raise Refusal(f"a threshold of similarity is from 0 to 1; got {threshold:g}; use {SAME_CLUSTER:g}, for example")


def _check(dataset: Dataset, by: str) -> None:
    if by not in ("pattern", "offset"):
        raise Refusal(f"heads are compared by pattern or by offset; got {by!r}; choose one of them")
    reason = reason_unknown(dataset) if by == "pattern" else None
    if reason is not None:
        raise Refusal(f'{reason}, or compare profiles with by="offset"')


def _pair_sums(dataset: Dataset, names: Sequence[str]) -> Iterator[tuple[pl.DataFrame, dict[str, NDArray[np.float64]]]]:
    """The heads of each stack, and sums over shards of all pairs: the upper triangle with its diagonal, row by row.

    Part by part into arrays, because the pairs of 5,120 heads take 3 GB to group.
    """
    for heads in places(dataset, "heads").partition_by("stack", maintain_order=True):
        size = heads.height * (heads.height + 1) // 2
        sums = {name: np.zeros(size) for name in names}
        for rows in dataset.scan_parts("pairs"):
            part = _numbered(rows.filter(stack=heads["stack"][0]), heads).select("|pair", *names).collect()
            for name in names:
                sums[name] += np.bincount(part["|pair"], part[name].to_numpy(), size)
        yield heads, sums


def _numbered(rows: pl.LazyFrame, heads: pl.DataFrame) -> pl.LazyFrame:
    """Pairs with `|pair`, their place in the upper triangle."""
    numbers = heads.lazy().select("layer", "head").with_row_index("|head").cast({"|head": pl.Int64})
    others = numbers.rename({"layer": "other_layer", "head": "other_head", "|head": "|other"})
    first = pl.col("|head")
    above = first * heads.height - first * (first - 1) // 2  # pairs of the heads before
    return (
        rows.join(numbers, on=["layer", "head"])
        .join(others, on=["other_layer", "other_head"])
        .with_columns((above + pl.col("|other") - first).alias("|pair"))
    )


def _measures(heads: pl.DataFrame, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    one, other = np.triu_indices(heads.height)
    own = sums["product"][one == other]
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "bhattacharyya": sums["bhattacharyya"] / sums["rows"],
            "cosine": sums["product"] / np.sqrt(own[one] * own[other]),
            "jensen_shannon_nats": sums["jensen_shannon_nats"] / sums["rows"],
            "rows": sums["rows"],
        }


def _frame(heads: pl.DataFrame, measures: Mapping[str, NDArray[np.floating]]) -> pl.DataFrame:
    """A row of SCHEMA for each two heads that were compared; measures: of the upper triangle with its diagonal."""
    one, other = np.triu_indices(heads.height)
    is_pair = (one != other) & np.isfinite(measures["bhattacharyya"])
    one, other = one[is_pair], other[is_pair]
    others = heads[other].select(other_layer="layer", other_head="head")
    values = [pl.Series(name, array[is_pair], pl.Float64, nan_to_null=True) for name, array in measures.items()]
    missing = [pl.lit(None, dtype).alias(name) for name, dtype in SCHEMA.items() if name not in (*PAIR, *measures)]
    return pl.concat([heads[one], others], how="horizontal").with_columns(*values, *missing).select(*SCHEMA)


def _concat(frames: Iterator[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat([pl.DataFrame(schema=SCHEMA), *frames])


def _by_pattern(dataset: Dataset) -> Iterator[StackSimilarity]:
    for heads, sums in _pair_sums(dataset, ("bhattacharyya", "rows")):
        with np.errstate(divide="ignore", invalid="ignore"):
            upper = (sums["bhattacharyya"] / sums["rows"]).astype(np.float32)
        yield StackSimilarity(heads, _symmetric(upper, heads.height))


def _by_offset(dataset: Dataset) -> Iterator[StackSimilarity]:
    for heads in places(dataset, "heads").partition_by("stack", maintain_order=True):
        roots = np.sqrt(offset_shares(dataset, heads)).astype(np.float32)
        matrix = np.minimum(roots @ roots.T, 1)
        matrix[:, ~roots.any(1)] = matrix[~roots.any(1)] = np.nan
        np.fill_diagonal(matrix, 1)
        yield StackSimilarity(heads, matrix)


def _symmetric(upper: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    matrix = np.empty((size, size), np.float32)
    above = 0
    for row in range(size):  # without the two arrays of indices, which are four times the matrix
        values = np.minimum(upper[above : above + size - row], 1)
        matrix[row, row:] = matrix[row:, row] = values
        above += size - row
    np.fill_diagonal(matrix, 1)
    return matrix


def _clusters(stack: StackSimilarity, threshold: float) -> pl.DataFrame:
    order, cluster = _clustering(stack.matrix, threshold)
    rows = stack.heads.select(HEAD).with_columns(pl.Series("order", order), pl.Series("cluster", cluster))
    return rows.sort("order")


def _clustering(matrix: NDArray[np.float32], threshold: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The place of each head in the order of leaves, and its cluster."""
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage

    heads = len(matrix)
    if heads == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    distances = 1 - np.nan_to_num(matrix, nan=0).astype(np.float64)
    tree = linkage(distances[np.triu_indices(heads, 1)], "average")
    leaves = best_leaf_order(tree, distances) if heads <= MOST_ORDERED else leaves_list(tree)
    order = np.empty(heads, np.int64)
    order[leaves] = np.arange(heads)
    labels = fcluster(tree, 1 - threshold, "distance")[leaves]
    # a cluster is a run of leaves
    numbers = np.cumsum(np.diff(labels, prepend=labels[0]) != 0)
    return order, numbers[order]
