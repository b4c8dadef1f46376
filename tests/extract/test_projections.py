"""The output projection is what it does to contexts: ‖c W_O^h‖ of every kind of module, from the module's own output."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from attlas.extract import measure
from attlas.extract.measurement import layout_of

WIDTH, HEADS, TOKENS = 32, 4, 10


class Bare(nn.Module):
    """A weight [out, in] in a module of no known class."""

    def __init__(self, inner=WIDTH, outer=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outer, inner) / inner**0.5)
        self.bias = nn.Parameter(torch.randn(outer))

    def forward(self, x):
        return functional.linear(x, self.weight, self.bias)


class Turned(Bare):
    def forward(self, x):
        return x @ self.weight + self.bias


class ScaledOutput(nn.Linear):
    """A Linear whose outputs have a gain each."""

    def __init__(self, inner, outer):
        super().__init__(inner, outer)
        self.gain = nn.Parameter(torch.rand(outer) + 0.5)

    def forward(self, x):
        return super().forward(x) * self.gain


class Adapted(nn.Module):
    """A low-rank adapter around a Linear."""

    def __init__(self, inner, outer):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(inner, outer), nn.Linear(inner, 4, bias=False), nn.Linear(4, outer)
        self.scale, self.enabled = 2.0, True

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.scale * self.b(self.a(x)) if self.enabled else self.base(x)


class Magnitude(Adapted):
    """An adapter that keeps the size of each output's weights in a vector, as DoRA does."""

    def __init__(self, inner, outer):
        super().__init__(inner, outer)
        self.size = nn.Parameter(torch.rand(outer) + 0.5)

    def forward(self, x):
        weight = self.base.weight + self.scale * self.b.weight @ self.a.weight
        return functional.linear(x, weight * (self.size / weight.norm(dim=1))[:, None], self.base.bias)


class Packed(nn.Module):
    """Weights as integers in a buffer of another shape, with a scale for each output."""

    def __init__(self, inner, outer):
        super().__init__()
        self.register_buffer("packed", torch.randint(-127, 128, (inner * outer,), dtype=torch.int8))
        self.scales = nn.Parameter(torch.rand(outer) / 1000)

    def forward(self, x):
        return x @ self.packed.to(x.dtype).view(x.shape[-1], -1) * self.scales


class Borrowed(nn.Module):
    """No weight of its own: that of another module, the other way round."""

    def __init__(self, inner, outer):
        super().__init__()
        self.lender = [nn.Linear(inner, outer)]

    def forward(self, x):
        return x @ self.lender[0].weight.to(x.dtype)


class HeadScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(HEADS) + 0.5)

    def forward(self, x):
        return (x.unflatten(-1, (HEADS, -1)) * self.gain[:, None]).flatten(-2)


class RowsOnly(nn.Linear):
    """Takes rows, as Megatron's and grouped kernels do."""

    def forward(self, x):
        assert x.dim() == 2, "rows"
        return super().forward(x)


