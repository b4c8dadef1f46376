"""A model is measured as it is now: what has changed since it was examined, compiled code, training flags, configurations."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from attlas.extract import measure
from attlas.extract.errors import CaptureError, Refusal
from attlas.extract.measurement import layout_of
from tests.extract.models import tiny
from tests.extract.test_projections import Model, batch, built

IDS = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(IDS)
MASK[1, 8:] = 0


def numbers(model) -> dict[str, list]:
    tables = measure(model, input_ids=IDS, attention_mask=MASK)
    return {f"{name}.{c}": tables[name][c].to_pylist() for name in tables for c in tables[name].column_names}


def assert_alike(got: dict[str, list], expected: dict[str, list]) -> None:
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert len(got[name]) == len(values), name
        if name.endswith((".stack", ".profile", ".site")):
            assert got[name] == values
            continue
        as_numbers = (np.array([np.nan if v is None else v for v in x], float) for x in (got[name], values))
        np.testing.assert_allclose(*as_numbers, rtol=1e-4, atol=1e-5, err_msg=name)


# --- changed since it was examined --------------------------------------------------------------------------------


def eager(model):
    model.set_attn_implementation("eager")


def eager_and_back(model):
    model.set_attn_implementation("eager")
    numbers(model)
    model.set_attn_implementation("sdpa")


def cut(model):
    model.encoder.layer = model.encoder.layer[:2]
    model.config.num_hidden_layers = 2


def longer(model):
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))
    model.config.num_hidden_layers += 1


def norm_replaced(model):
    norm = nn.LayerNorm(32, eps=0.5)
    model.encoder.layer[1].output.LayerNorm = norm.eval()


def hooked(model):
    model.encoder.layer[1].attention.self.register_forward_hook(lambda _m, _args, output: (output[0] * 2, *output[1:]))


def patched(model):
    output = model.encoder.layer[0].output
    before = output.forward
    output.forward = lambda hidden, residual: before(hidden * 0.5, residual)


def double(model):
    model.double()


def weights_written(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def adapted(model):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(target_modules=r".*\.(query|dense)", r=2, lora_alpha=32, init_lora_weights=False)
    torch.manual_seed(1)
    inject_adapter_in_model(config, model)


@pytest.mark.parametrize(
    "change",
    [eager, eager_and_back, cut, longer, norm_replaced, hooked, patched, double, weights_written, adapted],
)
def test_a_model_that_was_changed_is_examined_again(change):
    torch.manual_seed(5)
    model = tiny("bert")
    fresh = copy.deepcopy(model)
    numbers(model)
    for one in (model, fresh):
        change(one)
    assert_alike(numbers(model), numbers(fresh))


def test_an_adapter_that_is_merged_is_read_as_it_was_before():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(target_modules=r".*\.(query|value|dense)", r=2, lora_alpha=32, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = get_peft_model(tiny("bert"), config).eval()
        before = numbers(lora)
        merged = lora.merge_and_unload()
    assert_alike(before, numbers(merged))


def test_updates_that_were_zero_are_found_once_they_are_not():
    model = built(nn.Linear)
    with torch.no_grad():
        for layer in model.layers:
            for linear in (layer.out, layer.mlp[2]):
                linear.weight.zero_()
                linear.bias.zero_()
    assert layout_of(model, batch()).residual_refusal is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 8)
    assert layout_of(model, batch()).residual_refusal is None


class Switched(Model):
    """Its second layer attends, or not, as something says that no attribute of a module shows."""

    def __init__(self, kind):
        super().__init__(kind)
        self.state = {"layers": 2}

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        for layer in self.layers[: self.state["layers"]]:
            x = layer(x, attention_mask[:, None, None].bool())
        return x


def test_a_change_that_nothing_tells_is_seen_when_the_model_runs():
    torch.manual_seed(0)
    model = Switched(nn.Linear).eval()
    assert set(measure(model, **batch())["heads"]["layer"].to_pylist()) == {0, 1}
    model.state["layers"] = 1
    assert set(measure(model, **batch())["heads"]["layer"].to_pylist()) == {0}


# --- compiled ------------------------------------------------------------------------------------------------------


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def layers_in_place(model):
    for layer in model.encoder.layer:
        layer.compile(backend="eager")
    return model


def layers_wrapped(model):
    for number, layer in enumerate(model.encoder.layer):
        model.encoder.layer[number] = torch.compile(layer, backend="eager")
    return model


def in_parallel(model):
    return nn.DataParallel(torch.compile(model, backend="eager"))


@pytest.mark.sample(3)
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("compiled", [whole, in_place, layers_in_place, layers_wrapped, in_parallel])
def test_a_compiled_model_is_measured_as_the_one_it_was_made_of(compiled, called):
    model = tiny("bert")
    expected = numbers(model)
    torch._dynamo.reset()
    made = compiled(model)
    if called:
        with torch.no_grad():
            made(input_ids=IDS, attention_mask=MASK)
    assert_alike(numbers(made), expected)


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return functional.scaled_dot_product_attention(x, x, self.linear(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_what_has_no_python_code_is_refused_in_words():
    x, rows = torch.randn(2, 5, 8), Rows().eval()
    for made, what in (
        (torch.jit.script(rows), "TorchScript"),
        (torch.jit.trace(rows, (x,)), "TorchScript"),
        (torch.export.export(rows, (x,)).module(), "exported program"),
        (nn.Sequential(torch.jit.script(rows)), "TorchScript"),
    ):
        with pytest.raises(Refusal, match=f"{what}.*give the nn.Module"):
            measure(made, x)
    for other in (torch.export.export(rows, (x,)), "bert-base-uncased", None, Rows):
        with pytest.raises(Refusal, match=r"a model is a torch\.nn\.Module; got"):
            measure(other, x)


# --- training mode -------------------------------------------------------------------------------------------------


def fresh_parts(model):
    for layer in model.layers:
        layer.mlp[1] = nn.SiLU()
        layer.out = nn.Sequential(nn.Identity(), nn.Linear(32, 32), nn.Dropout(0.0))


def the_flag_alone(model):
    model.training = True


def everything(model):
    model.train()


class Reading(nn.Linear):
    """Code that reads the flag, and does the same."""

    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x * 1)


def parts_that_read_it(model):
    for layer in model.layers:
        layer.out = Reading(32, 32).train()


@pytest.mark.parametrize("change", [fresh_parts, the_flag_alone, everything, parts_that_read_it])
def test_a_training_flag_that_changes_nothing_is_no_reason_to_refuse(change):
    model = built(nn.Linear)
    change(model)
    flags = [module.training for module in model.modules()]
    assert any(flags)
    tables = measure(model, **batch())
    assert [module.training for module in model.modules()] == flags, "they are put back"
    assert tables["heads"].equals(measure(model.eval(), **batch())["heads"])


class Dropping(nn.Linear):
    def forward(self, x):
        return functional.dropout(super().forward(x), 0.1, training=self.training)


class Skipping(nn.Linear):
    """A layer drop, seldom, by Python's own random numbers."""

    def forward(self, x):
        return x if self.training and random.random() < 1e-6 else super().forward(x)


