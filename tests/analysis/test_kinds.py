"""Head kinds: known patterns, two labels, thresholds, chance, refusals and the agreement of replicates."""

import io
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from attlas.analysis import head_kinds
from attlas.analysis.chance import OFFSETS, Chance
from attlas.analysis.dataset import Dataset
from attlas.analysis.kinds import (
    AWAKE_KINDS,
    KINDS,
    MIN_TOKENS,
    MIXED,
    NAMES,
    REST_KINDS,
    SHAPE_KINDS,
    HeadShares,
    Shares,
    classify,
    kinds_table,
    overlap_of,
    shares_of,
)
from attlas.analysis.report import report
from tests.analysis.synthetic import Floats, local_scores, offset_scores, write_dataset

PREVIOUS, NEXT, SELF, FIRST, EVEN, NEAR = (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)
COLUMNS = tuple(dict.fromkeys([*(k.column for k in KINDS), "mass_bos"]))


def at(frame: pl.DataFrame, place: tuple[int, int]) -> dict:
    return frame.filter((pl.col("layer") == place[0]) & (pl.col("head") == place[1])).row(0, named=True)


def no_chance(heads: int) -> Chance:
    """Levels of 0, as in sequences without end."""
    zero = np.zeros(heads)
    return Chance(dict.fromkeys((*OFFSETS, *COLUMNS), zero), zero, zero, pl.DataFrame())


def shares_without_chance(**means: list[float]) -> Shares:
    heads = len(next(iter(means.values())))
    known = {name: np.full(heads, np.nan) for name in COLUMNS} | {n: np.array(v) for n, v in means.items()}
    nothing_shared = {k.name: np.zeros(heads) for k in AWAKE_KINDS}
    return shares_of(known, no_chance(heads), nothing_shared)


def labels(shares: Shares) -> list[tuple[str, str]]:
    kind, awake = classify(shares)
    return [(NAMES[k], NAMES[a]) for k, a in zip(kind, awake, strict=True)]


def test_known_patterns_have_their_kind_and_replicates_agree(folder: Path) -> None:
    result = head_kinds(Dataset.open(folder))
    for place, kind in ((PREVIOUS, "previous"), (NEXT, "next"), (SELF, "self"), (FIRST, "first"), (EVEN, "broad")):
        row = at(result, place)
        assert row["kind"] == kind
        assert row["agreement"] > 0.98
        assert row["reason"] is None
    assert at(result, NEAR)["kind"] == "local"


@pytest.mark.parametrize("kind", (*AWAKE_KINDS, *SHAPE_KINDS), ids=lambda k: k.name)
def test_a_head_at_the_threshold_is_of_the_kind_and_one_short_of_it_is_not(kind) -> None:
    step = 1e-6 if kind.side == "≥" else -1e-6
    found = labels(shares_without_chance(**{kind.column: [kind.threshold, kind.threshold - step]}))
    assert found == [(kind.name, kind.name), (MIXED, MIXED)]


@pytest.mark.parametrize("kind", REST_KINDS, ids=lambda k: k.name)
def test_a_head_is_at_rest_from_the_threshold_on(kind) -> None:
    means = {"mass_first": [0.0, 0.0], kind.column: [kind.threshold, kind.threshold - 1e-6]}
    found = labels(shares_without_chance(**means))
    assert [label for label, _ in found] == [kind.name, MIXED]


def test_of_several_kinds_the_one_farthest_beyond_its_threshold_wins_and_shape_comes_last() -> None:
    found = shares_without_chance(
        mass_previous=[0.45, 0.0],
        mass_self=[0.5, 0.0],
        entropy_normalized=[0.99, 0.99],
        distance_vs_uniform=[1.0, np.nan],
    )
    assert labels(found) == [("self", "self"), ("broad", "broad")]


def test_what_a_head_does_awake_is_judged_without_its_rest() -> None:
    shares = shares_without_chance(mass_first=[0.9, 0.9, 0.2], mass_induction=[0.06, 0.01, 0.1])
    assert shares.awake["induction"] == pytest.approx([0.6, 0.1, 0.125])
    assert labels(shares) == [("first", "induction"), ("first", MIXED), (MIXED, MIXED)]


def test_shapes_say_nothing_of_heads_at_rest() -> None:
    assert labels(shares_without_chance(mass_first=[0.5], distance_vs_uniform=[0.1])) == [("first", MIXED)]