class OfRows(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        self.rows = RowsOnly(inner, outer)

    def forward(self, x):
        return self.rows(x.flatten(0, -2)).view(*x.shape[:-1], -1)


def weight_norm(inner, outer):
    return nn.utils.parametrizations.weight_norm(nn.Linear(inner, outer))


def old_weight_norm(inner, outer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(inner, outer))


def hooked(inner, outer):
    linear = nn.Linear(inner, outer)
    linear.register_forward_hook(lambda _module, _args, output: output * 1.5)
    return linear


def with_own_forward(inner, outer):
    linear = nn.Linear(inner, outer)
    before = linear.forward
    linear.forward = lambda x: before(x) * 0.5
    return linear


LINEAR = {
    "linear": nn.Linear,
    "conv1d": lambda i, o: Conv1D(o, i),
    "bare": Bare,
    "turned": Turned,
    "scaled output": ScaledOutput,
    "adapted": Adapted,
    "magnitude": Magnitude,
    "packed": Packed,
    "borrowed": Borrowed,
    "rows only": OfRows,
    "weight norm": weight_norm,
    "old weight norm": old_weight_norm,
    "hooked": hooked,
    "own forward": with_own_forward,
    "dropout after": lambda i, o: nn.Sequential(nn.Linear(i, o), nn.Dropout(0.5)),
    "dropout before": lambda i, o: nn.Sequential(nn.Dropout(0.5), nn.Linear(i, o)),
    "two in a row": lambda i, o: nn.Sequential(nn.Linear(i, o), nn.Linear(o, o)),
    "low rank": lambda i, o: nn.Sequential(nn.Linear(i, 6, bias=False), nn.Linear(6, o)),
    "heads scaled before": lambda i, o: nn.Sequential(HeadScale(), nn.Linear(i, o)),
    "zero": lambda i, o: nn.Linear(i, o).requires_grad_(False).apply(lambda m: m.weight.zero_()),
}


class Bottleneck(nn.Module):
    """A Linear with an adapter beside it that is not linear."""

    def __init__(self, inner, outer):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(inner, outer), nn.Linear(inner, 4), nn.Linear(4, outer)

    def forward(self, x):
        return self.base(x) + self.up(functional.gelu(self.down(x)))


class Quantizing(nn.Linear):
    """Activations as eight-bit integers, by the largest entry of the whole tensor."""

    def forward(self, x):
        step = x.abs().amax().clamp_min(1e-12) / 127
        return super().forward((x / step).round() * step)


NOT_LINEAR = {
    "bottleneck": Bottleneck,
    "mlp": lambda i, o: nn.Sequential(nn.Linear(i, o), nn.GELU(), nn.Linear(o, o)),
    "activated": lambda i, o: nn.Sequential(nn.Linear(i, o), nn.Tanh()),
    "quantizing": Quantizing,
    "norm before": lambda i, o: nn.Sequential(nn.LayerNorm(i), nn.Linear(i, o)),
}


class Layer(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), out
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        self.contexts = torch.empty(0)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        contexts = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        self.contexts = contexts
        x = x + self.out(contexts)
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embedding = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Layer(kind(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask[:, None, None].bool())
        return x


def built(kind) -> Model:
    torch.manual_seed(0)
    return Model(kind).eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def output_norms(model) -> list[float | None]:
    return measure(model, **batch())["heads"]["output_norm"].to_pylist()


def of_modules(model) -> list[float]:
    """‖f(c of one head) − f(0)‖ in float64: what the module gives where the other heads' contexts are zero."""
    with torch.no_grad():
        model(**batch())
        found = []
        for layer in model.layers:
            contexts = layer.contexts.double()
            out = layer.out.double()
            nothing = out(torch.zeros_like(contexts))
            for head in range(HEADS):
                alone = torch.zeros_like(contexts)
                places = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
                alone[..., places] = contexts[..., places]
                found += (out(alone) - nothing).norm(dim=-1).mean(-1).tolist()
            layer.out.float()
    return found


@pytest.mark.parametrize("kind", LINEAR)
def test_a_heads_update_is_what_the_projection_makes_of_its_contexts(kind):
    model = built(LINEAR[kind])
    np.testing.assert_allclose(output_norms(model), of_modules(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_what_is_no_linear_map_of_contexts_is_null_with_the_reason(kind):
    model = built(NOT_LINEAR[kind])
    tables = measure(model, **batch())
    assert set(tables["heads"]["output_norm"].to_pylist()) == {None}
    assert set(tables["heads"]["value_weighted_first"].to_pylist()) == {None}
    described = layout_of(model, batch()).description["attention"]
    assert all(a["projection"] is None and "linear" in a["no_projection"] for a in described)
    assert "residual" in tables, "the stream is read all the same"


def test_the_norm_of_a_projection_in_a_sandwich_is_no_part_of_it():
    model = built(lambda i, o: nn.Sequential(nn.Linear(i, o), nn.LayerNorm(o)))
    bare = built(nn.Linear)
    for layer, other in zip(model.layers, bare.layers, strict=True):
        other.load_state_dict(
            {k.replace("out.0.", "out."): v for k, v in layer.state_dict().items() if "out.1" not in k}
        )
    np.testing.assert_allclose(output_norms(model)[:HEADS], output_norms(bare)[:HEADS], rtol=1e-4)


@pytest.mark.parametrize("kind", [nn.Linear, Bare, Adapted, Magnitude, Packed])
def test_half_precision_projections_are_theirs_to_its_rounding(kind):
    model = built(kind).bfloat16()
    np.testing.assert_allclose(output_norms(model), of_modules(model.float()), rtol=3e-2)


def switched(model):
    for layer in model.layers:
        layer.out.enabled = False


def rescaled(model):
    for layer in model.layers:
        layer.out.scale = 0.25


def merged(model):
    for layer in model.layers:
        layer.out.base.weight.data += layer.out.scale * layer.out.b.weight.data @ layer.out.a.weight.data
        layer.out.enabled = False


def replaced(model):
    for layer in model.layers:
        layer.out = Bare()


def rewritten(model):
    with torch.no_grad():
        for layer in model.layers:
            layer.out.base.weight.mul_(0.5)


def rewritten_unseen(model):
    for layer in model.layers:
        layer.out.base.weight.data.mul_(0.5)


def rewritten_in_inference_mode(model):
    with torch.inference_mode():
        for layer in model.layers:
            layer.out.base.weight.mul_(0.5)


def bound_by_a_hook(model):
    for layer in model.layers:
        layer.out.register_forward_hook(lambda _module, _args, output: 3 * output)


@pytest.mark.parametrize(
    "change",
    [switched, rescaled, merged, replaced, rewritten, rewritten_unseen, rewritten_in_inference_mode, bound_by_a_hook],
)
def test_a_projection_that_has_changed_since_the_last_call_is_read_again(change):
    model = built(Adapted)
    before = output_norms(model)
    change(model)
    now = output_norms(model)
    assert now != before
    np.testing.assert_allclose(now, of_modules(model), rtol=1e-4)


def test_the_projection_of_torchs_own_attention_may_make_its_weight_of_others():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True).eval()
    plain = measure(layer, src=torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)))
    nn.utils.parametrizations.weight_norm(layer.self_attn.out_proj)
    made = measure(layer, src=torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)))
    norms = [tables["heads"]["output_norm"].to_pylist() for tables in (plain, made)]
    assert None not in norms[0]
    np.testing.assert_allclose(*norms, rtol=1e-4)