def _noisy(module, x):
    return x + 0.1 * torch.randn_like(x) if module.training else x


class Noisy(nn.Linear):
    def forward(self, x):
        return _noisy(self, super().forward(x))


class Counting(nn.Linear):
    """Keeps a mean of what it has read, as moving codebooks do."""

    def __init__(self, inner, outer):
        super().__init__(inner, outer)
        self.register_buffer("mean", torch.zeros(inner))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (
            lambda: nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.1)),
            r"layers\.0\.out\.1 \(Dropout\).*drops entries \(p=0\.1\)",
        ),
        (
            lambda: nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(10)),
            r"layers\.0\.out\.1 \(BatchNorm1d\).*by the batch",
        ),
        (lambda: Dropping(32, 32), r"layers\.0\.out \(Dropping\).*something else"),
        (lambda: Skipping(32, 32), r"layers\.0\.out \(Skipping\).*random numbers"),
        (lambda: Noisy(32, 32), r"layers\.0\.out \(Noisy\).*random numbers"),
        (lambda: Counting(32, 32), r"layers\.0\.out \(Counting\).*something else"),
    ],
)
def test_what_would_be_otherwise_in_training_is_refused_by_name(part, why):
    model = built(nn.Linear)
    model.layers[0].out = part().train()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    with pytest.raises(Refusal, match=rf"eval mode; {why}.*call model\.eval\(\)"):
        measure(model, **batch())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    measure(model.eval(), **batch())


def test_a_model_of_transformers_without_dropout_may_be_in_training_mode():
    llama = tiny("llama")
    expected = numbers(llama)
    assert_alike(numbers(llama.train()), expected)
    with pytest.raises(Refusal, match=r"eval mode; embeddings\.dropout \(Dropout\)"):
        numbers(tiny("bert").train())


# --- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.sample(6)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "setting",
    [{"output_attentions": True}, {"output_hidden_states": True}, {"return_dict": False}, {"use_cache": True}],
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_what_a_configuration_asks_a_model_to_give_changes_no_number(family, setting, attention):
    model = tiny(family)
    model.set_attn_implementation(attention)
    expected = numbers(model)
    if attention == "sdpa" and "output_attentions" in setting:
        model.config._output_attentions = True  # transformers refuses it by its setter
    else:
        for name, value in setting.items():
            setattr(model.config, name, value)
    assert_alike(numbers(model), expected)


def test_a_model_that_shows_less_than_it_has_is_refused_however_often_it_is_asked():
    model = tiny("gpt2")
    model.h[2].attn.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    for _ in range(2):
        with pytest.raises(CaptureError, match="ran without showing one"):
            numbers(model)
