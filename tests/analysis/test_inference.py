from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from scipy import stats

from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import head_means
from attlas.analysis.inference import NOTE_FEW, bootstrap_mean, clustered_mean, student_quantile
from tests import oracles

DOCUMENTS, PER_DOCUMENT = 40, 3

BY_SQL = """
WITH documents AS (
    SELECT stack, layer, head, document_id,
           sum(query_rows * {column}::DOUBLE) AS y, sum(query_rows)::DOUBLE AS w
    FROM read_parquet('{parts}') WHERE {column} IS NOT NULL
    GROUP BY stack, layer, head, document_id
), totals AS (
    SELECT stack, layer, head, sum(y) / sum(w) AS theta, sum(w) AS total, count(*) AS g
    FROM documents GROUP BY stack, layer, head
)
SELECT stack, layer, head, any_value(theta) AS theta, any_value(g) AS g,
       sqrt(any_value(g) / (any_value(g) - 1) * sum((y - theta * w) ** 2)) / any_value(total) AS se
FROM documents JOIN totals USING (stack, layer, head)
GROUP BY stack, layer, head ORDER BY stack, layer, head
"""


@pytest.mark.parametrize("column", ["entropy_nats", "distance_tokens", "mass_previous", "output_norm"])
def test_mean_and_interval_equal_those_recomputed_from_parquet_alone(folder: Path, column: str) -> None:
    found = head_means(Dataset.open(folder), [column])
    # a bracket is a pattern to DuckDB; ? stands for any character
    parts = str(folder / "heads" / "*.parquet").replace("[", "?").replace("]", "?")
    with duckdb.connect() as connection:
        rows = connection.sql(BY_SQL.format(column=column, parts=parts)).fetchall()
    assert len(rows) == found.height > 0
    for ours, (stack, layer, head, theta, g, error) in zip(found.iter_rows(named=True), rows, strict=True):
        assert (ours["stack"], ours["layer"], ours["head"], ours["documents"]) == (stack, layer, head, g)
        t = stats.t.ppf(0.975, g - 1)
        assert ours[column] == pytest.approx(theta, rel=1e-12)
        assert ours[f"{column}_se"] == pytest.approx(error, rel=1e-9)
        assert ours[f"{column}_low"] == pytest.approx(theta - t * error, rel=1e-9)
        assert ours[f"{column}_high"] == pytest.approx(theta + t * error, rel=1e-9)


def test_mean_and_error_equal_the_oracle_with_nulls_left_out_per_column() -> None:
    random = np.random.default_rng(1)
    document = random.integers(0, 7, 200)
    weight = random.integers(1, 50, 200).astype(float)
    y = random.normal(size=200) + document
    known = random.random(200) > 0.3
    frame = pl.LazyFrame({"document_id": document, "weight": weight, "g": 0, "y": y, "z": y}).with_columns(
        z=pl.when(pl.Series(known)).then("y")
    )
    found = clustered_mean(frame, ["y", "z"], ["g"]).collect().row(0, named=True)
    for name, mask in (("y", np.ones(200, dtype=bool)), ("z", known)):
        theta, error, _ = oracles.cluster_mean(y[mask], weight[mask], document[mask])
        assert found[name] == pytest.approx(theta, rel=1e-12)
        assert found[f"{name}_se"] == pytest.approx(error, rel=1e-10)


def test_quantiles_are_students_t() -> None:
    freedom = np.array([1, 2, 5, 39, 1000], dtype=float)
    for confidence in (0.9, 0.95, 0.99):
        assert student_quantile(freedom, confidence) == pytest.approx(stats.t.ppf(0.5 + confidence / 2, freedom))


def test_rows_of_weight_zero_and_their_documents_do_not_count() -> None:
    frame = pl.LazyFrame({"document_id": [0, 1, 2], "weight": [1, 1, 0], "g": 0, "y": [1.0, 3.0, 100.0]})
    found = clustered_mean(frame, ["y"], ["g"]).collect().row(0, named=True)
    assert (found["y"], found["documents"], found["y_se"]) == (2.0, 2, pytest.approx(1.0))


