import math
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import duckdb
import numpy as np
import polars as pl
import pytest
from scipy import stats

from attlas.analysis.bootstrap import with_bootstrap
from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD, head_estimates, head_means
from attlas.analysis.inference import (
    NOTE_FEW,
    NOTE_UNEQUAL,
    Differences,
    benjamini_hochberg,
    estimates,
    student_quantile,
    two_sample,
)
from attlas.analysis.summaries import averaged_columns, document_sums, summaries, summarize_frame, summarize_rows
from attlas.extract.tables.document_sums import documents_listed
from attlas.extract.tables.merged_sums import MergedSums, listed_in_total
from tests import oracles

# the estimator of analysis/inference.py, from the rows alone: every document is left out once
BY_SQL = """
WITH documents AS (
    SELECT stack, layer, head, document_id,
           sum(query_rows * {column}::DOUBLE) AS y, sum(query_rows)::DOUBLE AS w
    FROM read_parquet('{parts}') WHERE {column} IS NOT NULL
    GROUP BY stack, layer, head, document_id
), totals AS (
    SELECT stack, layer, head, sum(y) AS y_all, sum(w) AS w_all, sum(w) ** 2 / sum(w ** 2) AS g_eff, count(*) AS g
    FROM documents GROUP BY stack, layer, head
)
SELECT stack, layer, head, any_value(y_all / w_all) AS theta, any_value(g) AS g, any_value(g_eff) AS g_eff,
       sqrt((any_value(g) - 1) * var_pop((y_all - y) / (w_all - w))) AS se
FROM documents JOIN totals USING (stack, layer, head)
GROUP BY stack, layer, head ORDER BY stack, layer, head
"""


def _estimates(frame: pl.DataFrame, by: Sequence[str] = ("g",), columns: Sequence[str] = ("y",)) -> pl.DataFrame:
    return estimates(summarize_frame(frame, columns, by).lazy(), by).collect()


@pytest.mark.parametrize("column", ["entropy_nats", "distance_tokens", "mass_previous", "output_norm"])
def test_mean_and_interval_equal_those_recomputed_from_parquet_alone(folder: Path, column: str) -> None:
    dataset = Dataset.open(folder)
    sums = pl.concat(document_sums(dataset, "heads", [column], HEAD))
    found = estimates(sums.lazy(), HEAD).collect()
    # a bracket is a pattern to DuckDB; ? stands for any character
    parts = str(folder / "heads" / "*.parquet").replace("[", "?").replace("]", "?")
    with duckdb.connect() as connection:
        rows = connection.sql(BY_SQL.format(column=column, parts=parts)).fetchall()
    assert len(rows) == found.height > 0
    for ours, (stack, layer, head, theta, g, effective, error) in zip(found.iter_rows(named=True), rows, strict=True):
        assert (ours["stack"], ours["layer"], ours["head"], ours["documents"]) == (stack, layer, head, g)
        t = stats.t.ppf(0.975, effective - 1)
        assert ours["estimate"] == pytest.approx(theta, rel=1e-12)
        assert ours["effective_documents"] == pytest.approx(effective, rel=1e-12)
        assert ours["se"] == pytest.approx(error, rel=1e-9)
        assert ours["low"] == pytest.approx(theta - t * error, rel=1e-9)
        assert ours["high"] == pytest.approx(theta + t * error, rel=1e-9)


def test_mean_and_error_equal_the_oracle_with_nulls_left_out_per_column() -> None:
    random = np.random.default_rng(1)
    document = random.integers(0, 7, 200)
    weight = random.integers(1, 50, 200).astype(float)
    y = random.normal(size=200) + document
    known = random.random(200) > 0.3
    frame = pl.DataFrame({"document_id": document, "weight": weight, "g": 0, "y": y, "z": y}).with_columns(
        z=pl.when(pl.Series(known)).then("y")
    )
    found = {row["column"]: row for row in _estimates(frame, columns=("y", "z")).iter_rows(named=True)}
    for name, mask in (("y", np.ones(200, dtype=bool)), ("z", known)):
        theta, error, effective = oracles.cluster_mean(y[mask], weight[mask], document[mask])
        assert found[name]["estimate"] == pytest.approx(theta, rel=1e-12)
        assert found[name]["se"] == pytest.approx(error, rel=1e-10)
        assert found[name]["effective_documents"] == pytest.approx(effective, rel=1e-12)


def test_equal_documents_of_one_row_give_the_usual_standard_error_of_a_mean() -> None:
    y = np.random.default_rng(0).normal(size=30)
    found = _estimates(pl.DataFrame({"document_id": np.arange(30), "weight": 1.0, "g": 0, "y": y})).row(0, named=True)
    interval = stats.t.interval(0.95, 29, y.mean(), stats.sem(y))
    assert (found["low"], found["high"]) == pytest.approx(interval, rel=1e-12)


