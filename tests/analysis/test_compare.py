import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from scipy import stats

import attlas
from attlas.analysis.comparability import same_documents
from attlas.analysis.compare import CHANGED, UNCHANGED, UNDECIDED, Comparison, compare
from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD
from attlas.analysis.inference import benjamini_hochberg, estimates, two_sample
from attlas.analysis.matching import match_heads
from attlas.analysis.summaries import summarize_frame
from attlas.extract.store import Refusal
from attlas.flows.cli import exit_code
from tests import oracles
from tests.analysis.synthetic import changed_copy, write_dataset
from tests.files import read_json, write_json

RunCommand = Callable[..., tuple[int, str]]  # exit code and output
L1H2 = (pl.col("layer") == 1) & (pl.col("head") == 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("compare") / "a", documents=12, seed=5, lengths=(6, 20))


@pytest.fixture(scope="module")
def moved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One head's entropy is a quarter of a nat higher, give or take a little."""
    noise = np.random.default_rng(0)

    def move(rows: pl.DataFrame) -> pl.DataFrame:
        shift = 0.25 + pl.Series(noise.normal(0, 0.02, rows.height))
        return rows.with_columns(
            entropy_nats=pl.when(L1H2).then(pl.col("entropy_nats") + shift).otherwise("entropy_nats")
        )

    return changed_copy(base, tmp_path_factory.mktemp("compare") / "b", move)


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> RunCommand:
    def run(*arguments: str) -> tuple[int, str]:
        code = exit_code(["compare", *arguments])
        return code, capsys.readouterr().out

    return run


def _row(found: Comparison, layer: int, head: int, column: str) -> dict:
    return found.rows.filter(layer=layer, head=head, column=column).row(0, named=True)


def test_a_dataset_is_unchanged_against_itself(base: Path) -> None:
    found = compare(base, base)
    assert found.is_paired
    assert not found.has_drift
    assert found.rows["difference"].drop_nulls().abs().max() == 0
    assert found.counts() == {CHANGED: 0, UNDECIDED: 0, UNCHANGED: found.rows.height}
    assert {"entropy_nats", "update_ratio"} <= set(found.rows["column"])


def test_the_one_head_that_changed_is_found_and_no_other(base: Path, moved: Path) -> None:
    found = compare(base, moved)
    changed = found.rows.filter(verdict=CHANGED)
    assert changed.select("layer", "head", "column").rows() == [(1, 2, "entropy_nats")]
    assert found.rows.row(0, named=True) == changed.row(0, named=True)  # the largest effect comes first
    assert found.has_drift


def test_paired_differences_equal_the_jackknife_of_the_difference(base: Path, moved: Path) -> None:
    ours = _row(compare(base, moved, columns=["entropy_nats"]), 1, 2, "entropy_nats")
    rows = [pl.read_parquet(path / "heads" / "*.parquet").filter(L1H2).sort("sequence_id") for path in (base, moved)]
    documents, weight = rows[0]["document_id"].to_numpy(), rows[0]["query_rows"].cast(pl.Float64).to_numpy()
    y = [frame["entropy_nats"].cast(pl.Float64).to_numpy() for frame in rows]
    theta, error, effective = oracles.cluster_mean(y[1] - y[0], weight, documents)
    assert error is not None
    assert ours["difference"] == pytest.approx(theta, rel=1e-9)
    margin = stats.t.ppf(0.975, effective - 1) * error
    assert (ours["low"], ours["high"]) == pytest.approx((theta - margin, theta + margin), rel=1e-9)


def test_documents_of_one_equal_row_give_scipys_paired_test() -> None:
    random = np.random.default_rng(3)
    x = random.normal(size=20)
    y = x + random.normal(0.2, 0.3, 20)
    sums = summarize_frame(pl.DataFrame({"document_id": range(20), "weight": 1.0, "g": 0, "y": y - x}), ["y"], ["g"])
    found = estimates(sums.lazy(), ["g"]).collect().row(0, named=True)
    interval = stats.ttest_rel(y, x).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), rel=1e-10)


