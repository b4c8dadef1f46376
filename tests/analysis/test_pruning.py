"""Pruning candidates and what removing heads changes, against NumPy and SciPy."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from scipy.stats import rankdata, spearmanr, t

from attlas.analysis import head_kinds, proxy_correlations, pruning_candidates, removal_effects
from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD, head_means
from attlas.analysis.pruning import EFFECTS, PROXIES, SCHEMA
from attlas.analysis.similarity import stack_similarities
from attlas.extract.store import Refusal
from tests.analysis.synthetic import add_table, write_dataset

LAYERS, HEADS = 2, 4
DEAD = (1, 1)


def ablation_rows(dataset: Dataset, *, has_loss: bool) -> list[dict[str, Any]]:
    """Rows of `ablations` of every sequence and head, and of a sublayer, of random changes that differ between documents."""
    random = np.random.default_rng(3)
    rows = []
    for sequence, document in dataset.scan("sequences").select("sequence_id", "document_id").collect().rows():
        for layer in range(LAYERS):
            keys = {"sequence_id": sequence, "document_id": document, "stack": "encoder", "layer": layer}
            changes = {"final_norm_change": 0.0, "loss_change_nats": random.normal() if has_loss else None}
            rows.append({**keys, **changes, "part": "mlp", "head": -1, "final_change": 1.0})
            for head in range(HEADS):
                level = (layer * HEADS + head + 1) / 20
                change = level * (1 + 0.1 * document) + random.uniform(0, 0.01)
                rows.append({**keys, **changes, "part": "head", "head": head, "final_change": change})
    return rows


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pruning") / "plain"
    return write_dataset(
        root, layers=LAYERS, heads=HEADS, lengths=(16, 34), dead=[DEAD], massive=[2], statistics=["mass_massive"]
    )


@pytest.fixture(scope="module", params=(True, False), ids=("loss", "no loss"))
def ablated(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ablated") / "data"
    write_dataset(root, layers=LAYERS, heads=HEADS, lengths=(16, 34), dead=[DEAD])
    add_table(root, "ablations", [ablation_rows(Dataset.open(root), has_loss=request.param)])
    return root


def test_the_dead_head_writes_the_least_and_every_layers_shares_add_up(plain: Path) -> None:
    dataset = Dataset.open(plain)
    result = pruning_candidates(dataset)
    assert dict(result.schema) == SCHEMA
    least = result.sort("output_share").row(0, named=True)
    assert ((least["layer"], least["head"]), least["output_share"]) == (DEAD, 0)
    assert result.group_by("layer").agg(pl.col("output_share").sum())["output_share"].to_list() == pytest.approx([1, 1])
    means = head_means(dataset, ["output_norm"]).select(*HEAD, "output_norm", "output_norm_low", "output_norm_high")
    assert_frame_equal(result.select(means.columns).sort(HEAD), means)


def test_a_single_proxy_is_read_from_the_dataset_itself(plain: Path) -> None:
    parts = [str(part) for part in sorted((plain / "heads").iterdir())]
    sql = """
        WITH norms AS (
            SELECT layer, head, SUM(output_norm::DOUBLE * query_rows) / SUM(query_rows) AS norm FROM read_parquet($1) GROUP BY ALL
        )
        SELECT layer, head, norm / SUM(norm) OVER (PARTITION BY layer) FROM norms ORDER BY ALL
    """
    result = pruning_candidates(Dataset.open(plain)).sort(HEAD).select("layer", "head", "output_share")
    for row, expected in zip(result.rows(), duckdb.execute(sql, [parts]).fetchall(), strict=True):
        assert row == pytest.approx(expected, rel=1e-9)


def test_rest_is_that_of_the_kinds_within_its_interval(plain: Path) -> None:
    dataset = Dataset.open(plain)
    result = pruning_candidates(dataset).sort(HEAD)
    assert result["rest"].to_list() == pytest.approx(head_kinds(dataset).sort(HEAD)["rest"].to_list(), rel=1e-12)
    assert ((result["rest_low"] <= result["rest"]) & (result["rest"] <= result["rest_high"])).all()


def test_the_interval_of_rest_is_that_of_its_mass_on_the_scale_of_rest(plain: Path) -> None:
    dataset = Dataset.open(plain)
    names = ("mass_first", "mass_massive")
    rows = pruning_candidates(dataset).sort(HEAD).hstack(head_means(dataset, names).drop(*HEAD))
    n = dataset.scan("sequences").select("tokens").collect()["tokens"].to_numpy()
    even = len(n) / n.sum()  # all rows see all keys: Σ over sequences of n rows · 1/n
    for row in rows.iter_rows(named=True):
        name = max(names, key=row.__getitem__)
        expected = [(row[name + end] - even) / (1 - even) for end in ("", "_low", "_high")]
        assert [row["rest" + end] for end in ("", "_low", "_high")] == pytest.approx(expected, rel=1e-9)


def test_mean_rank_is_the_mean_of_the_ranks_by_known_proxies(plain: Path) -> None:
    dataset = Dataset.open(plain)
    for similarities, names in ((None, ("output_share", "rest")), (stack_similarities(dataset, by="offset"), PROXIES)):
        result = pruning_candidates(dataset, similarities=similarities)
        ranks = [rankdata(PROXIES[name] * result[name].to_numpy()) for name in names]
        assert result["mean_rank"].to_numpy() == pytest.approx(np.mean(ranks, 0))
        assert result["mean_rank"].is_sorted()
        assert result["redundancy"].null_count() == (result.height if similarities is None else 0)


def leave_one_out(rows: pl.DataFrame, column: str) -> tuple[float, float, float]:
    """The weighted mean and its interval, by leaving out each document in turn."""
    rows = rows.filter(pl.col(column).is_not_null())
    y, w, document = (rows[name].cast(pl.Float64).to_numpy() for name in (column, "tokens", "document_id"))
    documents = np.unique(document)
    without = np.array([np.average(y[document != d], weights=w[document != d]) for d in documents])
    g = len(documents)
    error = np.sqrt((g - 1) / g * ((without - without.mean()) ** 2).sum())
    sizes = np.array([w[document == d].sum() for d in documents])
    margin = t.ppf(0.975, sizes.sum() ** 2 / (sizes**2).sum() - 1) * error
    mean = np.average(y, weights=w)
    return mean, mean - margin, mean + margin


def test_effects_and_their_intervals_are_clustered_by_document(ablated: Path) -> None:
    dataset = Dataset.open(ablated)
    tokens = dataset.scan("sequences").select("sequence_id", "tokens")
    rows = dataset.scan("ablations").filter(pl.col("part") == "head").join(tokens, on="sequence_id").collect()
    effects = removal_effects(dataset)
    candidates = pruning_candidates(dataset)
    assert effects.height == LAYERS * HEADS
    for row in effects.iter_rows(named=True):
        of_head = rows.filter(layer=row["layer"], head=row["head"])
        candidate = candidates.row(
            by_predicate=(pl.col("layer") == row["layer"]) & (pl.col("head") == row["head"]), named=True
        )
        for effect in EFFECTS:
            found = [row[effect + end] for end in ("", "_low", "_high")]
            in_candidates = [candidate[effect + end] for end in ("", "_low", "_high")]
            if of_head[effect].is_null().all():
                assert found == in_candidates == [None] * 3
            else:
                assert found == pytest.approx(leave_one_out(of_head, effect), rel=1e-9)
                assert found == pytest.approx(in_candidates, rel=1e-12)


def test_correlations_are_spearmans(ablated: Path) -> None:
    dataset = Dataset.open(ablated)
    similarities = stack_similarities(dataset, by="offset")
    candidates = pruning_candidates(dataset, similarities=similarities)
    result = proxy_correlations(dataset, candidates=candidates)
    effects = [effect for effect in EFFECTS if candidates[effect].is_not_null().any()]
    assert result.select("effect", "proxy").rows() == [(e, p) for e in effects for p in (*PROXIES, "mean_rank")]
    for row in result.iter_rows(named=True):
        expected = spearmanr(candidates[row["effect"]], candidates[row["proxy"]]).statistic
        assert row["spearman"] == pytest.approx(expected, rel=1e-9)
        assert row["heads"] == LAYERS * HEADS
        assert row["expected"] == {**PROXIES, "mean_rank": 1}[row["proxy"]]


def test_a_proxy_that_was_not_measured_has_no_correlation(ablated: Path) -> None:
    result = proxy_correlations(Dataset.open(ablated))
    assert "redundancy" not in result["proxy"] and "output_share" in result["proxy"]


def test_without_ablations_effects_are_null_and_refused_with_the_option_that_measures_them(plain: Path) -> None:
    dataset = Dataset.open(plain)
    assert pruning_candidates(dataset).select(EFFECTS).null_count().row(0) == (LAYERS * HEADS,) * 2
    for ask in (removal_effects, proxy_correlations):
        with pytest.raises(
            Refusal, match="not measured: ablations of heads; measure with --statistics ablations --ablate heads"
        ):
            ask(dataset)


def test_ablations_of_sublayers_alone_say_nothing_of_heads(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "sublayers", layers=LAYERS, heads=HEADS)
    rows = ablation_rows(Dataset.open(root), has_loss=False)
    add_table(root, "ablations", [[row for row in rows if row["part"] != "head"]])
    with pytest.raises(Refusal, match="not measured: ablations of heads"):
        removal_effects(Dataset.open(root))


def test_one_document_gives_estimates_without_intervals(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "one", documents=1, layers=LAYERS, heads=HEADS, lengths=(16, 34))
    add_table(root, "ablations", [ablation_rows(Dataset.open(root), has_loss=False)])
    result = pruning_candidates(Dataset.open(root))
    estimates, intervals = ("output_share", "rest", "final_change"), ("output_norm_low", "rest_low", "final_change_low")
    assert result.select(estimates).null_count().row(0) == (0, 0, 0)
    assert result.select(intervals).null_count().row(0) == (result.height,) * 3


def test_one_head_is_the_only_candidate(tmp_path: Path) -> None:
    result = pruning_candidates(Dataset.open(write_dataset(tmp_path / "one", layers=1, heads=1, lengths=(16, 34))))
    assert result.select("layer", "head", "mean_rank", "output_share").rows() == [(0, 0, 1.0, 1.0)]


def test_a_run_has_candidates_with_redundancy(encoder_run: Path) -> None:
    result = pruning_candidates(Dataset.open(encoder_run))
    assert result.height > 0
    assert result.select("mean_rank", *PROXIES).null_count().row(0) == (0, 0, 0, 0)
