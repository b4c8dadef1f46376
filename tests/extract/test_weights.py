"""`weights`: what each head's matrices do, against full matrices in float64, and against closed forms."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from attlas.analysis.verify import verify
from attlas.extract import measure
from attlas.extract.measurement import layout_of
from attlas.extract.options import RunOptions
from attlas.extract.tables import TABLES
from tests import oracles
from tests.analysis.synthetic import rewrite, write_dataset
from tests.analysis.test_verify import change_column
from tests.extract.models import tiny
from tests.extract.runs import complete_run

COLUMNS = [c.name for c in TABLES["weights"].facts]
QK, OV = ([name for name in COLUMNS if name.startswith(prefix)] for prefix in ("qk_", "ov_"))
Heads = list[list[np.ndarray]]  # W_Q, W_K [stream, width], W_V, W_O of each head


def ids(tokens: int = 9) -> dict[str, torch.Tensor]:
    values = torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": values, "attention_mask": torch.ones_like(values)}


def weights_of(model: nn.Module, **inputs) -> pl.DataFrame:
    return pl.DataFrame(measure(model, tables=("weights",), **inputs)["weights"])


def random(family: str, attention: str = "sdpa", **sizes) -> nn.Module:
    """A tiny model whose every parameter is random, gains and biases too."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=60, **sizes)
    config._attn_implementation = attention
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / math.sqrt(parameter.shape[-1]))
    return model


LLAMA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


# --- the oracle


def expected_of(W_Q, W_K, W_V, W_O, scale: float) -> dict[str, Any]:
    """Every column from its formula, with matrices of the stream's width; the oracle scales by 1/√d_h."""
    return oracles.weights_columns(scale * W_Q.shape[1] ** 0.5 * W_Q, W_K, W_V, W_O)


def check(found: pl.DataFrame, heads: Heads, scale: float) -> None:
    assert found.height == len(heads)
    for row, matrices in zip(found.to_dicts(), heads, strict=True):
        for name, value in expected_of(*matrices, scale).items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, row)


def split(*linear: nn.Linear, heads: int) -> list[list[np.ndarray]]:
    """Queries, keys and values of separate modules, and what reads the contexts, by head."""
    *inputs, output = (module.weight.detach().double().numpy().T for module in linear)
    width = output.shape[0] // heads
    slices = [slice(h * width, (h + 1) * width) for h in range(heads)]
    return [[*(W[:, s] for W in inputs), output[s]] for s in slices]


def of_bert(model) -> Iterator[list[np.ndarray]]:
    for layer in model.encoder.layer:
        attention = layer.attention
        yield from split(
            attention.self.query, attention.self.key, attention.self.value, attention.output.dense, heads=4
        )


def of_gpt2(model) -> Iterator[list[np.ndarray]]:
    for block in cast(Any, model).h:
        fused = block.attn.c_attn.weight.detach().double().numpy()
        output = block.attn.c_proj.weight.detach().double().numpy()
        for h in range(4):
            s = slice(8 * h, 8 * h + 8)
            yield [fused[:, 0:32][:, s], fused[:, 32:64][:, s], fused[:, 64:96][:, s], output[s]]


def of_gpt_neox(model) -> Iterator[list[np.ndarray]]:
    """Query, key and value of one head stand together, then those of the next."""
    for layer in model.layers:
        fused = layer.attention.query_key_value.weight.detach().double().numpy().T.reshape(32, 4, 3, 8)
        output = layer.attention.dense.weight.detach().double().numpy().T
        for h in range(4):
            yield [*(fused[:, h, n] for n in range(3)), output[8 * h : 8 * h + 8]]


def of_falcon(model) -> Iterator[list[np.ndarray]]:
    """The queries of all heads, then the one key and the one value that they share."""
    for layer in model.h:
        fused = layer.self_attention.query_key_value.weight.detach().double().numpy().T
        output = layer.self_attention.dense.weight.detach().double().numpy().T
        for h in range(4):
            yield [fused[:, 8 * h : 8 * h + 8], fused[:, 32:40], fused[:, 40:48], output[8 * h : 8 * h + 8]]


