"""Which sites a stream has in every kind of model, and their columns against the float64 oracle.

States are read by hooks of the test's own, from places written down here model by model.
"""

from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.nn import functional

from attlas.extract import measure
from attlas.extract.capture.layout import Layout
from attlas.extract.measurement import layout_of
from tests import oracles
from tests.census.tiny import TinyModel, build
from tests.extract.test_heads import assert_columns
from tests.extract.test_residual import OF_STATES, states


class Place(NamedTuple):
    """Where a site's states stand: `<` what a module read, `>` what it wrote. F is y − x, or y is x + F, where not told."""

    x: str
    f: str
    y: str
    norm: str | None = None
    heads: str | None = None  # the module that reads the heads' contexts
    with_x: str | None = None  # a parallel sublayer's update, which x is taken to have in it
    gain: str | None = None
    factor: float = 1.0


def pre_norm(layer, after, norms, attention, mlp):
    """Both sublayers of a pre-norm layer: what the two norms read is the stream."""
    first, second = (f"{layer}.{name}" for name in norms)
    return {
        "attention": Place(f"{first}<", f"{layer}.{attention}>", f"{second}<", first, f"{layer}.{attention}"),
        "mlp": Place(f"{second}<", f"{layer}.{mlp}>", after if after.endswith(">") else f"{after}<", second),
    }


def post_norm(layer, before, parts):
    """The sublayers of a post-norm layer, each `name: (update, norm)`: x is what the norm before wrote."""
    found = {}
    for name, (update, norm) in parts.items():
        heads = None if name == "mlp" else f"{layer}.{update}"
        found[name] = Place(f"{before}>", f"{layer}.{update}>", f"{layer}.{norm}<", f"{layer}.{norm}", heads)
        before = f"{layer}.{norm}"
    return found


def parallel(layer, after, norms, attention, mlp):
    """x' = x + F + G, measured one after the other; x + F is made here, by the test."""
    first, second = (f"{layer}.{name}" for name in norms)
    f, g = f"{layer}.{attention}>", f"{layer}.{mlp}>"
    return {
        "attention": Place(f"{first}<", f, "", first, f"{layer}.{attention}"),
        "mlp": Place(f"{first}<", g, f"{after}<", second, with_x=f),
    }


def llama_like(layers=2, *, stack="decoder", root="", attention="self_attn.o_proj", mlp="mlp.down_proj", norms=None):
    norms = norms or ("input_layernorm", "post_attention_layernorm")
    places = {}
    for n in range(layers):
        after = f"{root}layers.{n + 1}.{norms[0]}" if n + 1 < layers else f"{root}norm"
        for name, place in pre_norm(f"{root}layers.{n}", after, norms, attention, mlp).items():
            places[stack, n, name] = place
    return places


def of_layers(stack, layers, one):
    """`one(n)` gives the sites of layer n."""
    return {(stack, n, name): place for n in range(layers) for name, place in one(n).items()}


def t5_layer(part, layers):
    def one(n):
        block = f"{part}.block.{n}"
        after = f"{part}.block.{n + 1}.layer.0.layer_norm" if n + 1 < layers else f"{part}.final_layer_norm"
        names = [
            ("attention", "SelfAttention.o"),
            ("cross_attention", "EncDecAttention.o"),
            ("mlp", "DenseReluDense.wo"),
        ]
        names = names if part == "decoder" else [names[0], names[2]]
        found = {}
        for m, (name, update) in enumerate(names):
            norm = f"{block}.layer.{m}.layer_norm"
            next_ = f"{block}.layer.{m + 1}.layer_norm" if m + 1 < len(names) else after
            path = f"{block}.layer.{m}.{update}"
            found[name] = Place(f"{norm}<", f"{path}>", f"{next_}<", norm, None if name == "mlp" else path)
        return found

    return one


