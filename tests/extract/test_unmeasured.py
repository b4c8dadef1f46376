"""What a model can't give is said by name before the run."""

from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from attlas.extract.instrument import Instrument, open_instrument
from attlas.extract.options import RunOptions
from attlas.extract.unmeasured import notes_on_statistics


@pytest.fixture(scope="module")
def demo_instrument(demo) -> Instrument:
    return open_instrument(RunOptions(model="demo", corpus="demo", out="none"), images=None, progress=lambda *_: None)


def instrument_of(model: Path) -> Instrument:
    options = RunOptions(model=str(model), corpus="demo", out="none", device="cpu")
    return open_instrument(options, images=None, progress=lambda *_: None)


def test_nothing_is_said_of_what_is_measured_or_was_not_asked_for_by_name(demo_instrument):
    assert notes_on_statistics("all", demo_instrument) == []
    assert notes_on_statistics("heads,query_norm,residual.curvature,mixing_ratio_norm", demo_instrument) == []


def test_columns_without_what_they_need_are_named_with_the_reason(demo_instrument):
    assert notes_on_statistics("mass_patches,distance_patches,gini", demo_instrument) == [
        "distance_patches, mass_patches will be null: it has no grid of patches"
    ]
    without_classes = replace(demo_instrument, classes=None)
    notes = notes_on_statistics(["mass_word_start", "mass_same_token"], without_classes)
    assert sorted(notes) == [
        "mass_same_token will be null: there are no token ids",
        "mass_word_start will be null: there are no token classes",
    ]


def test_a_model_of_rms_norms_has_no_mean_and_no_norm_after_attention(demo, tmp_path: Path):
    config = transformers.LlamaConfig(
        vocab_size=31000, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    folder = tmp_path / "llama"
    transformers.LlamaModel(config).save_pretrained(folder)
    demo.tokenizer.save_pretrained(folder)
    notes = notes_on_statistics("norm_mean,mixing_ratio_norm,norm_scale", instrument_of(folder))
    assert sorted(notes) == [
        "mixing_ratio_norm will be null: no norm reads what attention has added (pre-norm)",
        "norm_mean will be null: its norms subtract no mean (RMSNorm)",
    ]
