import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from polars.testing import assert_frame_equal

import attlas
from attlas.analysis.compare import CHANGED, UNCHANGED, compare
from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import head_means
from attlas.analysis.inference import benjamini_hochberg
from attlas.analysis.series import open_series
from attlas.analysis.trend import CHANGE, VALUE, Trend, trend
from attlas.analysis.trend_overview import sparkline
from attlas.extract.store import Refusal
from attlas.flows.cli import exit_code
from tests.analysis.synthetic import changed_copy, rewrite, write_dataset
from tests.files import read_json, write_json

RunCommand = Callable[..., tuple[int, str, str]]  # exit code, output, errors
L1H2 = (pl.col("layer") == 1) & (pl.col("head") == 2)
STEPS = (0, 100, 200, 1000)
SIZE = {"documents": 12, "seed": 5, "lengths": (6, 20)}


def moved(base: Path, copy: Path, shift: float, column: str = "entropy_nats") -> Path:
    """The dataset with other values of one head."""
    noise = np.random.default_rng(0)

    def move(rows: pl.DataFrame) -> pl.DataFrame:
        added = shift + pl.Series(noise.normal(0, 0.01, rows.height))
        return rows.with_columns(pl.when(L1H2).then(pl.col(column) + added).otherwise(column).alias(column))

    return changed_copy(base, copy, move)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head whose entropy stays at first, and is 0.4 nats higher at the end."""
    folder = tmp_path_factory.mktemp("trend")
    base = write_dataset(folder / "step-0", **SIZE)
    for step, shift in zip(STEPS[1:], (0.0, 0.2, 0.4), strict=True):
        moved(base, folder / f"step-{step}", shift)
    return folder


@pytest.fixture(scope="module")
def found(runs: Path) -> Trend:
    return trend(f"{runs}/*")


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> RunCommand:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = exit_code(["trend", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def with_manifest(root: Path, change: Callable[[dict], object]) -> Path:
    manifest = read_json(root / "manifest.json") or {}
    change(manifest)
    write_json(root / "manifest.json", manifest)
    return root


# --- values and changes


def test_there_is_a_row_for_each_place_column_and_dataset(found: Trend) -> None:
    assert dict(found.rows.schema) == VALUE
    assert dict(found.changes.schema) == CHANGE
    keys = ["step", "stack", "layer", "head", "site", "column"]
    assert found.rows.height == found.rows.select(keys).n_unique() == len(STEPS) * (5 * 8 + 4)  # 8 heads, 4 sites
    assert found.steps == list(STEPS)


def test_values_are_the_means_of_each_dataset(found: Trend, runs: Path) -> None:
    means = head_means(Dataset.open(runs / "step-200"), ["score_max"]).sort("layer", "head")
    ours = found.rows.filter(step=200, column="score_max").sort("layer", "head")
    for ours_of, theirs in (("estimate", "score_max"), ("low", "score_max_low"), ("high", "score_max_high")):
        assert ours[ours_of].to_numpy() == pytest.approx(means[theirs].to_numpy(), rel=1e-12)


def test_each_dataset_is_compared_with_the_one_before_and_with_the_first(found: Trend, runs: Path) -> None:
    pairs = found.changes.select("from_step", "step").unique().sort("from_step", "step").rows()
    assert pairs == [(0, 100), (0, 200), (0, 1000), (100, 200), (200, 1000)]
    ours = found.changes.filter(from_step=0, step=1000, column="entropy_nats").sort("layer", "head")
    theirs = compare(runs / "step-0", runs / "step-1000", columns=["entropy_nats"]).rows.sort("layer", "head")
    for name in ("a", "b", "difference", "low", "high", "margin"):
        assert ours[name].to_numpy() == pytest.approx(theirs[name].to_numpy(), rel=1e-12), name
    assert found.changes["is_paired"].all()


def test_only_the_head_that_changed_is_marked_where_it_changed(found: Trend) -> None:
    head = found.rows.filter(L1H2, column="entropy_nats")
    assert head["change"].to_list() == [None, UNCHANGED, CHANGED, CHANGED]
    assert head["change_from_first"].to_list() == [None, UNCHANGED, CHANGED, CHANGED]
    others = found.changes.filter(~(L1H2 & (pl.col("column") == "entropy_nats")))
    assert set(others["verdict"]) == {UNCHANGED}
    assert found.has_drift
    assert found.changes["difference"][0] == pytest.approx(0.4, abs=0.02)  # the largest effect first


def test_all_tests_of_the_series_are_corrected_together(found: Trend) -> None:
    """The q-values grow with p-values over all pairs, and the smallest is that of all tests."""
    by_pair = [
        compare_pair(found, pair)
        for pair in found.changes.select("from_step", "step").unique(maintain_order=True).rows()
    ]
    p = np.concatenate([frame["p"].to_numpy() for frame in by_pair])
    q = np.concatenate([frame["q"].to_numpy() for frame in by_pair])
    assert q == pytest.approx(benjamini_hochberg(p), rel=1e-9)


def compare_pair(found: Trend, pair: tuple[int, int]) -> pl.DataFrame:
    """The tests of a pair with `p`, from their intervals."""
    from scipy import stats

    rows = found.changes.filter(from_step=pair[0], step=pair[1])
    members = {member.step: member.dataset for member in found.series.members}
    from attlas.analysis.compare import differences_at_places

    frames = []
    for table in ("heads", "residual"):
        columns = [c for c in found.columns if c in {f.name for f in members[0].table(table).facts}]
        keys, differences = differences_at_places(members[pair[0]], members[pair[1]], table, columns, is_paired=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(differences.difference == 0, 0, differences.difference / differences.se)
        frames.append(keys.with_columns(p=pl.Series(2 * stats.t.sf(np.abs(t), differences.freedom))))
    p = pl.concat(frames, how="diagonal")
    on = ["stack", "layer", "head", "site", "column"]
    return rows.join(p, on=on, nulls_equal=True)


def test_other_documents_are_two_samples_and_the_notes_say_so(runs: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "step-2000", **{**SIZE, "documents": 9, "seed": 8})
    with_manifest(other, lambda manifest: manifest["corpus"].update(digest="0" * 64))
    mixed = trend([runs / "step-0", runs / "step-100", other], columns=["mass_first"])
    assert mixed.changes_to(1)["is_paired"].all()
    assert not mixed.changes_to(2)["is_paired"].any()
    assert not mixed.changes_to(2, from_first=True)["is_paired"].any()
    assert (
        "as two samples where documents are not known to be the same: step-100 and step-2000; step-0 and step-2000"
        in " ".join(mixed.notes)
    )


def test_margins_decide_what_matters(runs: Path) -> None:
    wide = trend(f"{runs}/*", columns=["entropy_nats"], margins={"entropy_nats": 1.0})
    assert set(wide.changes["verdict"]) == {UNCHANGED}
    assert not wide.has_drift


# --- alerts


def test_an_entropy_that_collapses_is_an_alert_from_where_it_does(tmp_path: Path) -> None:
    base = write_dataset(tmp_path / "step-0", **SIZE)
    level = head_means(Dataset.open(base), ["entropy_normalized"]).filter(L1H2)["entropy_normalized"].item()

    def collapse(rows: pl.DataFrame, factor: float) -> pl.DataFrame:
        return rows.with_columns(
            entropy_normalized=pl.when(L1H2).then(pl.col("entropy_normalized") * factor).otherwise("entropy_normalized")
        )

    for step, factor in ((100, 0.5), (200, 0.02), (300, 0.01)):
        changed_copy(base, tmp_path / f"step-{step}", lambda rows, factor=factor: collapse(rows, factor))
    found = trend(f"{tmp_path}/*")
    assert found.alerts.select("alert", "step", "layer", "head", "lasts").rows() == [
        ("entropy collapse", 200, 1, 2, True)
    ]
    assert found.alerts["first"].item() == pytest.approx(level)
    assert found.alerts["high"].item() < 0.05


def test_a_head_that_becomes_a_previous_token_head_is_no_alert(tmp_path: Path) -> None:
    base = write_dataset(tmp_path / "step-0", **(SIZE | {"lengths": (16, 34)}))

    def sharpen(rows: pl.DataFrame) -> pl.DataFrame:
        masses = {name: pl.when(L1H2).then(0.0).otherwise(name) for name in ("mass_first", "mass_self", "mass_next")}
        previous = pl.when(L1H2).then(0.97).otherwise("mass_previous")
        entropy = pl.when(L1H2).then(0.01).otherwise("entropy_normalized")
        return rows.with_columns(**masses, mass_previous=previous, entropy_normalized=entropy)

    changed_copy(base, tmp_path / "step-1", sharpen)
    found = trend(f"{tmp_path}/*")
    beyond = found.rows.filter(L1H2, pl.col("high") < 0.05, column="entropy_normalized")
    assert beyond["step"].to_list() == [1]
    assert found.alerts.is_empty()


def test_logits_that_grow_are_an_alert_until_they_shrink(tmp_path: Path) -> None:
    base = write_dataset(tmp_path / "step-0", **SIZE)
    moved(base, tmp_path / "step-1", 150.0, "score_max")
    moved(base, tmp_path / "step-2", 1.0, "score_max")
    found = trend(f"{tmp_path}/*")
    assert found.alerts.select("alert", "step", "layer", "head", "lasts").rows() == [("large logits", 1, 1, 2, False)]


def test_a_head_that_is_sharp_from_the_first_on_is_no_alert(found: Trend) -> None:
    collapsed = found.rows.filter(pl.col("high") < 0.05, column="entropy_normalized")
    assert collapsed.height >= len(STEPS)  # a recipe of the synthetic data
    assert found.alerts.height == 0


# --- the series


def test_steps_are_read_from_folders_and_revisions(tmp_path: Path) -> None:
    for name, revision, step in (
        ("step-0000100", None, 100),
        ("checkpoint-250", None, 250),
        ("run_iter=12", None, 12),
        ("pythia", "step143000", 143000),
    ):
        dataset = write_dataset(tmp_path / name, documents=2, layers=1, heads=1)
        with_manifest(dataset, lambda manifest, revision=revision: manifest["model"].update(revision=revision))
        assert [
            m.step
            for m in open_series([dataset, write_dataset(tmp_path / "step-9", documents=2, layers=1, heads=1)]).members
            if m.name == name
        ] == [step]
        shutil.rmtree(tmp_path / "step-9")


def test_datasets_are_in_the_order_of_their_steps_or_else_as_given(runs: Path, tmp_path: Path) -> None:
    given = [runs / "step-1000", runs / "step-0", runs / "step-200"]
    assert [member.step for member in open_series(given).members] == [0, 200, 1000]
    night = tmp_path / "night-2026-10-31"
    shutil.copytree(runs / "step-100", night)
    series = open_series([runs / "step-1000", night, runs / "step-0"])
    assert [member.name for member in series.members] == ["step-1000", "night-2026-10-31", "step-0"]
    assert [member.step for member in series.members] == [0, 1, 2]
    assert not series.has_steps
    assert "not all of them say a training step" in " ".join(
        trend([runs / "step-1000", night], columns=["mass_first"]).notes
    )


def test_a_pattern_is_in_natural_order(tmp_path: Path) -> None:
    base = write_dataset(tmp_path / "night-9", documents=2, layers=1, heads=1)
    for name in ("night-10", "night-100"):
        shutil.copytree(base, tmp_path / name)
    assert [m.name for m in open_series(f"{tmp_path}/night-*").members] == ["night-9", "night-10", "night-100"]


def test_names_that_are_the_same_are_told_apart_by_their_folders(runs: Path, tmp_path: Path) -> None:
    for run in ("a", "b"):
        shutil.copytree(runs / "step-0", tmp_path / run / "out")
    assert [m.name for m in open_series([tmp_path / "a" / "out", tmp_path / "b" / "out"]).members] == ["a/out", "b/out"]


def test_unfinished_datasets_and_files_are_left_out_and_named(runs: Path, tmp_path: Path) -> None:
    for step in (0, 100, 200):
        shutil.copytree(runs / f"step-{step}", tmp_path / f"step-{step}")
    (tmp_path / "step-200" / "manifest.json").unlink()
    (tmp_path / "step-200" / "_work").mkdir()
    (tmp_path / "trend.html").write_text("")
    found = trend(f"{tmp_path}/*", columns=["mass_first"])
    assert found.steps == [0, 100]
    assert "step-200 is unfinished: left out." in found.notes
    assert "trend.html is a file: left out." in found.notes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["step-0"], "a trend is of two datasets or more; got 1; give their folders, or a pattern in quotes"),
        (["step-0", "nothing"], "a dataset is a folder; there is none at .*nothing"),
        (["step-0", "nothing*"], "nothing matches"),
        (
            ["step-0", "other/step-0"],
            "a training step is once in a series; .*step-0 and other/step-0 are both of step 0",
        ),
        (
            ["step-0", "deep"],
            "deep has other layers or heads than step-0; leave it out, or compare two datasets by depth",
        ),
        (["step-0", "newer"], "schema_version must be .*; got 99"),
    ],
)
def test_what_is_no_series_is_refused_by_name(runs: Path, tmp_path: Path, names: list[str], message: str) -> None:
    shutil.copytree(runs / "step-0", tmp_path / "step-0")
    shutil.copytree(runs / "step-0", tmp_path / "other" / "step-0")
    write_dataset(tmp_path / "deep", **SIZE, layers=3)
    shutil.copytree(runs / "step-100", tmp_path / "newer")
    with_manifest(tmp_path / "newer", lambda manifest: manifest.update(schema_version=99))
    with pytest.raises(Refusal, match=message):
        trend([str(tmp_path / name) for name in names])


# --- columns


def test_columns_are_those_named_or_all(runs: Path) -> None:
    assert trend(f"{runs}/step-?00", columns=["residual.update_ratio", "mass_first"]).columns == (
        "mass_first",
        "update_ratio",
    )
    everything = trend(f"{runs}/step-?00", columns="all")
    assert len(everything.columns) > 40
    with pytest.raises(Refusal, match="did you mean entropy_nats"):
        trend(f"{runs}/*", columns=["entropy_nat"])
    with pytest.raises(Refusal, match="mass_massive was not measured in step-0 and step-100 and step-200 and 1 more"):
        trend(f"{runs}/*", columns=["mass_massive"])


def test_a_column_that_a_dataset_lacks_is_left_out_and_named(runs: Path, tmp_path: Path) -> None:
    newer = tmp_path / "step-50"
    shutil.copytree(runs / "step-0", newer)
    for part in sorted((newer / "residual").iterdir()):
        rewrite(newer, f"residual/{part.name}", _with_median)
    found = trend([runs / "step-0", newer])
    assert "update_ratio_median" not in found.columns
    assert "Not followed, because not all datasets have what step-50 has: residual.update_ratio_median." in found.notes


def _with_median(rows: pa.Table) -> pa.Table:
    return rows.append_column("update_ratio_median", rows["update_ratio"])


# --- the command


def test_the_command_shows_a_line_for_each_column_and_the_largest_changes(runs: Path, run_command: RunCommand) -> None:
    code, text, _ = run_command(f"{runs}/*")
    assert code == 0
    assert re.search(r"entropy_nats +[▁-█]{4} .* 1 of 8 +1 of 8", text)
    assert re.search(r"L1H2 +entropy_nats +▁▁[▄▅]█ +step-0 +step-1000", text)
    assert "since the one before: 1 changed" in text
    assert "No entropy collapse, no large logits." in text


def test_drift_between_the_last_two_sets_the_exit_code(runs: Path, run_command: RunCommand) -> None:
    assert run_command(f"{runs}/*", "--fail-on", "drift")[0] == 3
    assert run_command(str(runs / "step-0"), str(runs / "step-100"), "--fail-on", "drift")[0] == 0
    assert run_command(f"{runs}/*", "--fail-on", "anything")[0] == 2


def test_every_format_has_the_rows(runs: Path, found: Trend, tmp_path: Path, run_command: RunCommand) -> None:
    rows = json.loads(run_command(f"{runs}/*", "--format", "json")[1])
    assert [list(row) for row in rows] == [list(VALUE)] * found.rows.height
    assert len(run_command(f"{runs}/*", "--format", "csv")[1].splitlines()) == found.rows.height + 1
    out = tmp_path / "rows.parquet"
    assert run_command(f"{runs}/*", "--format", "parquet", "--output", str(out))[0] == 0
    assert_frame_equal(pl.read_parquet(out), found.rows)


def test_what_is_left_out_is_said_beside_rows_too(runs: Path, tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "notes.txt").write_text("")
    code, text, errors = run_command(
        *(str(runs / f"step-{n}") for n in (0, 100)), str(tmp_path / "notes.txt"), "--format", "csv"
    )
    assert (code, errors) == (0, "notes.txt is a file: left out.\n")
    assert text.startswith("step,dataset,")


def test_a_sparkline_has_a_bar_for_each_value() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([1.0, None, 1.0]) == "▄ ▄"
    assert sparkline([]) == ""
    long = sparkline([float(n) for n in range(1000)])
    assert len(long) == 24
    assert (long[0], long[-1]) == ("▁", "█")


def test_trend_is_a_function_of_the_package(runs: Path) -> None:
    assert attlas.trend([runs / "step-0", runs / "step-100"], columns="mass_first").rows.height == 16
