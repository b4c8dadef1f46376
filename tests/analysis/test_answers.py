"""Entropy, distance, residual, kinds and defects of patterns with known answers."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from attlas.analysis.dataset import Dataset
from attlas.analysis.defects import DEFECTS, collect_evidence, find_defects, rules_table
from attlas.analysis.distance import distance_by_position, distance_ranking, offset_profile
from attlas.analysis.entropy import entropy_by_head, entropy_by_layer, entropy_by_length, entropy_by_position
from attlas.analysis.info import describe, format_size, format_value
from attlas.analysis.kinds import KINDS, MIXED, NAMES, classify, head_kinds, kinds_table
from attlas.analysis.residual import residual_through_depth
from tests.analysis.synthetic import WRITTEN, write_dataset

# layer and head of each recipe in tests/analysis/synthetic.py, four heads to a layer
PREVIOUS, NEXT, SELF, FIRST, EVEN, SHARP = (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 3)


def at(frame: pl.DataFrame, place: tuple[int, int]) -> dict:
    return frame.filter((pl.col("layer") == place[0]) & (pl.col("head") == place[1])).row(0, named=True)


def test_the_sharp_head_comes_first_and_the_even_one_last(folder: Path) -> None:
    result = entropy_by_head(Dataset.open(folder))
    assert result.select("layer", "head").row(0) == SHARP
    assert result.select("layer", "head").row(-1) == EVEN


def test_a_layers_entropy_is_the_row_weighted_mean_of_its_heads(folder: Path) -> None:
    dataset = Dataset.open(folder)
    heads = dataset.scan("heads").collect()
    layers = entropy_by_layer(dataset)
    for layer in layers.iter_rows(named=True):
        head_rows = heads.filter(pl.col("layer") == layer["layer"])
        expected = np.average(head_rows["entropy_nats"].cast(pl.Float64), weights=head_rows["query_rows"])
        assert layer["entropy_nats"] == pytest.approx(expected, rel=1e-12)


def test_length_strata_hold_every_row_once(folder: Path) -> None:
    dataset = Dataset.open(folder)
    strata = entropy_by_length(dataset)
    assert set(strata.select("tokens_low", "tokens_high").unique().rows()) == {(1, 8), (9, 16)}
    even = strata.filter(pl.col("layer") == 1).sort("stratum")
    assert even["entropy_nats"][0] < even["entropy_nats"][1]  # longer sequences leave more room


def test_entropy_by_position_averages_to_the_heads_entropy(folder: Path) -> None:
    dataset = Dataset.open(folder)
    positions = entropy_by_position(dataset).collect()
    weighted = positions.group_by("layer", "head").agg(
        mean=(pl.col("entropy_nats") * pl.col("rows")).sum() / pl.col("rows").sum()
    )
    heads = entropy_by_head(dataset)
    for row in weighted.iter_rows(named=True):
        assert row["mean"] == pytest.approx(at(heads, (row["layer"], row["head"]))["entropy_nats"], abs=1e-6)


def test_heads_are_ranked_from_nearest_to_farthest(folder: Path) -> None:
    result = distance_ranking(Dataset.open(folder))
    assert result.select("layer", "head").row(0) == SELF
    assert result["distance_tokens"].is_sorted()


def test_offset_shares_sum_to_one_and_peak_where_the_head_looks(folder: Path) -> None:
    profile = offset_profile(Dataset.open(folder)).collect()
    totals = profile.group_by("layer", "head").agg(pl.col("mass", "opportunity").sum())
    assert totals["mass"].to_list() == pytest.approx([1.0] * totals.height)
    assert totals["opportunity"].to_list() == pytest.approx([1.0] * totals.height)
    for place, offset in ((PREVIOUS, -1), (NEXT, 1), (SELF, 0)):
        head_rows = profile.filter((pl.col("layer") == place[0]) & (pl.col("head") == place[1]))
        assert head_rows.sort("mass")["low"][-1] == offset


def test_an_even_head_looks_as_opportunity_has_it_where_sequences_are_of_one_length(tmp_path: Path) -> None:
    dataset = Dataset.open(write_dataset(tmp_path / "d", documents=4, lengths=(12, 13)))
    profile = offset_profile(dataset).collect()
    even = profile.filter((pl.col("layer") == EVEN[0]) & (pl.col("head") == EVEN[1]))
    assert even["ratio"].to_list() == pytest.approx([1.0] * even.height, abs=0.1)


def test_distance_by_position_averages_to_the_heads_distance(folder: Path) -> None:
    dataset = Dataset.open(folder)
    positions = distance_by_position(dataset).collect()
    ranking = distance_ranking(dataset)
    head_rows = positions.filter((pl.col("layer") == 1) & (pl.col("head") == 0))
    mean = np.average(head_rows["distance_tokens"], weights=head_rows["rows"])
    assert mean == pytest.approx(at(ranking, EVEN)["distance_tokens"], rel=1e-6)


def test_residual_sites_come_in_the_order_in_which_they_happen(folder: Path) -> None:
    result = residual_through_depth(Dataset.open(folder))
    assert result["site"].to_list() == ["embedding", "attention", "mlp", "attention", "mlp", "final_norm"]
    assert result["depth"].to_list() == list(range(6))
    assert (result["stream_norm_low"] < result["stream_norm"]).all()
    assert result.filter(pl.col("site") == "embedding")["update_ratio"][0] is None


def test_residual_means_weigh_sequences_by_their_tokens(folder: Path) -> None:
    dataset = Dataset.open(folder)
    rows = dataset.scan("residual").join(dataset.scan("sequences").select("sequence_id", "tokens"), on="sequence_id")
    site_rows = rows.filter((pl.col("layer") == 0) & (pl.col("site") == "mlp")).collect()
    expected = np.average(site_rows["update_norm"].cast(pl.Float64), weights=site_rows["tokens"])
    result = residual_through_depth(dataset, ("update_norm",))
    assert result.filter((pl.col("layer") == 0) & (pl.col("site") == "mlp"))["update_norm"][0] == pytest.approx(
        expected
    )


def test_known_patterns_have_their_kind_and_every_replicate_agrees(folder: Path) -> None:
    result = head_kinds(Dataset.open(folder))
    for place, kind in ((PREVIOUS, "previous"), (NEXT, "next"), (SELF, "self"), (FIRST, "first"), (EVEN, "broad")):
        assert (at(result, place)["kind"], at(result, place)["agreement"]) == (kind, 1.0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_a_head_at_the_threshold_is_of_the_kind_and_one_short_of_it_is_not(kind) -> None:
    step = 1e-6 if kind.side == "≥" else -1e-6
    means = {kind.column: np.array([kind.threshold, kind.threshold - step])}
    assert [NAMES[i] for i in classify(means)] == [kind.name, MIXED]


def test_of_several_kinds_the_one_farthest_beyond_its_threshold_wins_and_shape_comes_last() -> None:
    means = {
        "mass_previous": np.array([0.45, 0.0]),
        "mass_self": np.array([0.5, 0.0]),
        "entropy_normalized": np.array([0.99, 0.99]),
        "distance_vs_uniform": np.array([1.0, np.nan]),
    }
    assert [NAMES[i] for i in classify(means)] == ["self", "broad"]


def test_the_table_of_kinds_states_every_threshold() -> None:
    table = kinds_table()
    assert table["kind"].to_list() == [*(k.name for k in KINDS), MIXED]
    assert "mass_previous ≥ 0.4" in table["rule"].to_list()


def test_defects_name_the_heads_that_have_them(folder: Path) -> None:
    evidence = collect_evidence(Dataset.open(folder))
    result = find_defects(evidence)
    places = {(row["defect"], row["layer"], row["head"]) for row in result.iter_rows(named=True)}
    assert ("entropy collapse", *SHARP) in places
    assert ("ignores content", *EVEN) in places
    assert ("ignores content", *SELF) not in places
    counts = dict(rules_table(evidence, result).select("defect", "found").rows())
    assert counts["entropy collapse"] == 1
    assert counts["non-finite rows"] == 0


@pytest.mark.parametrize(
    ("frame", "column", "value", "defect"),
    [
        ("extremes", "nonfinite_rows", 3, "non-finite rows"),
        ("extremes", "score_max", 7000.0, "logits near the limit"),
        ("heads", "output_norm", 1e-6, "dead head"),
        ("residual_extremes", "max_abs", 5000.0, "massive activations"),
    ],
)
def test_a_planted_defect_is_found_where_it_was_planted(
    folder: Path, frame: str, column: str, value, defect: str
) -> None:
    from dataclasses import replace

    evidence = collect_evidence(Dataset.open(folder))
    rows = getattr(evidence, frame)
    planted = rows.with_columns(
        pl.when(pl.int_range(pl.len()) == 2)
        .then(pl.lit(value))
        .otherwise(pl.col(column))
        .cast(rows[column].dtype)
        .alias(column)
    )
    manifest = {**evidence.manifest, "dtype": "torch.float16"}
    before = find_defects(evidence).filter(pl.col("defect") == defect)
    after = find_defects(replace(evidence, **{frame: planted, "manifest": manifest})).filter(pl.col("defect") == defect)
    assert (before.height, after.height) == (0, 1)
    assert after["layer"][0] == rows["layer"][2]


def test_norm_growth_is_measured_from_the_first_layer_to_the_last(folder: Path) -> None:
    from dataclasses import replace

    evidence = collect_evidence(Dataset.open(folder))
    grown = evidence.residual.with_columns(pl.col("stream_norm") * 30.0 ** pl.col("layer"))
    result = find_defects(replace(evidence, residual=grown)).filter(pl.col("defect") == "norm growth")
    assert (result.height, result["layer"][0]) == (1, 1)
    assert find_defects(evidence).filter(pl.col("defect") == "norm growth").height == 0


def test_a_rule_whose_columns_were_not_measured_says_so(folder: Path) -> None:
    from dataclasses import replace

    evidence = collect_evidence(Dataset.open(folder))
    without_norms = replace(evidence, heads=evidence.heads.with_columns(output_norm=pl.lit(None, dtype=pl.Float64)))
    rules = rules_table(without_norms, find_defects(without_norms))
    assert rules.filter(pl.col("found").is_null())["defect"].to_list() == ["dead head"]
    assert rules.height == len(DEFECTS)


def test_the_manifest_reads_as_sections(folder: Path) -> None:
    sections = dict(describe(Dataset.open(folder).manifest))
    assert ("stack encoder", "2 layers × 4 heads, seen by sdpa") in sections["Model"]
    assert ("dropped: empty", "1") in sections["Corpus"]
    assert [name for name, _ in sections["Tables"]] == list(WRITTEN)


def test_the_stacks_and_images_of_a_model_are_described() -> None:
    layers = [{"stack": "vision", "heads": heads, "way": way} for heads, way in ((2, "sdpa"), (4, "softmax"))]
    layers.append({"stack": "cross", "heads": 8, "way": "sdpa"})
    layout = {"attention": layers, "without_pattern": ["conv.0"], "residual_refusals": {"cross": "no norm"}}
    stacks = [{"stack": "vision", "layers": 2, "heads": None}, {"stack": "cross", "layers": 1, "heads": 8}]
    images = {
        "pixels": [3, 8, 8],
        "tokens": 17,
        "preprocessor": "P",
        "grids": {"vision": {"rows": 4, "columns": 4, "first_patch": 1}},
    }
    manifest = {
        "model": {"name": "m", "layout": layout, "stacks": stacks},
        "images": images,
        "corpus": {"files": {"a.png": 3, "b.png": 4}},
    }
    sections = dict(describe(manifest))
    assert sections["Model"] == [
        ("name", "m"),
        ("stack vision", "2 layers × 2–4 heads, seen by sdpa and softmax"),
        ("stack cross", "1 layer × 8 heads, seen by sdpa"),
        ("layers without a pattern", "conv.0"),
        ("residual of cross", "no norm"),
        ("preprocessor", "P"),
        ("image", "3 × 8 × 8 pixels, 17 tokens"),
        ("patches of vision", "4 × 4"),
    ]
    assert ("files", "2") in sections["Corpus"]


def test_numbers_and_sizes_are_written_for_people() -> None:
    assert [format_value(v) for v in (1234567, None, True, 0.25)] == ["1 234 567", "—", "yes", "0.25"]
    assert (format_size(10), format_size(2048), format_size(5 * 2**30)) == ("10 B", "2.0 KiB", "5.0 GiB")