def bart_layer(part):
    parts = {"attention": ("self_attn.out_proj", "self_attn_layer_norm"), "mlp": ("fc2", "final_layer_norm")}
    if part == "decoder":
        cross = {"cross_attention": ("encoder_attn.out_proj", "encoder_attn_layer_norm")}
        parts = {"attention": parts["attention"], **cross, "mlp": parts["mlp"]}

    def one(n):
        before = f"{part}.layernorm_embedding" if n == 0 else f"{part}.layers.{n - 1}.final_layer_norm"
        return post_norm(f"{part}.layers.{n}", before, parts)

    return one


def clip_layer(root, layers, last):
    def one(n):
        after = f"{root}.layers.{n + 1}.layer_norm1" if n + 1 < layers else last
        return pre_norm(f"{root}.layers.{n}", after, ("layer_norm1", "layer_norm2"), "self_attn.out_proj", "mlp.fc2")

    return one


def whisper_layer(part):
    def one(n):
        layer = f"{part}.layers.{n}"
        after = f"{part}.layers.1.self_attn_layer_norm<" if n == 0 else f"{part}.layer_norm<"
        norms = [
            "self_attn_layer_norm",
            *(["encoder_attn_layer_norm"] if part == "decoder" else []),
            "final_layer_norm",
        ]
        updates = ["self_attn.out_proj", *(["encoder_attn.out_proj"] if part == "decoder" else []), "fc2"]
        names = ["attention", *(["cross_attention"] if part == "decoder" else []), "mlp"]
        ends = [*(f"{layer}.{norm}<" for norm in norms[1:]), after]
        return {
            name: Place(
                f"{layer}.{norm}<", f"{layer}.{f}>", end, f"{layer}.{norm}", None if f == "fc2" else f"{layer}.{f}"
            )
            for name, norm, f, end in zip(names, norms, updates, ends, strict=True)
        }

    return one


def vit_layer(n, layers=2):
    after = f"layers.{n + 1}.layernorm_before" if n + 1 < layers else "layernorm"
    return pre_norm(f"layers.{n}", after, ("layernorm_before", "layernorm_after"), "attention.o_proj", "mlp.fc2")


def swin_layer(stage, first):
    """Two blocks of a stage; the last state is what the last block writes."""

    def one(n):
        block = f"encoder.layers.{stage}.blocks.{n - first}"
        norms = (f"{block}.layernorm_before", f"{block}.layernorm_after")
        after = f"encoder.layers.{stage}.blocks.1.layernorm_before<" if n == first else f"{block}>"
        return {
            "attention": Place(f"{norms[0]}<", "", f"{norms[1]}<", norms[0]),  # the update is put together from windows
            "mlp": Place(f"{norms[1]}<", f"{block}.mlp.fc2>", after, norms[1]),
        }

    return one


def gemma2_layer(n):
    layer, after = f"layers.{n}", "layers.1.input_layernorm" if n == 0 else "norm"
    first, second = f"{layer}.input_layernorm", f"{layer}.pre_feedforward_layernorm"
    return {
        "attention": Place(
            f"{first}<", f"{layer}.post_attention_layernorm>", f"{second}<", first, f"{layer}.self_attn.o_proj"
        ),
        "mlp": Place(f"{second}<", f"{layer}.post_feedforward_layernorm>", f"{after}<", second),
    }


def olmo2_layer(n):
    layer, after = f"layers.{n}", "layers.1.self_attn.q_proj" if n == 0 else "norm"
    return {
        "attention": Place(
            f"{layer}.self_attn.q_proj<",
            f"{layer}.post_attention_layernorm>",
            f"{layer}.mlp.gate_proj<",
            heads=f"{layer}.self_attn.o_proj",
        ),
        "mlp": Place(f"{layer}.mlp.gate_proj<", f"{layer}.post_feedforward_layernorm>", f"{after}<"),
    }


def neox_layer(n):
    after = "layers.1.input_layernorm" if n == 0 else "final_layer_norm"
    norms = ("input_layernorm", "post_attention_layernorm")
    return parallel(f"layers.{n}", after, norms, "attention.dense", "mlp.dense_4h_to_h")


def gptj_layer(n):
    return parallel(f"h.{n}", "h.1.ln_1" if n == 0 else "ln_f", ("ln_1", "ln_1"), "attn.out_proj", "mlp.fc_out")


