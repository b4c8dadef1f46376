"""Similarity and clusters of heads, against NumPy, SciPy and DuckDB."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist, squareform

from attlas.analysis import head_clusters, head_similarity, similarity
from attlas.analysis.dataset import Dataset
from attlas.analysis.leaf_order import best_leaf_order
from attlas.analysis.similarity import SCHEMA, StackSimilarity, stack_similarities
from attlas.extract.store import Refusal
from tests.analysis.synthetic import Floats, add_table, write_dataset

LAYERS, HEADS, ROWS, KEYS = 2, 4, 9, 7
ALIKE = ((0, 1), (1, 2))  # have the same patterns in every dataset of this file


def patterns(random: np.random.Generator) -> Floats:
    """Patterns of all heads, those of ALIKE equal: [layer · HEADS + head, row, key]."""
    p = random.dirichlet(np.full(KEYS, 0.3), (LAYERS * HEADS, ROWS))
    one, other = (layer * HEADS + head for layer, head in ALIKE)
    p[other] = p[one]
    return p


def pair_rows(shard: int, p: Floats) -> list[dict[str, Any]]:
    """Rows of `pairs`, pair by pair from the formulas."""
    rows = []
    for a in range(len(p)):
        for b in range(a, len(p)):
            mixed = (p[a] + p[b]) / 2
            divergence = float((_entropy(mixed) - (_entropy(p[a]) + _entropy(p[b])) / 2).sum())
            keys = {"shard": shard, "stack": "encoder", "layer": a // HEADS, "head": a % HEADS}
            others = {"other_layer": b // HEADS, "other_head": b % HEADS}
            sums = {
                "bhattacharyya": float(np.sqrt(p[a] * p[b]).sum()),
                "product": float((p[a] * p[b]).sum()),
                "jensen_shannon_nats": divergence if a // HEADS == b // HEADS else None,
                "rows": float(len(p[a])),
            }
            rows.append({**keys, **others, **sums})
    return rows


def _entropy(p: Floats) -> Floats:
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


@pytest.fixture(scope="module")
def all_patterns() -> Floats:
    """Those of two shards, one after the other."""
    random = np.random.default_rng(5)
    return np.stack([patterns(random) for _ in range(2)])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, all_patterns: Floats) -> Dataset:
    root = write_dataset(tmp_path_factory.mktemp("pairs") / "<script>", layers=LAYERS, heads=HEADS)
    add_table(root, "pairs", [pair_rows(shard, p) for shard, p in enumerate(all_patterns)])
    return Dataset.open(root)


def number(row: dict[str, Any], prefix: str = "") -> int:
    return row[f"{prefix}layer"] * HEADS + row[f"{prefix}head"]


def test_measures_are_means_over_the_rows_of_all_shards(compared: Dataset, all_patterns: Floats) -> None:
    p = np.concatenate(list(all_patterns), 1)
    result = head_similarity(compared)
    assert dict(result.schema) == SCHEMA
    assert result.height == LAYERS * HEADS * (LAYERS * HEADS - 1) // 2
    for row in result.iter_rows(named=True):
        a, b = p[number(row)], p[number(row, "other_")]
        assert row["bhattacharyya"] == pytest.approx(np.sqrt(a * b).sum(-1).mean(), rel=1e-12)
        assert row["cosine"] == pytest.approx((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()), rel=1e-12)
        assert row["rows"] == 2 * ROWS
        if row["layer"] == row["other_layer"]:
            m = (a + b) / 2
            divergence = ((a * np.log(a / m)).sum(-1) + (b * np.log(b / m)).sum(-1)) / 2
            assert row["jensen_shannon_nats"] == pytest.approx(divergence.mean(), rel=1e-9)
        else:
            assert row["jensen_shannon_nats"] is None


def test_a_pair_stands_once_with_its_first_head_first(compared: Dataset) -> None:
    pairs = [(number(row), number(row, "other_")) for row in head_similarity(compared).iter_rows(named=True)]
    assert pairs == [(a, b) for a in range(LAYERS * HEADS) for b in range(a + 1, LAYERS * HEADS)]


def test_equal_heads_are_the_most_alike_and_in_one_cluster(compared: Dataset) -> None:
    first = head_similarity(compared).sort("bhattacharyya").row(-1, named=True)
    assert ((first["layer"], first["head"]), (first["other_layer"], first["other_head"])) == ALIKE
    assert first["bhattacharyya"] == pytest.approx(1, rel=1e-12)
    clusters = head_clusters(compared, threshold=0.99)
    cluster_of = {(row["layer"], row["head"]): row for row in clusters.iter_rows(named=True)}
    assert cluster_of[ALIKE[0]]["cluster"] == cluster_of[ALIKE[1]]["cluster"]
    assert abs(cluster_of[ALIKE[0]]["order"] - cluster_of[ALIKE[1]]["order"]) == 1
    assert clusters["cluster"].n_unique() == LAYERS * HEADS - 1


def test_matrices_have_the_same_numbers(compared: Dataset) -> None:
    (stack,) = stack_similarities(compared)
    assert stack.heads.rows() == [("encoder", layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    assert np.array_equal(stack.matrix, stack.matrix.T)
    assert (np.diag(stack.matrix) == 1).all()
    upper = stack.matrix[np.triu_indices(LAYERS * HEADS, 1)]
    assert upper == pytest.approx(head_similarity(compared)["bhattacharyya"].to_numpy(), abs=1e-6)


def means_between(matrix: Floats, labels: list[int]) -> dict[tuple[int, int], float]:
    """The mean similarity between the heads of each two clusters."""
    numbers = np.array(labels)
    return {
        (a, b): float(matrix[np.ix_(numbers == a, numbers == b)].mean())
        for a in range(max(labels) + 1)
        for b in range(a + 1, max(labels) + 1)
    }


@pytest.mark.parametrize("threshold", (0.4, 0.6, 0.9))
def test_no_two_clusters_are_as_alike_as_the_threshold(compared: Dataset, threshold: float) -> None:
    (stack,) = stack_similarities(compared)
    labels = head_clusters(compared, threshold=threshold).sort("layer", "head")["cluster"].to_list()
    assert all(mean < threshold for mean in means_between(stack.matrix.astype(float), labels).values())


def test_clusters_are_runs_of_the_order_and_numbered_along_it(compared: Dataset) -> None:
    result = head_clusters(compared, threshold=0.6)
    assert result["order"].to_list() == list(range(LAYERS * HEADS))
    steps = result["cluster"].diff().drop_nulls().to_list()
    assert result["cluster"][0] == 0 and set(steps) == {0, 1}
    assert result.equals(head_clusters(compared, threshold=0.6))


def orders(tree: Floats, node: int) -> list[list[int]]:
    """All orders of the leaves of a subtree, by flipping each of its forks."""
    leaves = len(tree) + 1
    if node < leaves:
        return [[node]]
    left, right = (orders(tree, int(child)) for child in tree[node - leaves, :2])
    return [order for a in left for b in right for order in (a + b, b + a)]


@pytest.mark.parametrize("seed", range(24))
def test_no_flip_of_the_dendrogram_makes_neighbours_more_alike(seed: int) -> None:
    leaves = 2 + seed % 8
    points = np.random.default_rng(seed).normal(size=(leaves, 2)).round(1)  # rounded, so that distances tie
    tree, distances = linkage(points, "average"), squareform(pdist(points))
    found = best_leaf_order(tree, distances).tolist()
    assert sorted(found) == list(range(leaves)) and found[0] < found[-1]
    least = min(_length(distances, order) for order in orders(tree, 2 * leaves - 2))
    assert _length(distances, found) == pytest.approx(least, abs=1e-12)


def _length(distances: Floats, order: list[int]) -> float:
    return sum(distances[a, b] for a, b in pairwise(order))


def test_more_heads_than_can_be_ordered_keep_an_order_of_the_dendrogram(
    compared: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = head_clusters(compared, threshold=0.6)
    monkeypatch.setattr(similarity, "MOST_ORDERED", LAYERS * HEADS - 1)
    other = head_clusters(compared, threshold=0.6)
    assert members(other) == members(best)


def members(clusters: pl.DataFrame) -> set[tuple]:
    """The heads of each cluster."""
    heads = clusters.sort("layer", "head").group_by("cluster").agg(pl.struct("layer", "head"))
    return {tuple((row["layer"], row["head"]) for row in of_cluster) for of_cluster in heads["layer"].to_list()}


def test_offset_profiles_are_compared_where_there_are_no_pairs(folder: Path) -> None:
    dataset = Dataset.open(folder)
    rows = pl.concat([_offsets(part) for part in sorted((folder / "profiles").iterdir())])
    totals = rows.group_by("layer", "head", "bin").agg(pl.col("sum").sum()).pivot("bin", values="sum").fill_null(0)
    profiles = totals.sort("layer", "head").drop("layer", "head").to_numpy()
    roots = np.sqrt(profiles / profiles.sum(1, keepdims=True))
    result = head_similarity(dataset, by="offset")
    # pdist of roots: √(2 − 2 BC)
    assert result["bhattacharyya"].to_numpy() == pytest.approx(1 - pdist(roots) ** 2 / 2, abs=1e-6)
    assert result.select("cosine", "jensen_shannon_nats", "rows").null_count().row(0) == (result.height,) * 3
    assert head_clusters(dataset, by="offset").height == 8


def _offsets(part: Path) -> pl.DataFrame:
    rows = pl.from_arrow(pq.read_table(part))
    assert isinstance(rows, pl.DataFrame)
    return rows.filter(pl.col("profile") == "offset").select("layer", "head", "bin", "sum")


def test_a_run_has_what_duckdb_computes_from_its_parts(encoder_run: Path) -> None:
    parts = f"{encoder_run}/pairs/*.parquet".replace("[", "[[]", 1)
    sql = """
        SELECT layer, head, other_layer, other_head, SUM(bhattacharyya) / SUM(rows) AS bhattacharyya, SUM(rows) AS rows
        FROM read_parquet(?) WHERE (layer, head) <> (other_layer, other_head) GROUP BY ALL ORDER BY ALL
    """
    expected = duckdb.execute(sql, [parts]).fetchall()
    names = ("layer", "head", "other_layer", "other_head", "bhattacharyya", "rows")
    result = head_similarity(Dataset.open(encoder_run)).select(names)
    assert len(expected) == result.height > 0
    for row, other in zip(result.rows(), expected, strict=True):
        assert row == pytest.approx(other, rel=1e-12)


def test_only_heads_of_one_stack_are_compared(tmp_path: Path) -> None:
    from attlas.extract.options import RunOptions
    from tests.extract.checkpoints import TEXT, model_of, save
    from tests.extract.runs import complete_run

    (tmp_path / "text.txt").write_text(TEXT)
    model, out = save(model_of("bart"), tmp_path / "bart"), tmp_path / "out"
    options = RunOptions(model=str(model), corpus=str(tmp_path / "text.txt"), out=out, max_length=16, stacks="all")
    complete_run(options)
    dataset = Dataset.open(out)
    heads = dataset.scan("heads").select("stack", "layer", "head").unique().collect()
    sizes = dict(heads["stack"].value_counts().rows())
    assert len(sizes) == 3
    for by in ("pattern", "offset"):
        pairs = dict(head_similarity(dataset, by=by)["stack"].value_counts().rows())
        # cross-attention has no offsets
        compared = {stack: n for stack, n in sizes.items() if by == "pattern" or stack != "cross"}
        assert pairs == {stack: n * (n - 1) // 2 for stack, n in compared.items()}
        clusters = head_clusters(dataset, by=by)
        assert clusters.drop("order", "cluster").sort(pl.all()).equals(heads.sort("stack", "layer", "head"))
        assert clusters.group_by("stack").agg(pl.col("order").min(), pl.col("cluster").min()).drop(
            "stack"
        ).unique().rows() == [(0, 0)]


def test_a_dataset_without_pairs_is_refused_with_what_measures_them(folder: Path) -> None:
    dataset = Dataset.open(folder)
    with pytest.raises(Refusal, match=r'not measured: pairs.* every run writes .* measure again, or .* by="offset"'):
        head_similarity(dataset)
    with pytest.raises(Refusal, match="not measured: pairs"):
        head_clusters(dataset)


def test_another_basis_and_threshold_are_refused(compared: Dataset) -> None:
    with pytest.raises(Refusal, match="by pattern or by offset; got 'keys'"):
        head_similarity(compared, by="keys")
    with pytest.raises(Refusal, match=r"from 0 to 1; got 1\.5"):
        head_clusters(compared, threshold=1.5)


def test_one_head_is_a_cluster_without_pairs(tmp_path: Path) -> None:
    dataset = Dataset.open(write_dataset(tmp_path / "one", layers=1, heads=1))
    assert head_similarity(dataset, by="offset").height == 0
    assert head_clusters(dataset, by="offset").rows() == [("encoder", 0, 0, 0, 0)]


def test_heads_that_were_not_compared_have_no_pair_and_are_no_cluster(compared: Dataset) -> None:
    heads = pl.DataFrame(
        {"stack": "encoder", "layer": [0, 1], "head": [0, 0]}, schema_overrides={"layer": pl.Int16, "head": pl.Int16}
    )
    stack = StackSimilarity(heads, np.array([[1, np.nan], [np.nan, 1]], np.float32))
    assert head_clusters(compared, similarities=[stack], threshold=0.01)["cluster"].to_list() == [0, 1]