def test_quantiles_are_students_t() -> None:
    freedom = np.array([1, 2, 5, 39, 1000], dtype=float)
    for confidence in (0.9, 0.95, 0.99):
        assert student_quantile(freedom, confidence) == pytest.approx(stats.t.ppf(0.5 + confidence / 2, freedom))


def test_rows_of_weight_zero_and_their_documents_do_not_count() -> None:
    frame = pl.DataFrame({"document_id": [0, 1, 2], "weight": [1, 1, 0], "g": 0, "y": [1.0, 3.0, 100.0]})
    found = _estimates(frame).row(0, named=True)
    assert (found["estimate"], found["documents"], found["se"]) == (2.0, 2, pytest.approx(1.0))


def test_one_document_gives_an_estimate_a_null_interval_and_a_note() -> None:
    frame = pl.DataFrame({"document_id": [5, 5], "weight": [1, 3], "g": 0, "y": [1.0, 2.0]})
    found = _estimates(frame).row(0, named=True)
    assert found["estimate"] == 1.75
    assert (found["low"], found["high"], found["se"], found["note"]) == (None, None, None, NOTE_FEW)


def test_documents_that_count_as_fewer_than_two_give_a_null_interval_and_a_note() -> None:
    frame = pl.DataFrame({"document_id": [0, 1, 2], "weight": [1, 1, 50], "g": 0, "y": [1.0, 3.0, 2.0]})
    found = _estimates(frame).row(0, named=True)
    assert (found["documents"], found["low"], found["note"]) == (3, None, NOTE_UNEQUAL)


def test_a_column_without_values_has_no_estimate_and_is_null_in_the_wide_form(folder: Path) -> None:
    frame = pl.DataFrame(
        {"document_id": [0, 1], "weight": [1, 3], "g": 0, "y": pl.Series([None, None], dtype=pl.Float32)}
    )
    assert _estimates(frame).height == 0
    means = head_means(Dataset.open(folder), ["entropy_nats", "mass_sink"])
    assert means["mass_sink"].is_null().all()
    assert means["mass_sink_low"].is_null().all()
    assert means["entropy_nats"].is_not_null().all()


def test_a_nearly_constant_column_keeps_its_digits() -> None:
    y = 1e6 + np.arange(4) * 1e-3
    frame = pl.DataFrame({"document_id": np.arange(4), "weight": 1.0, "g": 0, "y": y})
    pooled = estimates(summarize_frame(frame, ["y"], ["g"], []).lazy(), ["g"]).collect()
    for found in (_estimates(frame), pooled):
        assert found["se"][0] == pytest.approx(np.std(y, ddof=1) / 2, rel=1e-5)


# --- sums of shards


@pytest.mark.parametrize("table", ["heads", "residual"])
def test_summaries_of_shards_give_what_the_rows_give(folder: Path, table: str) -> None:
    dataset = Dataset.open(folder)
    by = dataset.table(table).places
    read = estimates(summaries(dataset, table), by).collect()
    made = estimates(summarize_rows(dataset, table, averaged_columns(dataset, table), by), by).collect()
    assert read.height == made.height > 0
    assert read.select(*by, "column", "documents").equals(made.select(*by, "column", "documents"))
    for name in ("estimate", "low", "high", "se", "effective_documents", "rows"):
        assert read[name].is_null().equals(made[name].is_null())
        assert read[name].drop_nulls().to_numpy() == pytest.approx(made[name].drop_nulls().to_numpy(), rel=1e-9)


def test_merged_shards_equal_all_rows_at_once_with_documents_across_borders() -> None:
    frame = _simulate(_demo_weights(), datasets=3, seed=2)
    shards = [
        rows
        for _, rows in frame.with_columns(shard=pl.int_range(pl.len()).over("dataset") // 64).group_by(
            "shard", maintain_order=True
        )
    ]
    of_one = [rows.filter(dataset=0) for rows in shards]
    sequences_of = {row["document_id"]: row["sequences"] for rows in of_one for row in rows.iter_rows(named=True)}
    listed = listed_in_total(
        ((rows["document_id"].to_numpy(), rows["weight"].to_numpy()) for rows in of_one), sequences_of
    )
    merged = MergedSums(["dataset", "column"], listed)
    for rows in shards:
        merged.add(_shard_summary(rows).to_arrow())
    sums = pl.DataFrame(pl.from_arrow(merged.to_arrow()))
    assert 0 < len(listed) < frame["document_id"].n_unique()
    assert set(sums["document_id"].drop_nulls()) == listed
    found = estimates(sums.lazy(), ["dataset"]).collect()
    at_once = estimates(summarize_frame(frame, ["y"], ["dataset"], sorted(listed)).lazy(), ["dataset"]).collect()
    for name in ("estimate", "low", "high", "se", "effective_documents", "documents", "rows"):
        assert found[name].to_numpy() == pytest.approx(at_once[name].to_numpy(), rel=1e-9)
    # leaving out light documents one by one changes the error by little
    each = _estimates(frame, ["dataset"])
    assert found["se"].to_numpy() == pytest.approx(each["se"].to_numpy(), rel=0.01)


