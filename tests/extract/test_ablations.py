"""`ablations`: leaving a part out is what a model gives whose weights of that part are zero."""

import copy
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers
from torch import nn

from attlas.analysis.verify import verify
from attlas.extract import measure
from attlas.extract.capture.runtime import ablation as ablations
from attlas.extract.measurement import layout_of
from attlas.extract.options import RunOptions
from tests.extract.models import tiny
from tests.extract.runs import complete_run


def ids_of(n: int = 11, batch: int = 2) -> torch.Tensor:
    return torch.randint(2, 60, (batch, n), generator=torch.Generator().manual_seed(3))


def grouped_language_model() -> nn.Module:
    """A causal language model of two layers, whose four query heads share two key–value heads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def change(y: torch.Tensor, z: torch.Tensor) -> tuple[float, float]:
    cosine = nn.functional.cosine_similarity(y.double(), z.double(), dim=-1).mean()
    return float(1 - cosine), float((z.double().norm(dim=-1) / y.double().norm(dim=-1) - 1).mean())


def without_head(model: nn.Module, projection: str, head: int, heads: int) -> nn.Module:
    """A copy of the model whose output projection gives nothing for a head."""
    changed = copy.deepcopy(model)
    module = changed.get_submodule(projection)
    weight = module.weight.data
    is_conv = type(module).__name__ == "Conv1D"
    width = (weight.shape[0] if is_conv else weight.shape[1]) // heads
    span = slice(head * width, (head + 1) * width)
    weight[span if is_conv else (slice(None), span)] = 0
    return changed


def without(model: nn.Module, *modules: str) -> nn.Module:
    """A copy of the model in which modules give zeros."""
    changed = copy.deepcopy(model)
    for name in modules:
        for parameter in changed.get_submodule(name).parameters():
            parameter.data.zero_()
    return changed


# where each family's heads are read side by side, and what its MLP writes
PLACES = {
    "bert": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
    "llama": ("layers.{}.self_attn.o_proj", "layers.{}.mlp.down_proj"),
    "gpt2": ("h.{}.attn.c_proj", "h.{}.mlp.c_proj"),
    "distilbert": ("transformer.layer.{}.attention.out_lin", "transformer.layer.{}.ffn.lin2"),
}


def rows_of(tables) -> dict[tuple, dict]:
    return {
        (r["sequence_id"], r["layer"], r["part"], r["head"]): r for r in pl.DataFrame(tables["ablations"]).to_dicts()
    }


@pytest.mark.parametrize("family", PLACES)
def test_leaving_a_part_out_is_what_weights_of_zero_give(family):
    model = tiny(family)
    attention, mlp = PLACES[family]
    ids, mask = ids_of(), torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    rows = rows_of(measure(model, tables=("ablations",), **inputs))
    layers = len({layer for _, layer, *_ in rows})
    assert len(rows) == 2 * layers * (4 + 2)
    with torch.inference_mode():
        plain = model(**inputs).last_hidden_state
        for layer in range(layers):
            changed = {("head", h): without_head(model, attention.format(layer), h, 4) for h in range(4)}
            changed |= {("attention", -1): without(model, attention.format(layer))}
            changed |= {("mlp", -1): without(model, mlp.format(layer))}
            for (part, head), other in changed.items():
                ablated = other(**inputs).last_hidden_state
                for sequence, n in enumerate((11, 6)):
                    expected = change(plain[sequence, :n], ablated[sequence, :n])
                    row = rows[sequence, layer, part, head]
                    found = (row["final_change"], row["final_norm_change"])
                    assert found == pytest.approx(expected, rel=1e-3, abs=2e-6), (layer, part, head)
                    assert row["loss_change_nats"] is None


def test_a_model_that_computes_softmax_by_hand_has_ablations_of_its_heads():
    torch.manual_seed(0)
    config = transformers.MPNetConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.MPNetModel(config).eval()
    assert "softmax" in layout_of(model).methods
    ids = ids_of(batch=1)
    rows = rows_of(measure(model, tables=("ablations",), input_ids=ids))
    with torch.inference_mode():
        plain = model(ids).last_hidden_state
        for layer in range(2):
            for head in range(4):
                other = without_head(model, f"encoder.layer.{layer}.attention.attn.o", head, 4)
                expected = change(plain, other(ids).last_hidden_state)[0]
                assert rows[0, layer, "head", head]["final_change"] == pytest.approx(expected, rel=1e-3, abs=2e-6)


def test_layers_that_share_their_weights_are_left_out_one_at_a_time():
    """ALBERT runs one layer several times; hooks that count its calls say what each time is worth."""
    model, ids = tiny("albert"), ids_of(batch=1)
    rows = rows_of(measure(model, tables=("ablations",), input_ids=ids))
    dense = next(m for name, m in model.named_modules() if name.endswith("attention.dense"))
    with torch.inference_mode():
        plain = model(ids).last_hidden_state
        for layer in range(3):
            calls = 0

            def clear(module, args, layer=layer):
                nonlocal calls
                calls += 1
                read = args[0].clone()
                if calls - 1 == layer:
                    read[..., 8:16] = 0
                return (read,)

            hook = dense.register_forward_pre_hook(clear)
            expected = change(plain, model(ids).last_hidden_state)[0]
            hook.remove()
            assert rows[0, layer, "head", 1]["final_change"] == pytest.approx(expected, rel=1e-3, abs=2e-6)


def test_torch_modules_with_tokens_first_have_ablations():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    src = torch.randn(2, 7, 16)
    rows = rows_of(measure(model, tables=("ablations",), src=src))
    with torch.inference_mode():
        plain = model(src)
        for n in range(2):
            other = without_head(model, f"layers.{n}.self_attn.out_proj", 2, 4)
            expected = change(plain[1], other(src)[1])[0]
            assert rows[1, n, "head", 2]["final_change"] == pytest.approx(expected, rel=1e-3, abs=2e-6)


def test_a_causal_language_model_has_the_change_of_its_loss():
    model, ids = grouped_language_model(), ids_of()
    rows = rows_of(measure(model, tables=("ablations",), input_ids=ids))

    def loss(of: nn.Module, sequence: int) -> float:
        return float(of(ids[sequence : sequence + 1], labels=ids[sequence : sequence + 1]).loss)

    with torch.inference_mode():
        for head in range(4):
            other = without_head(model, "model.layers.1.self_attn.o_proj", head, 4)
            for sequence in range(2):
                expected = loss(other, sequence) - loss(model, sequence)
                assert rows[sequence, 1, "head", head]["loss_change_nats"] == pytest.approx(expected, abs=2e-6)


def test_the_gain_from_repetition_is_what_repeated_tokens_lose_more_than_others():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.tensor([[5, 9, 7, 5, 9, 7, 11, 9]])
    rows = rows_of(measure(model, tables=("ablations",), input_ids=ids))

    def losses(of: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(of(ids).logits[0, :-1], ids[0, 1:], reduction="none").double()

    with torch.inference_mode():
        for head in range(4):
            change = losses(without_head(model, "transformer.h.0.attn.c_proj", head, 4)) - losses(model)
            # of the next tokens 9, 7, 5, 9, 7, 11, 9 those at places 2, 3, 4 and 6 have occurred
            expected = change[[2, 3, 4, 6]].mean() - change[[0, 1, 5]].mean()
            found = rows[0, 0, "head", head]["repeat_gain_change_nats"]
            assert found == pytest.approx(float(expected), abs=2e-6)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_layers_below_a_head_are_not_computed_again(family, monkeypatch: pytest.MonkeyPatch):
    model, ids = tiny(family), ids_of(batch=1)
    monkeypatch.setattr(ablations, "_TOKENS", 4 * 11)  # the four heads of one layer at a time
    name = {"bert": "encoder.layer.0.intermediate", "llama": "layers.0.mlp", "gpt2": "h.0.mlp"}[family]
    tokens = 0

    def count(_module, args, _output):
        nonlocal tokens
        tokens += args[0][..., 0].numel()

    model.get_submodule(name).register_forward_hook(count)
    measure(model, tables=("ablations",), input_ids=ids)
    layout_of(model)
    tokens = 0
    measure(model, tables=("ablations",), input_ids=ids)
    # the measured pass, the plain one, and copies of the sequence without each of the six parts of the first layer, in fours
    assert tokens <= (1 + 1 + 8) * 11


def test_a_model_that_does_not_take_what_lower_layers_gave_is_run_whole():
    """Its second layer reads what the first one left behind, besides its output."""

    class Layer(nn.Module):
        def __init__(self, left: list) -> None:
            super().__init__()
            self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 16)
            self.qkv, self.left = nn.Linear(16, 48), left

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            self.left.append(x.mean())
            c = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return x + self.out(c) * (1 + self.left[0])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left: list = []
            self.layers = nn.ModuleList([Layer(self.left), Layer(self.left)])

        def forward(self, x):
            self.left.clear()
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(1, 6, 16)
    rows = rows_of(measure(model, tables=("ablations",), x=x))
    with torch.inference_mode():
        expected = change(model(x), without_head(model, "layers.1.out", 3, 4)(x))[0]
    assert rows[0, 1, "head", 3]["final_change"] == pytest.approx(expected, rel=1e-3, abs=2e-6)


def test_a_run_has_the_ablations_of_the_sample_and_is_verified(demo, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("What is left out is missed. " * 30)
    options = {"model": "demo", "corpus": str(text), "max_length": 24, "shard_sequences": 5, "device": "cpu"}
    complete_run(RunOptions(out=tmp_path / "out", statistics="ablations", sample=1, **options))
    rows = pl.read_parquet(tmp_path / "out" / "ablations" / "*.parquet")
    shards = len(list((tmp_path / "out" / "heads").glob("*.parquet")))
    assert rows.height == shards * 6 * (12 + 2)
    assert rows.filter(part="head")["final_change"].min() > 0
    assert verify(tmp_path / "out") == []


def test_a_replaced_forward_function_stays_in_its_place():
    model, ids = tiny("bert"), ids_of(batch=1)
    layer = model.encoder.layer[0]
    original, calls = layer.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = forward
    rows = rows_of(measure(model, tables=("ablations",), input_ids=ids))
    assert layer.forward is forward and len(calls) > 2
    other = without_head(tiny("bert"), "encoder.layer.2.attention.output.dense", 1, 4)
    with torch.inference_mode():
        expected = change(tiny("bert")(ids).last_hidden_state, other(ids).last_hidden_state)[0]
    assert rows[0, 2, "head", 1]["final_change"] == pytest.approx(expected, rel=1e-3, abs=2e-6)