def test_pairing_does_not_depend_on_how_documents_lie_in_shards(base: Path, moved: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "c", documents=12, seed=5, lengths=(6, 20), shard_sequences=4)
    wide, narrow = (compare(a, moved).rows for a in (base, other))
    # the profiles of the synthetic data are by shard, its heads are not: all numbers are the same
    keys = ["stack", "layer", "head", "site", "column"]
    assert wide.sort(keys).select(keys).equals(narrow.sort(keys).select(keys))
    for name in ("a", "difference", "low", "high"):
        assert wide.sort(keys)[name].to_numpy() == pytest.approx(
            narrow.sort(keys)[name].to_numpy(), rel=1e-9, abs=1e-12, nan_ok=True
        )


def test_other_documents_are_two_samples(base: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "c", documents=9, seed=8, lengths=(6, 20))
    found = compare(base, other, columns=["mass_previous"])
    assert not found.is_paired
    ours = _row(found, 0, 1, "mass_previous")
    sides = []
    for path in (base, other):
        rows = pl.read_parquet(path / "heads" / "*.parquet").filter(layer=0, head=1)
        sides.append(
            oracles.cluster_mean(
                *(rows[n].cast(pl.Float64).to_numpy() for n in ("mass_previous", "query_rows", "document_id"))
            )
        )
    assert ours["difference"] == pytest.approx(sides[1][0] - sides[0][0], rel=1e-9)
    squares = [(error or 0) ** 2 for _, error, _ in sides]
    freedom = sum(squares) ** 2 / sum(s**2 / (g - 1) for s, (_, _, g) in zip(squares, sides, strict=True))
    half = stats.t.ppf(0.975, freedom) * sum(squares) ** 0.5
    # light documents take their mean weight, and few documents here are light
    assert ours["high"] - ours["difference"] == pytest.approx(half, rel=0.03)


def test_documents_are_the_same_by_digest_or_by_source_and_length(base: Path, tmp_path: Path) -> None:
    copy = Dataset.open(changed_copy(base, tmp_path / "b", lambda rows: rows))
    other = Dataset.open(write_dataset(tmp_path / "c", documents=12, seed=6, lengths=(6, 20)))
    assert same_documents(Dataset.open(base), copy) == "the same digest of the corpus"
    for dataset in (copy, other):
        dataset.manifest["corpus"]["digest"] = dataset.manifest["corpus"]["name"] = "another"
    assert same_documents(Dataset.open(base), copy) == "the same source and length of every document"
    assert same_documents(Dataset.open(base), other) is None


# --- verdicts


def test_margins_decide_what_matters(base: Path, moved: Path) -> None:
    difference = _row(compare(base, moved), 1, 2, "entropy_nats")["difference"]
    for margin, verdict in (
        ("0.1", CHANGED),
        ("0.1 nats", CHANGED),
        ("1", UNCHANGED),
        (f"{1.001 * difference:.6f}", UNDECIDED),
        ("1%", CHANGED),
    ):
        found = compare(base, moved, columns=["entropy_nats"], margins=[f"entropy_nats={margin}"])
        assert _row(found, 1, 2, "entropy_nats")["verdict"] == verdict, margin
    assert _row(compare(base, moved, margins={"entropy_nats": 1.0}), 1, 2, "entropy_nats")["margin"] == 1


