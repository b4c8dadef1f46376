"""A watched model computes what it computes by itself, at padding too: what looks at a whole tensor may read it there."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from attlas.extract import measure
from attlas.extract.model.measured_model import examine_text_model
from attlas.extract.shard import plan_batches
from tests.census.through_run import tokenizer_of
from tests.census.tiny import build
from tests.extract.models import eager_patterns, tiny

IDS = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(3))


def mask(side: str) -> torch.Tensor:
    real = torch.ones_like(IDS)
    real[1, 7:] = real[2, 4:] = 0
    return real if side == "right" else real.flip(1)


def final_outputs(model, engine="auto", **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model gives by itself, and what it gives while it is measured."""
    given: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda _module, _args, output: given.append(output[0].clone()))
    try:
        with torch.inference_mode():
            model(**inputs)
        measure(model, engine=engine, **inputs)
    finally:
        handle.remove()
    return given[0], given[-1]


class Quantizing(nn.Module):
    """Activations of a Linear as eight-bit integers, by the largest entry of the whole tensor: of all tokens together."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        step = x.abs().amax() / 127
        return self.linear((x / step).round() * step)


def quantized(model):
    """Every Linear of a model quantises what it reads, but for those that make queries and keys."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name not in ("query", "key", "q_proj", "k_proj"):
                setattr(module, name, Quantizing(child).eval())
    return model


def gemma2():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"
    return transformers.Gemma2Model(config).eval()


MODELS = {
    "bert": lambda: tiny("bert"),
    "gpt2": lambda: tiny("gpt2"),
    "llama": lambda: tiny("llama"),
    "mistral": lambda: tiny("mistral"),
    "gemma2": gemma2,
    "mpnet": lambda: transformers.MPNetModel(
        transformers.MPNetConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
    ).eval(),
}


@pytest.mark.sample(12)
@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("attention", ["its own", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODELS)
def test_a_watched_model_gives_what_it_gives_by_itself_at_every_position(family, side, attention, engine):
    model = MODELS[family]()
    if attention == "eager":
        model.set_attn_implementation("eager")
    plain, watched = final_outputs(model, engine, input_ids=IDS, attention_mask=mask(side))
    torch.testing.assert_close(watched, plain, atol=2e-5, rtol=2e-5, equal_nan=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_quantiser_of_whole_tensors_sees_what_it_sees_without_us(family, side):
    model = quantized(tiny(family))
    if (family, side) == (
        "llama",
        "left",
    ):  # rows that see nothing are zero in SDPA and a mean in eager code: one of them
        model.set_attn_implementation("eager")
    inputs = {"input_ids": IDS, "attention_mask": mask(side)}
    plain, watched = final_outputs(model, **inputs)
    torch.testing.assert_close(watched, plain, atol=1e-4, rtol=1e-4)
    rows = measure(model, **inputs)["heads"].to_pylist()
    got = {(r["sequence_id"], r["layer"], r["head"]): r["entropy_nats"] for r in rows}
    for layer, pattern in enumerate(eager_patterns(model, **inputs)):
        for sequence, head in np.ndindex(*pattern.shape[:2]):
            keep = inputs["attention_mask"][sequence].bool()
            p = pattern[sequence, head][keep][:, keep].numpy()
            expected = float(-(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean())
            assert got[sequence, layer, head] == pytest.approx(expected, abs=2e-4)


def test_torchs_own_encoder_gives_its_own_output_at_padding():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    given: list[torch.Tensor] = []
    encoder.register_forward_hook(lambda _module, _args, output: given.append(output.clone()))
    x = torch.randn(3, 12, 32)
    inputs = {"src": x, "src_key_padding_mask": ~mask("right").bool()}
    encoder(**inputs)
    measure(encoder, **inputs)
    torch.testing.assert_close(given[-1], given[0].detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "matters"), [("convbert", True), ("bert", False), ("gpt2", False), ("t5", False)])
def test_padding_matters_to_models_whose_output_depends_on_it(family, matters, dtype):
    model = build(family).model.to(dtype)
    measured = examine_text_model(model, tokenizer_of(model), stacks="encoder", device=torch.device("cpu"))
    assert measured.padding_matters is matters


def test_sequences_are_padded_only_where_it_does_not_matter():
    lengths = [5, 9, 5, 7]
    layout = SimpleNamespace(mixed=False, attentions=[])
    of_any, alike = (
        plan_batches(SimpleNamespace(layout=layout, padding_matters=matters), lengths, batch_tokens=100)
        for matters in (False, True)
    )
    assert len(of_any) == 1
    assert [sorted(lengths[n] for n in batch) for batch in alike] == [[5, 5], [7], [9]]