def falcon_layer(n):
    norms = ("input_layernorm", "input_layernorm")
    after = "h.1.input_layernorm" if n == 0 else "ln_f"
    return parallel(f"h.{n}", after, norms, "self_attention.dense", "mlp.dense_4h_to_h")


def cohere_layer(n):
    norms = ("input_layernorm", "input_layernorm")
    after = "layers.1.input_layernorm" if n == 0 else "norm"
    return parallel(f"layers.{n}", after, norms, "self_attn.o_proj", "mlp.down_proj")


def beit_places():
    places = of_layers("vision", 2, vit_layer)
    for n in range(2):
        for site, name in (("attention", "lambda_1"), ("mlp", "lambda_2")):
            places["vision", n, site] = places["vision", n, site]._replace(gain=f"layers.{n}.{name}")
    last = places["vision", 1, "mlp"]  # the model pools before it norms
    places["vision", 1, "mlp"] = last._replace(y="layers.1>")
    return places


PLACES = {
    "t5": of_layers("encoder", 2, t5_layer("encoder", 2)) | of_layers("decoder", 2, t5_layer("decoder", 2)),
    "bart": of_layers("encoder", 2, bart_layer("encoder")) | of_layers("decoder", 2, bart_layer("decoder")),
    "whisper": of_layers("audio", 2, whisper_layer("encoder")) | of_layers("decoder", 2, whisper_layer("decoder")),
    "clip": of_layers("text", 2, clip_layer("text_model.encoder", 2, "text_model.final_layer_norm"))
    | of_layers("vision", 2, clip_layer("vision_model.encoder", 2, "vision_model.encoder.layers.1>")),
    "vit": of_layers("vision", 2, vit_layer),
    "beit": beit_places(),
    "gemma2": of_layers("decoder", 2, gemma2_layer),
    "olmo2": of_layers("decoder", 2, olmo2_layer),
    "gpt_neox": of_layers("decoder", 2, neox_layer),
    "gptj": of_layers("decoder", 2, gptj_layer),
    "falcon": of_layers("decoder", 2, falcon_layer),
    "cohere": of_layers("decoder", 2, cohere_layer),
    "qwen3": llama_like(),
    "mixtral": llama_like(mlp="mlp"),
    "granite": llama_like(),
    "swin": of_layers("vision", 2, swin_layer(0, 0)),
}

# what comes before the first layer and after the last: the state, and the norm that reads it
ENDS = {
    "t5": {
        ("encoder", 0, "embedding"): ("encoder.block.0.layer.0.layer_norm<", None),
        ("encoder", 1, "final_norm"): ("encoder.final_layer_norm<", "encoder.final_layer_norm"),
        ("decoder", 0, "embedding"): ("decoder.block.0.layer.0.layer_norm<", None),
        ("decoder", 1, "final_norm"): ("decoder.final_layer_norm<", "decoder.final_layer_norm"),
    },
    "bart": {
        (part, 0, "embedding"): (f"{part}.layernorm_embedding<", f"{part}.layernorm_embedding")
        for part in ("encoder", "decoder")
    },
    "clip": {
        ("text", 0, "embedding"): ("text_model.encoder.layers.0.layer_norm1<", None),
        ("text", 1, "final_norm"): ("text_model.final_layer_norm<", "text_model.final_layer_norm"),
        ("vision", 0, "embedding"): ("vision_model.pre_layrnorm<", "vision_model.pre_layrnorm"),
    },
    "vit": {
        ("vision", 0, "embedding"): ("layers.0.layernorm_before<", None),
        ("vision", 1, "final_norm"): ("layernorm<", "layernorm"),
    },
    "olmo2": {("decoder", 0, "embedding"): ("embed_tokens>", None), ("decoder", 1, "final_norm"): ("norm<", "norm")},
}
STACK_MASKS = {("decoder", "t5"): None, ("decoder", "bart"): None, ("decoder", "whisper"): None}


def model_of(family: str) -> TinyModel:
    built = build(family)
    assert isinstance(built, TinyModel), built.reason
    if family == "granite":
        for layer in cast(Any, built.model).layers:
            layer.residual_multiplier = 0.22
    return built