def _shard_summary(shard: pl.DataFrame) -> pl.DataFrame:
    """What a run writes for a shard; the frame has `sequences`, the number of all sequences of each document."""
    of_one = shard.filter(pl.col("dataset") == 0)
    sequences_of = {row["document_id"]: row["sequences"] for row in of_one.iter_rows(named=True) if row["window"] == 0}
    listed = documents_listed(of_one["document_id"].to_numpy(), of_one["weight"].to_numpy(), sequences_of)
    return summarize_frame(shard, ["y"], ["dataset"], listed)


def test_intervals_that_hold_together_are_wider_by_bonferroni(folder: Path) -> None:
    sums = summaries(Dataset.open(folder), "heads", ["entropy_nats"])
    one, all_ = (estimates(sums, HEAD, comparisons=n).collect() for n in (1, 8))
    freedom = one["effective_documents"].to_numpy() - 1
    ratio = stats.t.ppf(1 - 0.05 / 16, freedom) / stats.t.ppf(0.975, freedom)
    width = [(found["high"] - found["low"]).to_numpy() for found in (one, all_)]
    assert width[1] == pytest.approx(ratio * width[0], rel=1e-9)


# --- bootstrap


def test_bootstrap_agrees_with_the_jackknife_and_repeats_with_its_seed() -> None:
    sums = summarize_frame(_simulate(np.full(40, 3), datasets=1, seed=3), ["y"], ["dataset"])
    linear = estimates(sums.lazy(), ["dataset"]).collect()
    drawn = with_bootstrap(linear, [sums], ["dataset"], replicates=2000, seed=1)
    # documents may lie in any parts, in any order
    halves = [sums.filter(pl.col("document_id") % 2 == 1), sums.filter(pl.col("document_id") % 2 == 0)]
    again = with_bootstrap(linear, halves, ["dataset"], replicates=2000, seed=1)
    assert drawn["low"][0] == pytest.approx(again["low"][0], rel=1e-12)
    assert not drawn.equals(with_bootstrap(linear, [sums], ["dataset"], replicates=2000, seed=2))
    assert drawn["estimate"][0] == linear["estimate"][0]
    assert drawn["se"][0] == pytest.approx(linear["se"][0], rel=0.15)
    assert drawn["low"][0] < linear["estimate"][0] < drawn["high"][0]


def test_a_bootstrap_of_one_document_has_no_interval() -> None:
    frame = pl.DataFrame({"document_id": [5, 5], "weight": [1, 3], "g": 0, "y": [1.0, 2.0]})
    sums = summarize_frame(frame, ["y"], ["g"])
    found = with_bootstrap(estimates(sums.lazy(), ["g"]).collect(), [sums], ["g"], replicates=50).row(0, named=True)
    assert (found["estimate"], found["low"], found["se"]) == (1.75, None, None)


# --- coverage


def _demo_weights() -> np.ndarray:
    """Documents as unequal as the built-in corpus: its texts, in sequences of 256 words."""
    return np.array([math.ceil(len(text.split()) / 256) for text in topics.values()])


# sequences of each document, and as how many equal documents these count
WEIGHTS = {
    "the demo's": (_demo_weights(), (5, 40)),
    "14 that count as 5": (np.array([40, 30, 12, 8, 6, 5, 4, 3, 3, 2, 2, 1, 1, 1]), (4.5, 5.5)),
    "40 equal ones": (np.full(40, 3), (36, 40)),
}


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_nominal_95_percent_intervals_cover_the_truth(name: str) -> None:
    sequences, (low, high) = WEIGHTS[name]
    frame = _simulate(sequences, datasets=4000, seed=7)
    listed = documents_listed(
        np.repeat(np.arange(len(sequences)), sequences), np.ones(sequences.sum()), dict(enumerate(sequences.tolist()))
    )
    found = estimates(summarize_frame(frame, ["y"], ["dataset"], listed).lazy(), ["dataset"]).collect()
    assert low <= found["effective_documents"].mean() <= high
    assert 0.93 <= _coverage(found) <= 0.97


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_intervals_that_ignore_documents_would_cover_far_less(name: str) -> None:
    """The simulation is demanding: rows of a document depend on each other."""
    frame = _simulate(WEIGHTS[name][0], datasets=500, seed=7)
    alone = frame.with_columns(document_id=pl.int_range(pl.len()).over("dataset"))
    assert _coverage(_estimates(alone, ["dataset"])) < 0.9


