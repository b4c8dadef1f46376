"""Defects and findings: each with and without its columns, planted where it should be found; massive activations over layers."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.analysis import find_defects, find_findings
from attlas.analysis.dataset import Dataset
from attlas.analysis.defects import DEFECTS
from attlas.analysis.evidence import Evidence
from attlas.analysis.findings import FINDINGS
from attlas.analysis.judge import judge
from attlas.analysis.massive import massive_activations, typical_entries
from attlas.analysis.rules import SCHEMA, figures, reason_not_checked
from tests.analysis.synthetic import (
    WIDTH,
    Floats,
    broken_scores,
    collapsed_scores,
    even_scores,
    first_token_scores,
    local_scores,
    offset_scores,
    rewrite,
    write_dataset,
)
from tests.files import read_json, write_json

LONG = (20, 40)
STREAM_COLUMNS = ("stream_norm_median", "update_ratio_median", "max_abs_token")


def previous_scores(random: np.random.Generator, n: int) -> Floats:
    """Sharper than `offset_scores`: no row has an entropy."""
    return offset_scores(random, n, offset=-1) * 10


def healthy(random: np.random.Generator, n: int) -> Floats:
    return local_scores(random, n, scale=4.0)


def sharp_first(random: np.random.Generator, n: int) -> Floats:
    return first_token_scores(random, n) * 10


def sharp_separator(random: np.random.Generator, n: int) -> Floats:
    """Rests on the last token, which is a separator."""
    return random.normal(0, 0.1, (n, n)) + 40.0 * (np.arange(n) == n - 1)[None, :]


def places(frame: pl.DataFrame, name: str) -> list[str]:
    return frame.filter(pl.col("name") == name)["place"].to_list()


def not_checked(root: Path) -> dict[str, str]:
    return dict(judge(Dataset.open(root)).not_checked)


def test_healthy_heads_have_no_defect(tmp_path: Path) -> None:
    recipes = [healthy, even_scores, previous_scores, sharp_first, sharp_separator, first_token_scores]
    root = write_dataset(tmp_path / "d", layers=2, heads=3, lengths=LONG, recipes=recipes)
    entropies = Evidence(Dataset.open(root)).heads["entropy_largest"]
    assert (entropies < 0.1).sum() == 3
    assert find_defects(Dataset.open(root)).height == 0


def test_a_broken_head_shows_each_defect(tmp_path: Path) -> None:
    recipes = [healthy, broken_scores, collapsed_scores, healthy, lambda r, n: healthy(r, n) + 7000.0]
    root = write_dataset(tmp_path / "d", layers=1, heads=5, lengths=LONG, recipes=recipes, dead=[(0, 3)])
    manifest = read_json(root / "manifest.json") or {}
    write_json(root / "manifest.json", {**manifest, "dtype": "torch.float16"})
    found = find_defects(Dataset.open(root))
    assert found.schema == SCHEMA
    assert found.select("name", "severity", "place").rows() == [
        ("non-finite rows", "error", "L0H1"),
        ("logits near the limit", "error", "L0H4"),
        ("entropy collapse", "warning", "L0H2"),
        ("dead head", "warning", "L0H3"),
    ]
    sequences = Dataset.open(root).scan("sequences").collect().height
    nonfinite = found.row(0, named=True)
    assert nonfinite["value"] == 2 * sequences
    assert nonfinite["evidence"].startswith(f"{2 * sequences} rows (")
    dead = found.row(3, named=True)
    assert (dead["value"], dead["low"], dead["high"]) == (0, 0, 0)
    assert dead["evidence"].startswith("writes 0.0 where the median head of its layer writes ")


def test_a_head_is_dead_among_dead_ones_too(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", layers=1, heads=2, lengths=LONG, recipes=[healthy], dead=[(0, 0), (0, 1)])
    assert places(find_defects(Dataset.open(root)), "dead head") == ["L0H0", "L0H1"]


def test_collapse_needs_a_sequence_that_is_long_enough(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", layers=1, heads=2, lengths=(5, 9), recipes=[collapsed_scores])
    assert find_defects(Dataset.open(root)).height == 0
    assert not_checked(root)["entropy collapse"] == "no sequence has 16 measured rows"


@pytest.mark.parametrize(
    ("table", "column", "rule"),
    [("heads", "output_norm", "dead head"), ("heads", "score_max", "logits near the limit")],
)
def test_a_defect_whose_column_is_unknown_is_not_checked(tmp_path: Path, table: str, column: str, rule: str) -> None:
    root = write_dataset(tmp_path / "d", layers=1, heads=2, lengths=LONG, summaries=False)
    for path in sorted((root / table).glob("*.parquet")):
        rewrite(root, f"{table}/{path.name}", lambda rows: without_values(rows, column))
    assert not_checked(root)[rule] == f"not measured: {column} is not known for this model"
    assert find_defects(Dataset.open(root)).filter(pl.col("name") == rule).height == 0


def without_values(rows: pa.Table, column: str) -> pa.Table:
    at = rows.schema.get_field_index(column)
    return rows.set_column(at, rows.schema.field(at), pa.nulls(rows.num_rows, rows.schema.field(at).type))


def write_sinks(root: Path, value_ratio: float, **options) -> Path:
    """Two heads at rest and a healthy one; value_ratio_first of the first is set."""
    root = write_dataset(root, layers=1, heads=3, lengths=LONG, recipes=[sharp_first, sharp_first, healthy], **options)
    for path in sorted((root / "heads").glob("*.parquet")):
        rows = pq.read_table(path)
        if "value_ratio_first" in rows.column_names:
            at = rows.schema.get_field_index("value_ratio_first")
            values = [value_ratio if head == 0 else 0.2 for head in rows["head"].to_pylist()]
            pq.write_table(rows.set_column(at, rows.schema.field(at), pa.array(values, pa.float32())), path)
    return root


def test_a_sink_that_writes_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    root = write_sinks(tmp_path / "d", 1.2, statistics=["value_ratio_first"], summaries=False)
    found = find_findings(Dataset.open(root))
    assert places(found, "sink that writes") == ["L0H0"]
    row = found.filter(pl.col("name") == "sink that writes").row(0, named=True)
    assert row["value"] == pytest.approx(1.2)
    assert "would write 1.2 times what others would" in row["evidence"]
    silent = find_findings(
        Dataset.open(write_sinks(tmp_path / "e", 0.9, statistics=["value_ratio_first"], summaries=False))
    )
    assert places(silent, "sink that writes") == []


def test_heads_at_rest_are_listed_and_the_sink_is_reported_once(tmp_path: Path) -> None:
    root = write_sinks(tmp_path / "d", 1.2, statistics=["value_ratio_first"], summaries=False)
    found = find_findings(Dataset.open(root))
    assert places(found, "head at rest") == ["L0H0", "L0H1"]
    sink = found.filter(pl.col("name") == "attention sink")
    assert sink.height == 1
    assert sink["place"][0] == "all heads"
    assert "2 of 3 heads are at rest, 2 of them on the first token" in sink["evidence"][0]
    assert "0.7 times what others would (median), and at least as much in 1 of them" in sink["evidence"][0]
    rest = found.filter(pl.col("name") == "head at rest").row(0, named=True)
    assert rest["low"] <= rest["value"] <= rest["high"]
    assert rest["severity"] == "normal" and rest["source"]


def test_whether_a_sink_writes_is_not_said_without_its_column(tmp_path: Path) -> None:
    root = write_sinks(tmp_path / "d", 1.2)
    reason = "not measured: value_ratio_first; measure with --statistics value_ratio_first"
    assert not_checked(root)["sink that writes"] == reason
    sink = find_findings(Dataset.open(root)).filter(pl.col("name") == "attention sink")
    assert sink["evidence"][0].endswith(f"whether it writes: {reason}")


def test_findings_about_heads_need_sequences_that_are_long_enough(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", layers=1, heads=2, lengths=(5, 9))
    reasons = not_checked(root)
    for name in ("attention sink", "head at rest", "sink that writes", "ignores content"):
        assert name == "sink that writes" or reasons[name].startswith("kinds need sequences of at least 16 tokens")


def test_a_head_that_ignores_content_is_neither_at_rest_nor_positional(tmp_path: Path) -> None:
    recipes = [even_scores, sharp_first, previous_scores, lambda r, n: offset_scores(r, n, offset=0)]
    root = write_dataset(tmp_path / "d", layers=1, heads=4, lengths=LONG, recipes=recipes)
    assert places(find_findings(Dataset.open(root)), "ignores content") == ["L0H0"]


def massive_stream(sizes: dict[int, float], *, token: int = 0, dimension: int = 5):
    """A stream with a massive entry in these layers."""

    def change(x: Floats, layer: int) -> Floats:
        if layer in sizes:
            x[token, dimension] = sizes[layer]
        return x

    return change


def test_massive_activations_are_a_row_for_each_dimension_and_run_of_layers(tmp_path: Path) -> None:
    sizes = {1: 9000.0, 2: -9500.0, 3: 9200.0, 5: 9100.0}
    root = write_dataset(
        tmp_path / "d", layers=7, heads=1, lengths=LONG, stream=massive_stream(sizes), statistics=STREAM_COLUMNS
    )
    found = massive_activations(Dataset.open(root))
    assert found.select("dimension", "layer", "last_layer", "site", "last_site").rows() == [
        (5, 1, 3, "attention", "mlp"),
        (5, 5, 5, "attention", "mlp"),
    ]
    assert found["size"].to_list() == pytest.approx([9500, 9100], rel=1e-3)
    assert found.select("positions", "first_position", "last_position").rows() == [(1, 0, 0)] * 2
    assert found["sequences"].to_list() == [Dataset.open(root).scan("sequences").collect().height] * 2


def test_the_sentence_on_a_massive_activation_names_dimension_token_layers_size_and_ratio(tmp_path: Path) -> None:
    root = write_dataset(
        tmp_path / "d", layers=2, heads=1, lengths=LONG, stream=massive_stream({0: 9000.0}), statistics=STREAM_COLUMNS
    )
    row = find_findings(Dataset.open(root)).filter(pl.col("name") == "massive activation").row(0, named=True)
    assert row["evidence"].startswith("dimension 5 reaches 9000 on token 0 alone, ")
    assert row["evidence"].endswith(
        "times the stream's typical entry, from the embedding of layer 0 to the mlp of layer 0"
    )
    assert (row["dimension"], row["layer"], row["last_layer"], row["place"]) == (5, 0, 0, "L0 embedding")


def test_without_positions_the_option_that_measures_them_is_named(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", layers=2, heads=1, lengths=LONG, stream=massive_stream({0: 9000.0}))
    row = find_findings(Dataset.open(root)).filter(pl.col("name") == "massive activation").row(0, named=True)
    assert "on a token (which one: --statistics max_abs_token)" in row["evidence"]


@pytest.mark.parametrize("size", [99.0, 500.0])
def test_large_entries_that_are_not_a_thousand_times_the_median_are_not_massive(tmp_path: Path, size: float) -> None:
    root = write_dataset(tmp_path / "d", layers=1, heads=1, lengths=LONG, stream=massive_stream({0: size}))
    assert massive_activations(Dataset.open(root)).height == 0


def test_one_massive_token_does_not_move_the_typical_entry(tmp_path: Path) -> None:
    plain, massive = (
        typical_entries(
            Dataset.open(write_dataset(tmp_path / name, layers=2, heads=1, lengths=LONG, stream=massive_stream(sizes))),
            WIDTH,
        ).sort("layer", "site")
        for name, sizes in (("plain", {}), ("massive", {0: 9000.0}))
    )
    assert massive["typical"].to_numpy() == pytest.approx(plain["typical"].to_numpy(), rel=0.05)
    # the states of layer 0 are standard normal before the attention
    embedding = plain.filter(pl.col("site") == "embedding")["typical"][0]
    assert embedding == pytest.approx(0.6745, rel=0.1)


def test_massive_activations_are_not_checked_without_norms_of_tokens(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", layers=1, heads=1, lengths=LONG)
    manifest = read_json(root / "manifest.json") or {}
    del manifest["tables"]["residual_profiles"]
    write_json(root / "manifest.json", manifest)
    assert "token_norm" in not_checked(root)["massive activation"]


def test_norm_growth_is_of_the_median_token_from_the_first_layer_to_the_last(tmp_path: Path) -> None:
    def grow(x: Floats, layer: int) -> Floats:
        x[0] *= 1e4  # one token in none of the medians
        return x * 4.0**layer

    root = write_dataset(tmp_path / "d", layers=3, heads=1, lengths=LONG, stream=grow, statistics=STREAM_COLUMNS)
    row = find_findings(Dataset.open(root)).filter(pl.col("name") == "norm growth").row(0, named=True)
    # layer l's states are (l + 1)·4^l times standard normal
    assert row["value"] == pytest.approx(48, rel=0.1)
    assert (row["layer"], row["last_layer"]) == (0, 2)
    assert "in layer 2: 4" in row["evidence"]
    without = write_dataset(tmp_path / "e", layers=3, heads=1, lengths=LONG, stream=grow)
    reason = "not measured: stream_norm_median; measure with --statistics stream_norm_median"
    assert not_checked(without)["norm growth"] == reason
    flat = write_dataset(tmp_path / "f", layers=3, heads=1, lengths=LONG, statistics=STREAM_COLUMNS)
    assert "norm growth" not in find_findings(Dataset.open(flat))["name"]


def test_every_rule_has_a_row_with_its_source_and_what_it_found(folder: Path) -> None:
    judgement = judge(Dataset.open(folder))
    assert judgement.rules["name"].to_list() == [r.name for r in (*DEFECTS, *FINDINGS)]
    assert (judgement.rules["source"] != "").all()
    assert set(judgement.rules.filter(pl.col("type") == "finding")["severity"]) == {"normal"}
    found = judgement.rules.drop_nulls("found")
    counts = dict(judgement.found["name"].value_counts().rows())
    assert found["found"].to_list() == [counts.get(name, 0) for name in found["name"]]
    assert judgement.rules["found"].is_null().equals(judgement.rules["not_checked"].is_not_null())


def test_the_same_is_found_in_the_rows_as_in_the_summaries(tmp_path: Path) -> None:
    with_sums, without = (
        judge(Dataset.open(write_dataset(tmp_path / str(given), lengths=LONG, summaries=given))).found
        for given in (True, False)
    )
    assert with_sums.drop("value", "low", "high").equals(without.drop("value", "low", "high"))


def test_rows_are_read_only_for_extremes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means come from `summaries`: of `heads` four columns are read, once."""
    scanned = []
    scan = Dataset.scan
    monkeypatch.setattr(Dataset, "scan", lambda self, table, **o: scanned.append(table) or scan(self, table, **o))
    evidence = Evidence(Dataset.open(folder))
    assert evidence.heads.height
    monkeypatch.undo()
    assert "residual" not in scanned
    assert [reason_not_checked(rule, evidence) for rule in DEFECTS] == [None] * len(DEFECTS)


def test_numbers_in_sentences_have_three_digits() -> None:
    values = pl.DataFrame({"x": [0.012345, 3.14159, 123.456, 25078.3, 3.4e38, 0.0]})
    assert values.select(figures(pl.col("x"))).to_series().to_list() == [
        "0.0123",
        "3.14",
        "123",
        "25100",
        "3.4e38",
        "0.0",
    ]


def test_a_dataset_without_residual_has_its_reasons(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", lengths=LONG)
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["tables"]["residual"], manifest["tables"]["residual_profiles"]
    write_json(root / "manifest.json", manifest)
    reasons = not_checked(root)
    assert set(reasons) >= {"massive activation", "norm growth"}