def measured(built: TinyModel, engine: str = "auto") -> dict[str, pa.Table]:
    inputs: dict[str, Any] = dict(built.inputs)
    return measure(built.model, engine=engine, statistics="all", **inputs)


def layout(family: str) -> Layout:
    built = model_of(family)
    return layout_of(built.model, built.inputs)


def places_of(family: str) -> dict:
    places = PLACES[family]
    return {key: p._replace(factor=0.22) for key, p in places.items()} if family == "granite" else places


def norm_of(model: nn.Module, name: str | None, held: dict) -> dict:
    """What the oracle is told of a norm."""
    if name is None:
        return {}
    module = model.get_submodule(name)
    centres = isinstance(module, nn.LayerNorm) or type(module).__name__ == "CohereLayerNorm"
    eps = getattr(module, "eps", None) or module.variance_epsilon
    kind = "layer" if centres else "rms"
    return {"norm_input": held[f"{name}<"], "norm_output": held[f"{name}>"], "norm_kind": kind, "eps": eps}


def read(built: TinyModel, places: dict, ends: dict) -> dict[str, np.ndarray]:
    """Every state that the places name, [batch, token, width]."""
    wanted = {s for p in places.values() for s in (p.x, p.f, p.y, p.with_x, p.heads and f"{p.heads}<") if s}
    wanted |= {state for state, _ in ends.values()}
    norms = {p.norm for p in places.values()} | {norm for _, norm in ends.values()}
    wanted |= {f"{norm}{side}" for norm in norms if norm for side in "<>"}
    held = states(built.model, {spec: spec for spec in wanted}, **built.inputs)
    return {name: value.reshape(len(value), -1, value.shape[-1]) for name, value in held.items()}


def expected_of(model: nn.Module, place: Place, held: dict, heads: int) -> dict:
    x, y = held[place.x], held.get(place.y)
    if place.with_x is not None:
        x = x + held[place.with_x]
    f = held[place.f] * place.factor if place.f else y - x
    if place.gain is not None:
        f = f * model.get_parameter(place.gain).detach().double().numpy()
    y = x + f if y is None else y
    np.testing.assert_allclose(x + f, y, atol=1e-4 * max(1, np.abs(y).max()))
    contexts = None
    if place.heads is not None:
        side_by_side = held[f"{place.heads}<"]
        contexts = side_by_side.reshape(len(side_by_side), heads, -1).transpose(1, 0, 2)
    return oracles.residual_columns(x, f, y, contexts=contexts, **norm_of(model, place.norm, held))


def real_tokens(built: TinyModel, family: str, stack: str, sequence: int) -> slice | np.ndarray:
    text = stack in ("text", "encoder") or (stack == "decoder" and (stack, family) not in STACK_MASKS)
    mask = built.inputs.get("attention_mask") if text else None
    return slice(None) if mask is None else mask[sequence].bool().numpy()


@pytest.mark.sample(8)
@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("family", PLACES)
def test_every_column_of_every_site_equals_the_oracle(family, engine):
    built, places, ends = model_of(family), places_of(family), ENDS.get(family, {})
    held = read(built, places, ends)
    rows = {
        (r["stack"], r["layer"], r["site"], r["sequence_id"]): r
        for r in measured(built, engine=engine)["residual"].to_pylist()
    }
    assert layout_of(built.model, built.inputs).residual_refusals == {}
    for sequence in range(2):
        for (stack, layer, site), place in {**places, **ends}.items():
            real = real_tokens(built, family, stack, sequence)
            one = {name: value[sequence][real] for name, value in held.items() if _reaches(name, place)}
            got = rows[stack, layer, site, sequence]
            if isinstance(place, Place):
                columns = expected_of(built.model, place, one, 4)
            else:
                after = one[place[0]]
                columns = oracles.residual_columns(None, None, after, **norm_of(built.model, place[1], one))
                columns["stream_norm"] = oracles.mean(oracles.norms(after))
            assert_columns(got, {c.name: columns[c.name] for c in OF_STATES}, f"{family} {stack} {layer} {site}")


