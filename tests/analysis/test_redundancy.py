"""The nearest head of each head, against NumPy."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from attlas.analysis import head_redundancy
from attlas.analysis.dataset import Dataset
from attlas.analysis.redundancy import SCHEMA
from attlas.analysis.similarity import StackSimilarity, stack_similarities
from attlas.extract.store import Refusal
from tests.analysis.synthetic import Floats, Recipe, offset_scores, write_dataset

LAYERS, HEADS = 2, 3


def twin(random: np.random.Generator, n: int) -> Floats:
    """The same scores wherever it is planted."""
    return offset_scores(np.random.default_rng(n), n, offset=2)


# heads 1 of layer 0 and 0 of layer 1 are equal
PLANTED: tuple[Recipe, ...] = (
    lambda r, n: offset_scores(r, n, offset=-1),
    twin,
    lambda r, n: offset_scores(r, n, offset=1),
    twin,
    lambda r, n: offset_scores(r, n, offset=-2),
    lambda r, n: offset_scores(r, n, offset=0),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("redundancy") / "twins"
    return Dataset.open(write_dataset(root, layers=LAYERS, heads=HEADS, recipes=PLANTED, lengths=(16, 34)))


def test_equal_heads_are_each_others_nearest_and_come_first(dataset: Dataset) -> None:
    result = head_redundancy(dataset, by="offset")
    assert dict(result.schema) == SCHEMA
    names = ("layer", "head", "nearest_layer", "nearest_head", "is_same_layer", "alike")
    assert result.select(names).head(2).rows() == [(0, 1, 1, 0, False, 1), (1, 0, 0, 1, False, 1)]
    assert result["bhattacharyya"][0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("threshold", (0.0, 0.5, 0.9, 1.0))
def test_a_row_has_the_largest_similarity_and_counts_those_from_the_threshold_on(
    dataset: Dataset, threshold: float
) -> None:
    (stack,) = stack_similarities(dataset, by="offset")
    result = head_redundancy(dataset, by="offset", threshold=threshold)
    assert result.height == LAYERS * HEADS
    assert result["bhattacharyya"].is_sorted(descending=True)
    for row in result.iter_rows(named=True):
        head = row["layer"] * HEADS + row["head"]
        others = [similarity for other, similarity in enumerate(stack.matrix[head].tolist()) if other != head]
        nearest = row["nearest_layer"] * HEADS + row["nearest_head"]
        assert row["bhattacharyya"] == max(others) == stack.matrix[head, nearest]
        assert row["is_same_layer"] == (row["layer"] == row["nearest_layer"])
        assert row["alike"] == sum(similarity >= threshold for similarity in others)


def test_a_run_has_a_nearest_head_by_patterns(encoder_run: Path) -> None:
    dataset = Dataset.open(encoder_run)
    result = head_redundancy(dataset)
    assert result.height == sum(stack.heads.height for stack in stack_similarities(dataset))
    assert result.null_count().row(0) == (0,) * result.width
    assert (result["layer"] * 100 + result["head"] != result["nearest_layer"] * 100 + result["nearest_head"]).all()


def test_a_head_that_was_compared_with_none_comes_last_without_a_nearest(dataset: Dataset) -> None:
    schema = {"stack": pl.String, "layer": pl.Int16, "head": pl.Int16}
    heads = pl.DataFrame([("<script>", 0, 0), ("<script>", 0, 1), ("<script>", 1, 0)], schema=schema, orient="row")
    matrix = np.array([[1, np.nan, np.nan], [np.nan, 1, 0.25], [np.nan, 0.25, 1]], np.float32)
    result = head_redundancy(dataset, similarities=[StackSimilarity(heads, matrix)])
    assert result.row(-1) == ("<script>", 0, 0, None, None, None, None, 0)
    assert result.row(0) == ("<script>", 0, 1, 1, 0, 0.25, False, 0)


def test_one_head_has_no_nearest(tmp_path: Path) -> None:
    result = head_redundancy(Dataset.open(write_dataset(tmp_path / "one", layers=1, heads=1)), by="offset")
    assert result.rows() == [("encoder", 0, 0, None, None, None, None, 0)]


def test_what_cannot_be_compared_is_refused(dataset: Dataset) -> None:
    with pytest.raises(Refusal, match=r"not measured: pairs.* every run writes"):
        head_redundancy(dataset)
    with pytest.raises(Refusal, match=r"from 0 to 1; got -0\.1"):
        head_redundancy(dataset, by="offset", threshold=-0.1)