def of_llama(model) -> Iterator[list[np.ndarray]]:
    """Two heads share a key and a value."""
    for layer in model.layers:
        attention = layer.self_attn
        q, k, v, o = (getattr(attention, f"{n}_proj").weight.detach().double().numpy().T for n in ("q", "k", "v", "o"))
        for h in range(4):
            mine, shared = slice(8 * h, 8 * h + 8), slice(8 * (h // 2), 8 * (h // 2) + 8)
            yield [q[:, mine], k[:, shared], v[:, shared], o[mine]]


FAMILIES = {
    "bert": (
        "bert",
        of_bert,
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
    ),
    "gpt2": ("gpt2", of_gpt2, dict(n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)),
    "gpt_neox": (
        "gpt_neox",
        of_gpt_neox,
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
    ),
    "falcon": ("falcon", of_falcon, dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
    "llama": ("llama", of_llama, LLAMA),
    "llama with positions at half their distance": (
        "llama",
        of_llama,
        LLAMA
        | {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 100.0,
            }
        },
    ),
    "gemma": ("gemma", of_llama, LLAMA),
    "qwen2, whose queries and keys have biases": (
        "qwen2",
        of_llama,
        LLAMA,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_column_is_its_formula_on_full_matrices(name: str):
    family, matrices, sizes = FAMILIES[name]
    model = random(family, **sizes)
    check(weights_of(model, **ids()), list(matrices(model)), 8**-0.5)


def test_t5_scales_no_scores_and_its_decoder_and_cross_attention_are_stacks():
    model = random("t5", d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    found = weights_of(model, **ids(), decoder_input_ids=ids(7)["input_ids"])
    layers = [
        (model.encoder.block[0].layer[0].SelfAttention, "encoder"),
        (model.decoder.block[0].layer[0].SelfAttention, "decoder"),
        (model.decoder.block[0].layer[1].EncDecAttention, "cross"),
    ]
    for attention, stack in layers:
        rows = found.filter(stack=stack)
        for row, matrices in zip(
            rows.to_dicts(), split(attention.q, attention.k, attention.v, attention.o, heads=4), strict=True
        ):
            expected = expected_of(*matrices, 1.0)
            if stack == "cross":
                assert row["qk_symmetry"] is None and row["ov_copying"] is None
                expected = {n: v for n, v in expected.items() if n not in ("qk_symmetry", "ov_copying")}
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (stack, name)


def of_torch(attention: nn.MultiheadAttention) -> Heads:
    if attention.in_proj_weight is None:
        q, k, v = (getattr(attention, f"{n}_proj_weight").detach().double().numpy().T for n in "qkv")
    else:
        q, k, v = (W.T for W in np.split(attention.in_proj_weight.detach().double().numpy(), 3))
    output = attention.out_proj.weight.detach().double().numpy().T
    width = attention.head_dim
    slices = [slice(h * width, (h + 1) * width) for h in range(attention.num_heads)]
    return [[q[:, s], k[:, s], v[:, s], output[s]] for s in slices]


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder_multiplies_by_a_parameter_of_its_own(batch_first: bool):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 6)
    found = weights_of(model, src=torch.randn(3, 9, 32))
    check(found, [head for layer in model.layers for head in of_torch(layer.self_attn)], 8**-0.5)


def test_torchs_attention_may_have_a_parameter_for_each_of_the_three():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, kdim=24, vdim=20, batch_first=True).eval()
    x = torch.randn(3, 9, 32)
    found = weights_of(model, query=x, key=torch.randn(3, 7, 24), value=torch.randn(3, 7, 20))
    for row, (q, k, v, o) in zip(found.to_dicts(), of_torch(model), strict=True):
        assert row["qk_norm"] == pytest.approx(np.linalg.norm(q @ k.T) / 8**0.5, rel=1e-5)
        assert row["ov_spectral"] == pytest.approx(np.linalg.svd(v @ o)[1][0], rel=1e-5)
        assert row["qk_symmetry"] is None and row["ov_copying"] is None


def test_a_vision_model_has_weights():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = transformers.ViTModel(config).eval()
    found = weights_of(model, pixel_values=torch.randn(2, 3, 16, 16))
    assert found["stack"].unique().to_list() == ["vision"] and found.height == 8
    assert found.null_count().sum_horizontal().item() == 0


def test_an_adapter_is_part_of_the_matrix():
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny("bert")
    config = LoraConfig(target_modules=r".*\.(query|value|dense)", r=2, lora_alpha=32)
    inject_adapter_in_model(config, model)
    model.eval()
    # zero at first, so that the layout is found while nothing tells the adapter from its module
    before = weights_of(model, **ids())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) / 4)
    after = weights_of(model, **ids())
    for layer in model.encoder.layer:
        for module in (layer.attention.self.query, layer.attention.self.value, layer.attention.output.dense):
            module.merge()
    assert (before["qk_norm"] != after["qk_norm"]).all()
    check(after, list(of_bert(model)), 8**-0.5)


def test_half_precision_weights_are_read_as_they_are():
    model = random("bert", **FAMILIES["bert"][2]).bfloat16()
    check(weights_of(model, **ids()), list(of_bert(model)), 8**-0.5)


# --- what is no bilinear form, or no linear map


def described(model: nn.Module, **inputs) -> list[dict]:
    return layout_of(model, inputs).description["attention"]


def test_normalised_queries_have_no_bilinear_form_but_values_do():
    model = random("qwen3", **LLAMA)
    found = weights_of(model, **ids())
    assert found.select(QK).null_count().row(0) == (8,) * len(QK)
    assert found.select(OV).null_count().row(0) == (0,) * len(OV)
    reasons = [layer["no_query_key"] for layer in described(model, **ids())]
    assert reasons == [f"layers.{n}.self_attn.q_norm is not linear in what it reads" for n in range(2)]
    assert described(model, **ids())[0]["value"] == "layers.0.self_attn.v_proj"


def test_latent_attention_is_two_matrices_in_a_row():
    model = random(
        "deepseek_v2",
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,  # as wide as the stream, so that widths do not tell
        kv_lora_rank=32,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    found = weights_of(model, **ids())
    assert found.select(COLUMNS).null_count().sum_horizontal().item() == found.height * len(COLUMNS)
    (layer,) = described(model, **ids())
    assert "two matrices in a row" in layer["no_value"]


def test_where_a_model_computes_scores_itself_their_modules_are_found_by_the_products():
    """MPNet adds a bias of the positions; so does BLOOM, which hides later keys, with query, key and value fused."""
    model = random("mpnet", "eager", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    of_layers = [layer.attention.attn for layer in cast(Any, model).encoder.layer]
    check(weights_of(model, **ids()), [h for a in of_layers for h in split(a.q, a.k, a.v, a.o, heads=4)], 8**-0.5)
    model = random("bloom", "eager", hidden_size=32, n_layer=2, n_head=4)
    heads = []
    for block in cast(Any, model).h:
        fused = block.self_attention.query_key_value.weight.detach().double().numpy().T.reshape(32, 4, 3, 8)
        output = block.self_attention.dense.weight.detach().double().numpy().T
        heads += [[*(fused[:, h, n] for n in range(3)), output[8 * h : 8 * h + 8]] for h in range(4)]
    check(weights_of(model, **ids()), heads, 8**-0.5)


def test_where_a_models_own_scores_are_no_products_values_are_still_seen():
    """RoFormer rotates queries and keys, and computes the softmax itself."""
    model = random(
        "roformer",
        "eager",
        hidden_size=32,
        embedding_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
    )
    found = weights_of(model, **ids())
    assert found.select(QK).null_count().row(0) == (4,) * len(QK)
    attention = model.encoder.layer[0].attention
    heads = split(attention.self.query, attention.self.key, attention.self.value, attention.output.dense, heads=4)
    np.testing.assert_allclose(found["ov_norm"], [np.linalg.norm(v @ o) for _, _, v, o in heads], rtol=1e-5)
    assert "computes scores itself" in described(model, **ids())[0]["no_query_key"]


class Own(nn.Module):
    """One layer of attention with modules to choose; `change` works on queries, keys and values by head."""

    def __init__(self, qkv: nn.Module, out: nn.Module, change: Callable = lambda q, k, v: (q, k, v), heads: int = 4):
        super().__init__()
        self.embedding, self.qkv, self.out = nn.Embedding(60, 32), qkv, out
        self.change, self.heads = change, heads

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = self.change(q, k, v)
        contexts = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(contexts.transpose(1, 2).flatten(2))


def own(change: Callable = lambda q, k, v: (q, k, v)) -> Own:
    torch.manual_seed(0)
    return Own(nn.Linear(32, 96), nn.Linear(32, 32), change).eval()


def of_own(model: Own) -> Heads:
    q, k, v = (W.T for W in np.split(model.qkv.weight.detach().double().numpy(), 3))
    output = model.out.weight.detach().double().numpy().T
    return [[W[:, 8 * h : 8 * h + 8] for W in (q, k, v)] + [output[8 * h : 8 * h + 8]] for h in range(4)]


def rotated(x: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Pairs of neighbours turned by angles that grow with the position, from `first` on."""
    angles = (torch.arange(x.shape[2]) + first)[:, None] / 10 ** torch.arange(x.shape[3] // 2)
    a, b = x[..., ::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.stack(turned, -1).flatten(-2)


LINEAR = {
    "as they are": lambda q, k, v: (q, k, v),
    "queries scaled before": lambda q, k, v: (3 * q, k, v),
    "a bias for each": lambda q, k, v: (q + torch.linspace(0, 1, 8), k - 1, v + 2),
    "rotated": lambda q, k, v: (rotated(q), rotated(k), v),
    "rotated from position 5": lambda q, k, v: (rotated(q, 5), rotated(k, 5), v),
    "half rotated": lambda q, k, v: (
        *(torch.cat((rotated(x[..., :4]), x[..., 4:]), -1) for x in (q, k)),
        v,
    ),
    "rotated and permuted": lambda q, k, v: (*(rotated(x).flip(-1) for x in (q, k)), v),
    "keys repeated": lambda q, k, v: (q, k.clone().contiguous(), v),
}


@pytest.mark.parametrize("name", LINEAR)
def test_scaling_biases_and_rotations_leave_the_matrices_to_be_found(name: str):
    model = own(LINEAR[name])
    scale = 3 * 8**-0.5 if name == "queries scaled before" else 8**-0.5
    check(weights_of(model, **ids()), of_own(model), scale)


NOT_LINEAR = {
    "normalised": lambda q, k, v: (functional.normalize(q, dim=-1), functional.normalize(k, dim=-1), v),
    "activated": lambda q, k, v: (q.relu(), k, v),
    "keys alone permuted and rotated": lambda q, k, v: (rotated(q), rotated(k.flip(-1)), v),
    "keys rotated further": lambda q, k, v: (rotated(q), rotated(k, 3), v),
    "scaled by position": lambda q, k, v: (q * torch.linspace(1, 2, q.shape[2])[:, None], k, v),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_makes_scores_no_bilinear_form_gives_null_with_a_reason(name: str):
    model = own(NOT_LINEAR[name])
    found = weights_of(model, **ids())
    assert found.select(QK).null_count().row(0) == (4,) * len(QK)
    assert found.select(OV).null_count().row(0) == (0,) * len(OV)
    assert described(model, **ids())[0]["no_query_key"]


@pytest.mark.parametrize("change", [lambda q, k, v: (q, k, v.tanh()), lambda q, k, v: (q, k, v / v.norm())])
def test_values_that_are_changed_are_no_linear_map(change):
    model = own(change)
    found = weights_of(model, **ids())
    if "no_value" in described(model, **ids())[0]:
        assert found.select(OV).null_count().row(0) == (4,) * len(OV)


def test_a_module_that_is_not_linear_in_the_stream_has_no_map():
    class Gelu(nn.Linear):
        def forward(self, x):
            return functional.gelu(super().forward(x))

    model = Own(Gelu(32, 96), nn.Linear(32, 32)).eval()
    found = weights_of(model, **ids())
    assert found.select(COLUMNS).null_count().sum_horizontal().item() == 4 * len(COLUMNS)
    assert described(model, **ids())[0]["no_value"] == "qkv is not linear in what it reads"


def test_what_is_merged_changed_or_trained_since_is_read_again():
    model = own()
    before = weights_of(model, **ids())
    model.qkv.weight.data[:32] *= 2
    after = weights_of(model, **ids())
    np.testing.assert_allclose(after["qk_norm"], 2 * before["qk_norm"], rtol=1e-6)
    assert after["ov_norm"].to_list() == before["ov_norm"].to_list()


# --- runs and passes


def test_weights_alone_need_no_pass(monkeypatch: pytest.MonkeyPatch):
    model = tiny("bert")
    layout_of(model, ids())
    monkeypatch.setattr("attlas.extract.measurement.observe", lambda *_, **__: pytest.fail("no pass is needed"))
    tables = measure(model, tables=("weights", "norms", "compositions"), **ids())
    assert [tables[name].num_rows for name in ("weights", "norms", "compositions")] == [12, 7, 48]


def test_tables_of_the_parameters_are_measured_by_name_because_no_batch_changes_them():
    names = {"weights", "norms", "compositions"}
    assert not names & set(measure(tiny("bert"), **ids()))
    assert set(measure(tiny("bert"), tables=names, **ids())) == names
    assert names <= set(measure(tiny("bert"), statistics=names, **ids()))


def test_a_run_writes_them_once_and_is_verified(demo, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("The parameters are the same in every shard. " * 30)
    options = {"model": "demo", "corpus": str(text), "max_length": 24, "shard_sequences": 3, "device": "cpu"}
    complete_run(RunOptions(out=tmp_path / "out", **options))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["shards"] > 1
    rows = {name: manifest["tables"][name]["rows"] for name in ("weights", "norms", "compositions")}
    assert rows == {"weights": 72, "norms": 13, "compositions": 15 * 144}
    parts = {len(manifest["tables"][name]["parts"]) for name in rows}
    assert parts == {1}
    assert verify(tmp_path / "out") == []
    attention = demo.model.encoder.layer[3].attention
    heads = split(attention.self.query, attention.self.key, attention.self.value, attention.output.dense, heads=12)
    check(pl.read_parquet(tmp_path / "out" / "weights").filter(layer=3), heads, 32**-0.5)


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        ("qk_symmetry", 1.1, "bounds"),
        ("ov_copying", -1.1, "bounds"),
        ("ov_effective_rank", 0.5, "bounds"),
        ("qk_spectral", 1e6, "norms"),
    ],
)
def test_what_cannot_be_is_found_by_verify(tmp_path: Path, column: str, value: float, rule: str):
    root = write_dataset(tmp_path / "d")
    assert verify(root) == []
    rewrite(root, "weights/shard-00000.parquet", change_column(column, lambda values: np.full(len(values), value)))
    assert {finding.check for finding in verify(root)} == {rule}


# --- closed forms


def with_matrices(W_Q, W_K, W_V, W_O) -> Own:
    """A model with one head of these matrices."""
    qkv, out = nn.Linear(32, 24, bias=False), nn.Linear(8, 32, bias=False)
    with torch.no_grad():
        qkv.weight.copy_(torch.cat((W_Q, W_K, W_V), 1).T)
        out.weight.copy_(W_O.T)
    torch.manual_seed(0)
    return Own(qkv, out, heads=1).eval()


def orthogonal(seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(seed)))[0]


def row_of(*matrices) -> dict[str, float]:
    (row,) = weights_of(with_matrices(*matrices), **ids()).to_dicts()
    return row


def test_equal_queries_and_keys_are_symmetric():
    Q, V = orthogonal(0), orthogonal(1)
    row = row_of(Q, Q, V, V.T)
    assert row["qk_symmetry"] == pytest.approx(1)
    assert row["qk_effective_rank"] == pytest.approx(8, rel=1e-5)
    assert row["qk_norm"] == pytest.approx(1, rel=1e-5), "√8 directions of size 1/√8"
    assert row["qk_spectral"] == pytest.approx(8**-0.5, rel=1e-5)


def test_queries_and_keys_turned_by_a_right_angle_are_antisymmetric():
    Q = orthogonal(0)
    K = torch.cat((Q[:, 4:], -Q[:, :4]), 1)
    assert row_of(Q, K, Q, Q.T)["qk_symmetry"] == pytest.approx(0, abs=1e-6)


def test_queries_and_keys_without_a_common_direction_are_half_symmetric():
    both = torch.linalg.qr(torch.randn(32, 16, generator=torch.Generator().manual_seed(2)))[0]
    assert row_of(both[:, :8], both[:, 8:], both[:, :8], both[:, :8].T)["qk_symmetry"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_head_that_writes_what_it_reads_copies_and_one_that_erases_it_does_the_opposite(sign: int):
    V = orthogonal(1)
    row = row_of(V, V, V, sign * V.T)
    assert row["ov_copying"] == pytest.approx(sign, abs=1e-6)
    assert row["ov_effective_rank"] == pytest.approx(8, rel=1e-5)
    assert row["ov_spectral"] == pytest.approx(1, rel=1e-5)
    assert row["ov_norm"] == pytest.approx(8**0.5, rel=1e-5)


def test_a_head_that_turns_what_it_reads_by_a_right_angle_copies_nothing():
    V = orthogonal(1)
    turned = torch.cat((V[:, 4:], -V[:, :4]), 1)
    assert row_of(V, V, V, turned.T)["ov_copying"] == pytest.approx(0, abs=1e-6)


def test_one_direction_is_of_rank_one():
    V = torch.zeros(32, 8)
    V[:, 0] = 1
    row = row_of(V, V, V, V.T)
    assert row["ov_effective_rank"] == pytest.approx(1, rel=1e-6) == row["qk_effective_rank"]
    assert row["ov_norm"] == pytest.approx(row["ov_spectral"], rel=1e-6)


def test_a_head_of_zeros_has_norms_and_nothing_else():
    zero = torch.zeros(32, 8)
    row = row_of(orthogonal(0), orthogonal(1), orthogonal(2), zero.T)
    assert row["ov_norm"] == row["ov_spectral"] == 0
    assert row["ov_effective_rank"] is None and row["ov_copying"] is None
    assert row["qk_effective_rank"] is not None


@given(st.integers(0, 2**31), st.floats(-3, 3), st.integers(1, 8))
def test_columns_keep_their_bounds(seed: int, size: float, rank: int):
    from attlas.extract.capture.head_maps import HeadMaps
    from attlas.extract.tables.weights import HeadProducts, LayerMaps

    generator = torch.Generator().manual_seed(seed)
    factors = [10**size * torch.randn(2, 16, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    factors[0][..., rank:] = 0
    maps = HeadMaps(*factors, is_self=True)
    layer = LayerMaps(HeadProducts(maps.query_key), HeadProducts(maps.output_value), True)
    values = {c.name: c.compute(layer) for c in TABLES["weights"].facts if c.compute is not None}
    for c in TABLES["weights"].facts:
        low, high = c.bounds
        assert (values[c.name] >= (low - 1e-9)).all()
        assert high is None or (values[c.name] <= high + 1e-9).all()
    for name, most in (("qk", rank), ("ov", 8)):
        assert (values[f"{name}_spectral"] <= values[f"{name}_norm"] * (1 + 1e-9)).all()
        assert (values[f"{name}_effective_rank"] <= most * (1 + 1e-6)).all()