def test_sinks_are_heads_that_rest_on_massive_tokens_other_than_the_first() -> None:
    shares = shares_without_chance(mass_first=[0.5, 0.5, 0.1], mass_massive=[0.5, 0.8, 0.2])
    assert [kind for kind, _ in labels(shares)] == ["first", "sinks", MIXED]
    assert shares.at_rest == pytest.approx([0.5, 0.8, 0.2])


def test_a_share_is_corrected_for_chance() -> None:
    heads = 1
    chance = Chance(
        {name: np.full(heads, 0.2) for name in (*OFFSETS, *COLUMNS)}, np.zeros(1), np.zeros(1), pl.DataFrame()
    )
    means = {name: np.full(heads, np.nan) for name in COLUMNS} | {
        "mass_first": np.array([0.2]),
        "mass_next": np.array([0.4]),
    }
    shares = shares_of(means, chance, {k.name: np.zeros(heads) for k in AWAKE_KINDS})
    assert shares.rest == pytest.approx([0.0])
    # of 0.8 awake half is on the next token; an even head has a quarter: (0.5 − 0.25) / (1 − 0.25)
    assert shares.awake["next"] == pytest.approx([1 / 3])


def test_mass_on_the_first_token_is_no_mass_of_another_kind() -> None:
    """Head 1 rests entirely, so its masses say what the first tokens are; head 0 does nothing else when it is awake."""
    means = {name: np.full(2, np.nan) for name in COLUMNS} | {
        "mass_first": np.array([0.9, 1.0]),
        "mass_bos": np.zeros(2),
        "mass_punctuation": np.array([0.27, 0.3]),
        "mass_same_token": np.array([0.05, 0.0]),
    }
    overlap = overlap_of(means, no_chance(2), ["decoder"] * 2)
    assert overlap["punctuation"] == pytest.approx([0.3, 0.3])
    shares = shares_of(means, no_chance(2), overlap)
    assert shares.awake["punctuation"][0] == pytest.approx(0, abs=1e-12)
    assert shares.awake["same-token"][0] == pytest.approx(0.5)


def test_tokens_that_begin_sequences_are_of_no_other_class() -> None:
    means = {name: np.full(1, np.nan) for name in COLUMNS} | {
        "mass_first": np.array([0.5]),
        "mass_bos": np.array([0.5]),
        "mass_punctuation": np.array([0.5]),
    }
    overlap = overlap_of(means, no_chance(1), ["encoder"])
    assert overlap["punctuation"] == pytest.approx([0])


def resting(random: np.random.Generator, n: int) -> Floats:
    """Rows that rest on the first token, but for every fourth, which looks at the token before."""
    scores = random.normal(0, 0.1, (n, n))
    scores[:, 0] += 9
    awake = np.arange(2, n, 4)
    scores[awake, awake - 1] += 18
    return scores


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_head_at_rest_has_two_labels(tmp_path: Path, is_causal: bool) -> None:
    recipes = [resting, lambda r, n: 40.0 * (np.arange(n) == 0)[None, :] + 0 * r.normal(size=(n, n))]
    root = write_dataset(
        tmp_path / "d",
        layers=1,
        heads=2,
        lengths=(60, 90),
        recipes=recipes,
        is_causal=is_causal,
        statistics=["mass_massive"],
    )
    result = head_kinds(Dataset.open(root))
    awake, asleep = at(result, (0, 0)), at(result, (0, 1))
    assert (awake["kind"], awake["awake"]) == ("first", "previous")
    assert awake["awake_share"] > 0.9
    assert 0.6 < awake["rest"] < 0.8
    assert (asleep["kind"], asleep["awake"]) == ("first", None)
    assert asleep["reason"] == "less than 0.5 % of its attention is awake"
    assert asleep["rest"] == pytest.approx(1, abs=1e-6)


def test_resting_is_not_looking_at_the_token_before_although_the_second_row_does(tmp_path: Path) -> None:
    """In the second row the first token is the one before: the whole of mass_previous of a head at rest."""
    recipes = [lambda r, n: r.normal(0, 0.1, (n, n)) + 6.0 * (np.arange(n) == 0)[None, :]]
    root = write_dataset(tmp_path / "d", layers=1, heads=1, lengths=(20, 40), recipes=recipes, is_causal=True)
    row = head_kinds(Dataset.open(root)).row(0, named=True)
    assert (row["kind"], row["awake"]) == ("first", MIXED)
    assert row["awake_previous"] < 0.05


