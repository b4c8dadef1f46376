"""Models of half precision whose stream has entries beside which an update is rounded away."""

import polars as pl
import pytest
import torch

from attlas.extract import measure
from attlas.extract.errors import ResidualWarning
from attlas.extract.measurement import layout_of
from tests.extract.models import tiny

IDS = torch.randint(2, 60, (2, 16), generator=torch.Generator().manual_seed(2))


def with_massive_activations():
    """An MLP writes 25,000 into one dimension, as those of real language models do; the norms' gains make up for it."""
    model = tiny("llama")
    model.layers[0].mlp.register_forward_hook(lambda _module, _args, output: _raised(output))
    with torch.no_grad():
        for layer in model.layers[1:]:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.fill_(2000)
                norm.weight[3] = 0
    return model


def _raised(output: torch.Tensor) -> torch.Tensor:
    output = output.clone()
    output[..., 3] += 25_000
    return output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_beside_massive_activations_is_found_in_half_precision(dtype):
    model = with_massive_activations()
    exact = layout_of(model)
    model.to(dtype)
    layout = layout_of(model)
    assert layout.residual_refusal is None
    assert layout.description == exact.description
    tables = measure(model, input_ids=IDS)
    assert pl.DataFrame(tables["residual"])["layer"].n_unique() == 3
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_weights_are_the_models_own_after_it_was_examined():
    model = tiny("gpt2").bfloat16()
    before = {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()}
    tied = model.wte.weight
    layout_of(model)
    assert {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()} == before
    assert model.wte.weight is tied


class OfOneType(torch.nn.Module):
    """A part that takes no other type than its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("like", torch.zeros(1, dtype=torch.int8))

    def forward(self, input_ids, attention_mask=None):
        given = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        assert given[0].dtype == torch.bfloat16, "a kernel of this type"
        return given


def test_a_model_that_runs_in_its_own_type_alone_is_examined_in_it():
    model = OfOneType(tiny("bert").bfloat16()).eval()
    tables = measure(model, input_ids=IDS)
    assert "residual" in tables


def test_measure_says_that_the_stream_is_left_out_and_why():
    model = tiny("bert")
    for layer in model.encoder.layer:
        layer.output.register_forward_hook(lambda _module, _args, output: output * 1.01)
        layer.attention.output.LayerNorm.register_forward_hook(lambda _module, args, output: output + args[0].sin())
    with pytest.warns(ResidualWarning, match="residual is left out: .+"):
        tables = measure(model, input_ids=IDS)
    assert "residual" not in tables
