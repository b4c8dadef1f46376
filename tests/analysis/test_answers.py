"""Entropy, distance and residual of patterns with known answers."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from attlas.analysis.dataset import Dataset
from attlas.analysis.distance import distance_by_position, distance_ranking, offset_profile
from attlas.analysis.entropy import entropy_by_head, entropy_by_layer, entropy_by_length, entropy_by_position
from attlas.analysis.info import describe, format_size, format_value
from attlas.analysis.residual import residual_through_depth
from tests.analysis.synthetic import WRITTEN, write_dataset

# layer and head of each recipe in tests/analysis/synthetic.py, four heads to a layer
PREVIOUS, NEXT, SELF, EVEN, SHARP = (0, 0), (0, 1), (0, 2), (1, 0), (1, 3)


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
    assert set(strata.select("tokens_low", "tokens_high").unique().rows()) == {(9, 16), (17, 32)}
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