def test_massive_tokens_elsewhere_are_sinks(tmp_path: Path) -> None:
    recipes = [lambda r, n: r.normal(0, 0.1, (n, n)) + 8.0 * (np.arange(n) == 3)[None, :]]
    root = write_dataset(
        tmp_path / "d",
        layers=1,
        heads=1,
        lengths=(20, 40),
        recipes=recipes,
        massive=[0, 3],
        statistics=["mass_massive"],
    )
    assert head_kinds(Dataset.open(root))["kind"].to_list() == ["sinks"]


def test_short_sequences_have_no_kinds_and_say_why(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", lengths=(5, 9))
    result = head_kinds(Dataset.open(root))
    assert result["kind"].is_null().all() and result["awake"].is_null().all() and result["agreement"].is_null().all()
    reason = result["reason"].unique().to_list()
    assert len(reason) == 1
    assert f"at least {MIN_TOKENS} tokens; 100 % of the tokens are in shorter ones" in reason[0]
    result = report(root)
    assert "Heads have no kinds here: kinds need sequences of at least 16 tokens" in result.html
    console = Console(width=140, file=io.StringIO())
    console.print(result.terminal())
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert re.search(r"none +8 +– +kinds need sequences of at least 16 tokens", text)


def test_a_few_short_sequences_among_long_ones_do_not_matter(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", lengths=(15, 60), documents=8)
    assert Dataset.open(root).scan("sequences").select(pl.col("tokens").min()).collect().item() >= 15
    assert head_kinds(Dataset.open(root))["kind"].is_not_null().all()


def test_uncertain_labels_have_less_agreement_and_a_seed_repeats_them(tmp_path: Path) -> None:
    recipes = [
        lambda r, n: offset_scores(r, n, offset=-1) if r.random() < 0.45 else local_scores(r, n, scale=9.0),
        lambda r, n: offset_scores(r, n, offset=-1),
    ]
    root = write_dataset(tmp_path / "d", layers=1, heads=2, lengths=(20, 40), recipes=recipes)
    dataset = Dataset.open(root)
    result = head_kinds(dataset, replicates=400)
    assert at(result, (0, 0))["agreement"] < 0.95
    assert at(result, (0, 1))["agreement"] > 0.99
    assert head_kinds(dataset, replicates=400).equals(result)
    assert not head_kinds(dataset, replicates=400, seed=1)["agreement"].equals(result["agreement"])


def test_agreement_is_how_often_students_t_stays_beyond_the_threshold(tmp_path: Path) -> None:
    from dataclasses import replace

    from scipy.special import stdtr

    measured = HeadShares.of(Dataset.open(write_dataset(tmp_path / "d", layers=1, heads=1, lengths=(30, 40))))
    nothing = {name: np.zeros(1) for name in measured.means}
    means = {name: np.zeros(1) for name in measured.means} | {"mass_previous": np.array([0.45])}
    chance = no_chance(1)
    errors = nothing | {"mass_previous": np.array([0.05])}
    single = replace(measured, means=means, errors=errors, freedom=np.array([3.0]), chance=chance)
    agreement, _ = single.agreement(replicates=4000, seed=0)
    assert agreement[0] == pytest.approx(1 - stdtr(3, -1.0), abs=0.02)


def test_one_document_has_kinds_without_agreement(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", documents=1, lengths=(16, 30))
    result = head_kinds(Dataset.open(root))
    assert result["kind"].is_not_null().all()
    assert result["agreement"].is_null().all()


def test_kinds_are_the_same_from_rows_and_from_summaries(tmp_path: Path) -> None:
    with_sums, without = (
        head_kinds(Dataset.open(write_dataset(tmp_path / str(given), lengths=(16, 30), summaries=given)))
        for given in (True, False)
    )
    assert with_sums["kind"].equals(without["kind"])
    assert with_sums["rest"].to_numpy() == pytest.approx(without["rest"].to_numpy(), rel=1e-9)


def test_the_table_of_kinds_states_every_threshold(folder: Path) -> None:
    table = kinds_table()
    assert table["kind"].to_list() == [*(k.name for k in KINDS), MIXED]
    assert "mass_previous / (1 − rest) ≥ 0.4" in table["rule"].to_list()
    assert "mass_first ≥ 0.3" in table["rule"].to_list()
    page = report(folder).html
    assert all(rule in page for rule in table["rule"])
    assert "corrected for chance" in page and "not of sequences of other lengths" in page