def test_fewer_than_two_documents_leave_everything_undecided(tmp_path: Path) -> None:
    one = write_dataset(tmp_path / "a", documents=1, layers=1, heads=2)
    found = compare(one, one)
    assert found.counts() == {CHANGED: 0, UNDECIDED: found.rows.height, UNCHANGED: 0}
    assert found.rows["low"].is_null().all()
    assert found.rows["q"].is_null().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["entropy_nat"]}, "did you mean entropy_nats"),
        (
            {"columns": ["mass_massive"]},
            "mass_massive was not measured in a and b; measure it with --statistics mass_massive",
        ),
        ({"margins": ["entropy_nats=-1"]}, "VALUE a number above 0 in the column's unit"),
        ({"margins": ["entropy_nats=0.1 tokens"]}, "in the column's unit .nats."),
        ({"margins": ["entropy_nats=nan"]}, "VALUE a number above 0"),
        ({"margins": ["entropy_nats"]}, "a margin is COLUMN=VALUE"),
        ({"margins": ["entropy=1"]}, "'entropy' is none; did you mean"),
        ({"match": "nothing"}, "match is one of place, depth, heads"),
        ({"alpha": 0.7}, "alpha is a probability below 0.5"),
    ],
)
def test_what_can_not_be_compared_is_refused(base: Path, options: dict, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        compare(base, base, **options)


def test_settings_and_columns_that_differ_are_named(base: Path, tmp_path: Path) -> None:
    other = changed_copy(base, tmp_path / "b", lambda rows: rows)
    manifest = read_json(other / "manifest.json") or {}
    manifest["run"] |= {"max_length": 7, "dtype": "bfloat16"}
    write_json(other / "manifest.json", manifest)
    notes = "\n".join(compare(base, other).notes)
    assert re.search(r"They differ in max_length: .* and 7 \(columns in tokens and nats depend on the length", notes)
    assert "dtype" in notes


# --- other architectures


def test_models_with_other_heads_are_compared_by_depth(base: Path, tmp_path: Path) -> None:
    deep = write_dataset(tmp_path / "deep", documents=12, seed=5, layers=4, heads=3, lengths=(6, 20))
    found = compare(base, deep)
    assert not found.is_paired
    assert found.rows["depth"].unique().sort().to_list() == [0.25, 0.75]
    assert found.rows["layer"].is_null().all()
    assert any("bands of relative depth" in note for note in found.notes)
    ours = found.rows.filter(depth=0.25, column="mass_self").row(0, named=True)
    for name, path, layers in (("a", base, [0]), ("b", deep, [0, 1])):
        rows = pl.read_parquet(path / "heads" / "*.parquet").filter(pl.col("layer").is_in(layers))
        mean = (rows["mass_self"].cast(pl.Float64) * rows["query_rows"]).sum() / rows["query_rows"].sum()
        assert ours[name] == pytest.approx(mean, rel=1e-9)
    with pytest.raises(Refusal, match="b has other layers or heads than a; compare by depth"):
        compare(base, deep, match="place")


def test_heads_are_matched_with_those_that_look_alike(base: Path, tmp_path: Path) -> None:
    """The heads of the other model are the same in another order."""
    other = write_dataset(tmp_path / "b", documents=12, seed=6, layers=1, heads=8, lengths=(6, 20))
    matches = match_heads(Dataset.open(base), Dataset.open(other))
    in_order = matches.sort(HEAD).select("other_layer", "other_head").rows()
    assert in_order == [(0, head) for head in range(8)]
    found = compare(base, other, match="heads", columns=["mass_previous"])
    assert found.rows.select("other_layer", "other_head").n_unique() == 8


# --- the command


def test_the_command_lists_what_changed(base: Path, moved: Path, run_command: RunCommand) -> None:
    code, text = run_command(str(base), str(moved))
    assert code == 0
    assert "1 changed" in text
    assert re.search(r"L1H2 +entropy_nats", text)
    assert run_command(str(base), str(moved), "--fail-on", "drift")[0] == 3
    assert run_command(str(base), str(base), "--fail-on", "drift")[0] == 0
    assert run_command(str(base), str(moved), "--fail-on", "anything")[0] == 2


def test_json_is_a_list_of_rows_and_every_format_has_them(
    base: Path, moved: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    expected = compare(base, moved).rows
    rows = json.loads(run_command(str(base), str(moved), "--format", "json")[1])
    assert list(rows[0])[:12] == [
        "stack",
        "layer",
        "head",
        "site",
        "column",
        "a",
        "b",
        "difference",
        "low",
        "high",
        "q",
        "verdict",
    ]
    assert len(rows) == expected.height
    assert next(row for row in rows if row["site"])["head"] is None
    assert len(run_command(str(base), str(moved), "--format", "csv")[1].splitlines()) == expected.height + 1
    out = tmp_path / "rows.parquet"
    assert run_command(str(base), str(moved), "--format", "parquet", "--output", str(out))[0] == 0
    assert pl.read_parquet(out).equals(expected)


def test_junit_has_a_test_for_each_head_and_column(base: Path, moved: Path, run_command: RunCommand) -> None:
    root = ElementTree.fromstring(run_command(str(base), str(moved), "--format", "junit")[1])
    failures = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert [(case.get("classname"), case.get("name")) for case in failures] == [("entropy_nats", "L1H2")]
    assert sum(int(suite.get("tests", 0)) for suite in root) == compare(base, moved).rows.height


def test_report_of_two_datasets_is_the_page_of_their_comparison(base: Path, moved: Path, tmp_path: Path) -> None:
    page, rows = tmp_path / "page.html", tmp_path / "rows.json"
    assert exit_code(["report", str(base), str(moved), "--output", str(page)]) == 0
    assert "L1H2" in page.read_text()
    assert exit_code(["report", str(base), str(moved), "--format", "json", "--output", str(rows)]) == 0
    assert json.loads(rows.read_text())["rows"] == compare(base, moved).rows.to_dicts()


def test_compare_is_a_function_of_the_package(base: Path) -> None:
    assert attlas.compare(base, base).rows.height


# --- simulation


def _estimates_of(random: np.random.Generator, effects: np.ndarray, *, documents: int) -> pl.DataFrame:
    """Estimates of as many columns as effects, of documents of unequal weight with random effects."""
    weight = np.tile(random.integers(20, 400, documents).astype(float), len(effects))
    group = np.repeat(np.arange(len(effects)), documents)
    y = effects[group] + random.normal(0, 1, len(group))
    frame = pl.DataFrame(
        {"g": group, "document_id": np.tile(np.arange(documents), len(effects)), "weight": weight, "y": y}
    )
    return estimates(summarize_frame(frame, ["y"], ["g"]).lazy(), ["g"]).collect()


@pytest.mark.slow
def test_the_false_discovery_rate_holds_and_power_is_had() -> None:
    random, runs, rates, power = np.random.default_rng(11), 300, [], []
    effects = np.concatenate([np.zeros(180), np.full(20, 1.2)])
    for _ in range(runs):
        found = two_sample(
            _estimates_of(random, np.zeros(200), documents=30), _estimates_of(random, effects, documents=30)
        )
        called = benjamini_hochberg(found.p_values) < 0.05
        rates.append(called[:180].sum() / max(1, called.sum()))
        power.append(called[180:].mean())
    assert np.mean(rates) <= 0.05 + 2 * np.std(rates) / runs**0.5
    assert np.mean(power) > 0.8


@pytest.mark.slow
def test_under_no_change_anything_is_called_in_at_most_five_percent_of_comparisons() -> None:
    random, runs = np.random.default_rng(12), 400
    called = [
        bool(
            (
                benjamini_hochberg(
                    two_sample(*(_estimates_of(random, np.zeros(100), documents=25) for _ in "ab")).p_values
                )
                < 0.05
            ).any()
        )
        for _ in range(runs)
    ]
    assert np.mean(called) <= 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5


@pytest.mark.slow
def test_a_change_of_twice_the_margin_is_rarely_called_equivalent() -> None:
    random, margin = np.random.default_rng(13), np.full(4000, 0.3)
    changed = two_sample(*(_estimates_of(random, e, documents=30) for e in (np.zeros(4000), 2 * margin)))
    assert changed.are_within(margin).mean() <= 0.05
    at_margin = two_sample(*(_estimates_of(random, e, documents=400) for e in (np.zeros(4000), margin)))
    assert 0.03 <= at_margin.are_within(margin).mean() <= 0.06  # the level of the test, at its border
    same = two_sample(*(_estimates_of(random, np.zeros(4000), documents=400) for _ in "ab"))
    assert same.are_within(margin).mean() > 0.9
