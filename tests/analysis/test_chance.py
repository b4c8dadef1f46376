"""Chance levels of heads, against sums over masks written out, and against heads that attend evenly."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from attlas.analysis.chance import OFFSETS, Visible, chance_of
from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import head_means
from attlas.analysis.kinds import HeadShares, head_kinds
from tests.analysis.synthetic import even_scores, write_dataset

LENGTHS, COUNTS = np.array([1, 2, 5, 8, 9]), np.array([2, 1, 1, 3, 1])
OFFSET_OF = {"mass_previous": -1, "mass_next": 1, "mass_self": 0}


def mask(n: int, window: int, *, is_causal: bool) -> np.ndarray:
    d = np.arange(n)[None, :] - np.arange(n)[:, None]
    return (d <= 0) & (d > -window) if is_causal else abs(d) <= window


def even_rows(n: int, window: int, *, is_causal: bool) -> list[dict[str, float]]:
    """The masses of each row of an even head, without row 0 of causal ones."""
    visible = mask(n, window, is_causal=is_causal)
    p = visible / visible.sum(1, keepdims=True)
    rows = []
    for i in range(1 if is_causal else 0, n):
        near = {name: p[i, i + d] if 0 <= i + d < n else 0.0 for name, d in OFFSET_OF.items()}
        rows.append({**near, "mass_first": p[i, 0]})
    return rows


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 20])
def test_chance_is_the_mean_over_rows_of_an_even_head(window: int, is_causal: bool) -> None:
    levels = Visible(is_causal, window, is_exact=True).levels(LENGTHS, COUNTS)
    rows = [
        row
        for n, count in zip(LENGTHS, COUNTS, strict=True)
        for row in even_rows(n, window, is_causal=is_causal) * count
    ]
    for name in OFFSETS:
        assert levels[name] == pytest.approx(np.mean([row[name] for row in rows]), rel=1e-12)
    assert levels["opening"] == COUNTS.sum() / (LENGTHS @ COUNTS)
    assert levels["lone"] == (levels["opening"] if is_causal else 0)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_the_window_follows_from_the_number_of_visible_pairs(window: int, is_causal: bool) -> None:
    pairs = sum(c * mask(n, window, is_causal=is_causal).sum() for n, c in zip(LENGTHS, COUNTS, strict=True))
    found = Visible.of(float(pairs), is_causal=is_causal, lengths=LENGTHS, counts=COUNTS)
    assert (found.window, found.is_exact) == (window, True)
    near = Visible.of(float(pairs) - 1, is_causal=is_causal, lengths=LENGTHS, counts=COUNTS)
    assert not near.is_exact
    assert near.describe(9).endswith("an approximation")


def test_a_mask_is_described_in_words() -> None:
    assert Visible(True, 9, is_exact=True).describe(9) == "closed form for rows that see all keys up to the query"
    assert Visible(False, 8, is_exact=True).describe(9) == "closed form for rows that see all keys"
    assert "a window of 4 keys on each side" in Visible(False, 4, is_exact=True).describe(9)


@pytest.mark.parametrize("is_causal", [True, False])
def test_an_even_head_has_shares_of_zero(tmp_path: Path, is_causal: bool) -> None:
    recipes = [lambda _, n: np.zeros((n, n))]
    root = write_dataset(tmp_path / "d", layers=1, heads=2, lengths=(16, 40), recipes=recipes, is_causal=is_causal)
    kinds = head_kinds(Dataset.open(root))
    # the second token's row is not quite even without the first: mass that is on both is left out as a bound
    for name in ("rest", "awake_previous", "awake_self", "awake_next"):
        assert kinds[name].abs().max() < 1e-2
    assert kinds["rest"].abs().max() < 1e-6
    assert set(kinds["kind"]) == {"broad"}


def test_whether_heads_are_causal_and_how_levels_are_known_is_said(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "d", layers=1, heads=1, lengths=(16, 40), recipes=[even_scores], is_causal=True)
    sources = HeadShares.of(Dataset.open(root)).chance.sources
    texts = dict(sources.select("columns", "source").rows())
    assert texts[", ".join(OFFSETS)] == "closed form for rows that see all keys up to the query"
    assert texts["token classes"].startswith("estimated by L0H0, which attends most evenly (")


def test_without_an_offset_profile_rows_count_as_seeing_every_key(folder: Path) -> None:
    dataset = Dataset.open(folder)
    means = head_means(dataset).with_columns(stack=pl.lit("cross"))
    chance = chance_of(dataset, means)
    assert "an approximation" in chance.sources["source"][0]
    assert (chance.lone == 0).all()
    assert (chance.levels["mass_first"] > 0).all()