@pytest.mark.parametrize(("name", "most"), [("the demo's", 0.93), ("14 that count as 5", 0.9)])
def test_linearised_errors_with_all_documents_as_freedom_would_cover_less(name: str, most: float) -> None:
    """What unequal documents need: the jackknife's error, and degrees of freedom for as many as they count."""
    frame = _simulate(WEIGHTS[name][0], datasets=4000, seed=7)
    y, w = pl.col("weight") * pl.col("y"), pl.col("weight")
    documents = frame.group_by("dataset", "document_id").agg(y=y.sum(), w=w.sum())
    theta, g = pl.col("y").sum() / pl.col("w").sum(), pl.len()
    squares = ((pl.col("y") - theta * pl.col("w")) ** 2).sum()
    found = documents.group_by("dataset").agg(theta=theta, se=(g / (g - 1) * squares).sqrt() / pl.col("w").sum(), g=g)
    t = stats.t.ppf(0.975, found["g"].to_numpy() - 1)
    assert (found["theta"].abs().to_numpy() <= t * found["se"].to_numpy()).mean() < most


def _coverage(found: pl.DataFrame) -> float:
    return found.filter((pl.col("low") <= 0) & (pl.col("high") >= 0)).height / found.height


def _simulate(sequences: np.ndarray, *, datasets: int, seed: int) -> pl.DataFrame:
    """Datasets whose documents have so many sequences, with random effects of documents; the true mean is 0."""
    random = np.random.default_rng(seed)
    document = np.repeat(np.arange(len(sequences)), sequences)
    effect = random.normal(0, 1, (datasets, len(sequences)))[:, document]
    y = effect + random.normal(0, 1, effect.shape)
    weight = random.integers(16, 128, effect.shape)
    window = np.concatenate([np.arange(count) for count in sequences])
    return pl.DataFrame(
        {
            "dataset": np.repeat(np.arange(datasets), len(document)),
            "document_id": np.tile(document, datasets),
            "window": np.tile(window, datasets),
            "sequences": np.tile(sequences[document], datasets),
            "weight": weight.ravel().astype(float),
            "y": y.ravel(),
        }
    )


def test_estimates_of_heads_have_rows_and_documents(folder: Path) -> None:
    found = head_estimates(Dataset.open(folder), ["entropy_nats"])
    assert found.columns[:5] == ["stack", "layer", "head", "column", "estimate"]
    assert (found["documents"] > 1).all()
    assert (found["rows"] > found["documents"]).all()


# --- differences and many tests


def test_two_samples_of_singletons_equal_welchs_test() -> None:
    random = np.random.default_rng(4)
    x, y = random.normal(0, 1, 25), random.normal(0.4, 2, 40)
    found = two_sample(
        *(_estimates(pl.DataFrame({"document_id": np.arange(len(v)), "weight": 1.0, "g": 0, "y": v})) for v in (x, y))
    )
    welch = stats.ttest_ind(y, x, equal_var=False)
    assert found.p_values == pytest.approx([welch.pvalue], rel=1e-10)
    assert found.freedom == pytest.approx([welch.df], rel=1e-10)
    interval = welch.confidence_interval(0.95)
    assert np.concatenate(found.interval()) == pytest.approx([interval.low, interval.high], rel=1e-10)


def test_q_values_are_scipys() -> None:
    random = np.random.default_rng(0)
    p = np.concatenate([random.uniform(size=300), random.beta(0.1, 5, 60)])
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p), rel=1e-12)
    with_gaps = np.insert(p, [3, 100], np.nan)
    found = benjamini_hochberg(with_gaps)
    assert np.isnan(found[[3, 101]]).all()
    assert found[~np.isnan(found)] == pytest.approx(stats.false_discovery_control(p), rel=1e-12)


def test_no_spread_and_no_difference_is_no_finding_and_a_difference_without_spread_is_one() -> None:
    found = Differences(np.array([0.0, 0.5, 0.5]), np.array([0.0, 0.0, np.nan]), np.array([5.0, 5.0, 5.0]))
    assert found.p_values[:2].tolist() == [1.0, 0.0]
    assert np.isnan(found.p_values[2])
    assert found.are_within(np.array([0.1, 0.1, 9.0])).tolist() == [True, False, False]


def test_equivalence_is_two_one_sided_tests() -> None:
    x = np.random.default_rng(1).normal(0.1, 1, 60)
    found = Differences(np.array([x.mean()]), np.array([stats.sem(x)]), np.array([59.0]))
    for margin in np.linspace(0.1, 0.6, 11):
        below = stats.ttest_1samp(x, margin, alternative="less").pvalue
        above = stats.ttest_1samp(x, -margin, alternative="greater").pvalue
        assert found.are_within(np.array([margin]))[0] == (max(below, above) < 0.05)