def _reaches(spec: str, place: Place | tuple) -> bool:
    """Whether a state is one of the place's: others have other tokens."""
    names = [name for name in place if isinstance(name, str)]
    return any(name.rstrip("<>") == spec[:-1] for name in names)


def test_the_sites_of_a_stack_are_those_it_has_and_no_others():
    names = {
        family: [(s.stack, s.name) for s in layout(family).sites if s.layer == 0]
        for family in ("t5", "clip", "olmo2", "qwen3")
    }
    assert names["t5"] == [
        *(("encoder", n) for n in ("embedding", "attention", "mlp")),
        *(("decoder", n) for n in ("embedding", "attention", "cross_attention", "mlp")),
    ]
    assert sorted(set(names["clip"])) == sorted(
        {(s, n) for s in ("text", "vision") for n in ("embedding", "attention", "mlp")}
    )
    assert [n for _, n in names["olmo2"]] == [n for _, n in names["qwen3"]] == ["embedding", "attention", "mlp"]
    norms = {s.norm.module for s in layout("qwen3").sites if s.norm}
    assert not any("q_norm" in n or "k_norm" in n for n in norms)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_torch_encoders_are_measured_in_every_order_of_dimensions(norm_first, batch_first, engine):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, norm_first=norm_first, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False).eval()
    src = torch.randn(3, 7, 16) if batch_first else torch.randn(7, 3, 16)
    table = measure(model, engine=engine, statistics="all", src=src)["residual"].to_pylist()
    rows = {(r["layer"], r["site"], r["sequence_id"]): r for r in table}
    assert {(n, site) for n, site, _ in rows} == {
        *((0, "embedding"), (1, "final_norm")),
        *((n, site) for n in range(2) for site in ("attention", "mlp")),
    }
    for n in range(2):
        base, after = f"layers.{n}", "layers.1.norm1" if n == 0 else "norm"
        if norm_first:
            x, y, z = f"{base}.norm1<", f"{base}.norm2<", f"{after}<"
            starts, norms = (x, y), (f"{base}.norm1", f"{base}.norm2")
        else:
            y, z = f"{base}.norm1<", f"{base}.norm2<"
            starts, norms = (f"{base}<", f"{base}.norm1>"), (f"{base}.norm1", f"{base}.norm2")
        updates = (f"{base}.dropout1>", f"{base}.dropout2>")
        names = {*starts, *updates, y, z, *(f"{m}{s}" for m in norms for s in "<>")}
        held = states(model, {name: name for name in names}, src=src)
        held = held if batch_first else {name: value.swapaxes(0, 1) for name, value in held.items()}
        for site, x, f, end, norm in zip(("attention", "mlp"), starts, updates, (y, z), norms, strict=True):
            for sequence in range(3):
                one = {name: value[sequence] for name, value in held.items()}
                columns = oracles.residual_columns(one[x], one[f], one[end], **norm_of(model, norm, one))
                facts = {c.name: columns[c.name] for c in OF_STATES if not c.name.startswith("heads")}
                assert_columns(rows[n, site, sequence], facts, f"L{n} {site}")
                assert (rows[n, site, sequence]["heads_concat_norm"] is not None) == (site == "attention")


class Layer(nn.Module):
    """A layer whose sum is made by `add(x, F, gain)`."""

    def __init__(self, add) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out, self.up, self.down = (nn.Linear(16, n) for n in (48, 16, 16, 16))
        self.gain = nn.Parameter(torch.linspace(0.1, 2, 16))
        self.add = add

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.add(x, self.out(attended), self.gain)
        return self.add(x, self.down(self.up(self.norm2(x)).relu()), self.gain)