@pytest.mark.parametrize("method", [clustered_mean, bootstrap_mean])
def test_one_document_gives_an_estimate_a_null_interval_and_a_note(method) -> None:
    frame = pl.LazyFrame({"document_id": [5, 5], "weight": [1, 3], "g": 0, "y": [1.0, 2.0]})
    found = method(frame, ["y"], ["g"]).collect().row(0, named=True)
    assert found["y"] == 1.75
    assert (found["y_low"], found["y_high"], found["y_se"], found["note"]) == (None, None, None, NOTE_FEW)


def test_a_column_without_values_is_null_throughout() -> None:
    frame = pl.LazyFrame(
        {"document_id": [0, 1], "weight": [1, 3], "g": 0, "y": pl.Series([None, None], dtype=pl.Float32)}
    )
    for method in (clustered_mean, bootstrap_mean):
        found = method(frame, ["y"], ["g"]).collect().row(0, named=True)
        assert (found["y"], found["y_low"], found["y_high"], found["note"]) == (None, None, None, None)


def test_a_nearly_constant_column_keeps_its_digits() -> None:
    y = 1e6 + np.arange(4) * 1e-3
    frame = pl.LazyFrame({"document_id": np.arange(4), "weight": 1.0, "g": 0, "y": y})
    found = clustered_mean(frame, ["y"], ["g"]).collect().row(0, named=True)
    assert found["y_se"] == pytest.approx(np.std(y, ddof=1) / 2, rel=1e-5)


def test_bootstrap_agrees_with_the_linearised_error_and_repeats_with_its_seed() -> None:
    frame = _simulate(1, seed=3)
    linear = clustered_mean(frame, ["y"], ["dataset"]).collect()
    drawn = bootstrap_mean(frame, ["y"], ["dataset"], replicates=2000, seed=1).collect()
    again = bootstrap_mean(frame, ["y"], ["dataset"], replicates=2000, seed=1).collect()
    assert drawn.equals(again)
    assert drawn["y"][0] == pytest.approx(linear["y"][0], rel=1e-12)
    assert drawn["y_se"][0] == pytest.approx(linear["y_se"][0], rel=0.15)
    assert drawn["y_low"][0] < linear["y"][0] < drawn["y_high"][0]


def test_nominal_95_percent_intervals_cover_the_truth_with_40_documents() -> None:
    simulations = 4000
    found = clustered_mean(_simulate(simulations, seed=7), ["y"], ["dataset"]).collect()
    covered = found.filter((pl.col("y_low") <= 0) & (pl.col("y_high") >= 0)).height / simulations
    assert 0.93 <= covered <= 0.97


def test_an_interval_that_ignores_documents_would_cover_far_less() -> None:
    """The simulation is demanding: rows of a document depend on each other."""
    alone = _simulate(1000, seed=7).with_columns(document_id=pl.int_range(pl.len()))
    found = clustered_mean(alone, ["y"], ["dataset"]).collect()
    assert found.filter((pl.col("y_low") <= 0) & (pl.col("y_high") >= 0)).height < 0.9 * found.height


def _simulate(datasets: int, *, seed: int) -> pl.LazyFrame:
    """Datasets of 40 documents with random effects, and sequences of very different weights; the true mean is 0."""
    random = np.random.default_rng(seed)
    shape = (datasets, DOCUMENTS, PER_DOCUMENT)
    effect = random.normal(0, 1, shape[:2])[..., None]
    y = effect + random.normal(0, 1, shape)
    weight = random.integers(16, 128, shape)
    index = np.indices(shape).reshape(3, -1)
    return pl.LazyFrame({"dataset": index[0], "document_id": index[1], "weight": weight.ravel(), "y": y.ravel()})
