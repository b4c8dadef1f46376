"""`norms`: γ and β as the norm applies them, whatever its module stores."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from attlas.extract import measure
from attlas.extract.capture.layout import Norm
from attlas.extract.capture.norm_gain import norm_gain
from tests.extract.models import tiny
from tests.extract.test_weights import LLAMA, ids, random


def norms_of(model: nn.Module, **inputs) -> pl.DataFrame:
    return pl.DataFrame(measure(model, tables=("norms",), **inputs)["norms"])


def check(row: dict, gain: torch.Tensor, bias: torch.Tensor | None) -> None:
    gain = gain.detach().double()
    expected = {
        "gain_mean": float(gain.mean()),
        "gain_std": float(gain.std(correction=0)),
        "gain_max_abs": float(gain.abs().max()),
        "bias_norm": None if bias is None else float(bias.detach().double().norm()),
    }
    for name, value in expected.items():
        assert row[name] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)), name


def test_layer_norms_have_gains_and_biases():
    model = random("bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    found = norms_of(model, **ids())
    for layer, block in enumerate(model.encoder.layer):
        for site, module in (("attention", block.attention.output.LayerNorm), ("mlp", block.output.LayerNorm)):
            check(
                found.row(by_predicate=(pl.col("layer") == layer) & (pl.col("site") == site), named=True),
                module.weight,
                module.bias,
            )


@pytest.mark.parametrize(("family", "offset"), [("llama", 0), ("gemma", 1)])
def test_root_mean_square_norms_have_no_bias_and_may_store_the_gain_less_one(family: str, offset: int):
    model = random(family, **LLAMA)
    found = norms_of(model, **ids())
    for layer, block in enumerate(model.layers):
        for site, module in (("attention", block.input_layernorm), ("mlp", block.post_attention_layernorm)):
            row = found.row(by_predicate=(pl.col("layer") == layer) & (pl.col("site") == site), named=True)
            check(row, module.weight + offset, None)


def test_t5_has_the_gains_of_both_its_stacks():
    model = random("t5", d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    found = norms_of(model, **ids(), decoder_input_ids=ids(7)["input_ids"])
    assert set(found["stack"]) == {"encoder", "decoder"}
    row = found.row(by_predicate=(pl.col("stack") == "decoder") & (pl.col("site") == "cross_attention"), named=True)
    check(row, model.decoder.block[0].layer[1].layer_norm.weight, None)


def test_half_precision_gains_are_exact():
    model = random("gemma", **LLAMA).bfloat16()
    row = norms_of(model, **ids()).row(
        by_predicate=(pl.col("layer") == 0) & (pl.col("site") == "attention"), named=True
    )
    check(row, model.layers[0].input_layernorm.weight.float() + 1, None)
    assert model.layers[0].input_layernorm.weight.dtype == torch.bfloat16


def test_rows_are_the_sites_that_have_a_norm():
    tables = measure(tiny("gpt2"), tables=("norms", "residual"), **ids())
    norms, residual = (pl.DataFrame(tables[name]) for name in ("norms", "residual"))
    with_norm = residual.filter(pl.col("norm_scale").is_not_null()).select("stack", "layer", "site").unique()
    assert sorted(norms.select("stack", "layer", "site").rows()) == sorted(with_norm.rows())


def found_for(module: nn.Module, kind: str, epsilon: float = 1e-5, width: int = 33) -> Any:
    model = nn.ModuleDict({"norm": module}).eval()
    return norm_gain(model, Norm("norm", 0, kind, epsilon, width))  # pyright: ignore


def test_a_norm_without_parameters_has_the_gain_one():
    found = found_for(nn.LayerNorm(33, elementwise_affine=False), "layer")
    assert found.bias is None
    np.testing.assert_allclose(found.gain, 1, rtol=1e-5)


def test_a_bias_of_zero_is_a_bias():
    found = found_for(nn.LayerNorm(33), "layer")
    assert found.bias is not None and float(found.bias.norm()) == 0
    assert found_for(nn.LayerNorm(33, bias=False), "layer").bias is None


def test_a_hook_is_part_of_the_gain():
    module = nn.RMSNorm(33, eps=1e-5)
    module.register_forward_hook(lambda _module, _args, output: 3 * output)
    np.testing.assert_allclose(found_for(module, "rms").gain, 3, rtol=1e-5)


class Gated(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x) * x.sigmoid()


class NeedsMore(nn.LayerNorm):
    def forward(self, x, scale):
        return super().forward(x) * scale


@pytest.mark.parametrize(("module", "kind"), [(Gated(33, eps=1e-5), "rms"), (NeedsMore(33), "layer")])
def test_what_does_something_else_or_does_not_run_by_itself_has_no_gain(module: nn.Module, kind: str):
    assert found_for(module, kind) is None