class Model(nn.Module):
    def __init__(self, add) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(add), Layer(add)])
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def custom(add) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Model(add).eval(), torch.randn(2, 9, 16)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_an_update_is_what_is_really_added_whatever_it_is_multiplied_by(engine):
    for add, size in (
        (lambda x, f, gain: x + 0.25 * f, lambda f, gain: 0.25 * f),
        (lambda x, f, gain: x + gain * f, lambda f, gain: gain * f),
        (lambda x, f, gain: f.add_(x), lambda f, gain: f),
    ):
        model, x = custom(add)
        table = measure(model, engine=engine, x=x)["residual"].to_pylist()
        got = {(r["layer"], r["site"]): r["update_norm"] for r in table if r["sequence_id"] == 0}
        for n, layer in enumerate(cast(Any, model).layers):
            held: dict[str, torch.Tensor] = {}

            def keep(module, read, wrote, held=held, layer=layer):
                held["attention" if module is layer.out else "mlp"] = wrote.clone()

            hooks = [module.register_forward_hook(keep) for module in (layer.out, layer.down)]
            with torch.inference_mode():
                model(x)
            for hook in hooks:
                hook.remove()
            for site, f in held.items():
                update = size(f.double(), layer.gain.detach().double())[0].numpy()
                assert got[n, site] == pytest.approx(np.linalg.norm(update, axis=-1).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("add", "why"),
    [
        (lambda x, f, gain: 0.5 * x + f, "x is multiplied by 0.5 before"),
        (lambda x, f, gain: gain * x + f, r"x' = x \+ F\(x\) was not found for attention of layer 0"),
        (lambda x, f, gain: x + f * x.sigmoid(), r"x' = x \+ F\(x\) was not found"),
    ],
)
def test_what_is_no_sum_is_refused_by_name_and_the_heads_go_on(add, why):
    model, x = custom(add)
    layout = layout_of(model, {"x": x})
    assert layout.sites == ()
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(layout.residual_refusal)
    tables = measure(model, x=x)
    assert "residual" not in tables and tables["heads"].num_rows == 2 * 2 * 4


def test_a_gain_that_changes_is_the_one_that_counts():
    model, x = custom(lambda x, f, gain: x + gain * f)
    before = measure(model, x=x)["residual"].to_pylist()
    with torch.no_grad():
        cast(Any, model).layers[1].gain.mul_(3)
    after = measure(model, x=x)["residual"].to_pylist()
    for one, other in zip(before, after, strict=True):
        if (one["layer"], one["site"]) == (1, "attention"):
            assert other["update_norm"] == pytest.approx(3 * one["update_norm"], rel=1e-5)


def test_contexts_of_windows_have_no_token_of_the_stream():
    built = model_of("swin")
    rows = measured(built)["residual"].to_pylist()
    attention = [r for r in rows if r["site"] == "attention"]
    assert {r["layer"] for r in attention} == {0, 1, 2, 3}
    windowed = [r for r in attention if r["layer"] < 2]
    assert all(r["heads_concat_norm"] is None and r["update_norm"] is not None for r in windowed)


def test_layers_of_a_width_of_their_own_are_a_stream_of_their_own():
    sites = layout("swin").sites
    assert [(s.layer, s.name) for s in sites if s.name in ("embedding", "final_norm")] == [
        (0, "embedding"),
        (3, "final_norm"),
    ]


@pytest.mark.parametrize("family", ["vit", "cohere"])
def test_half_precision_keeps_the_sites(family):
    built = model_of(family)
    whole = layout_of(built.model, built.inputs)
    half = built.model.to(torch.bfloat16)
    inputs = {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in built.inputs.items()}
    names = [(s.stack, s.layer, s.name) for s in layout_of(half, {**inputs, "return_dict": True}).sites]
    assert names == [(s.stack, s.layer, s.name) for s in whole.sites]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_padding_that_only_a_mask_shows_never_counts(norm_first, engine):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, norm_first=norm_first, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False).eval()
    src = torch.randn(2, 7, 16)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    padded = measure(model, engine=engine, statistics="all", src=src, src_key_padding_mask=padding)[
        "residual"
    ].to_pylist()
    alone = measure(model, engine=engine, statistics="all", src=src[1:, :4])["residual"].to_pylist()
    rows = [r for r in padded if r["sequence_id"] == 1]
    assert len(rows) == len(alone) == 6
    for got, expected in zip(rows, alone, strict=True):
        facts = {c.name: expected[c.name] for c in OF_STATES}
        assert_columns(got, facts, f"L{got['layer']} {got['site']}")
