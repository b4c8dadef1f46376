"""Every `residual` column against the float64 oracle, from states that hooks of the test's own have read."""

import gc
import weakref

import numpy as np
import polars as pl
import pytest
import torch

from attlas.extract import measure
from attlas.extract.capture.runtime.batch import Batch, Tokens
from attlas.extract.capture.runtime.instrumented_pass import instrumented_pass
from attlas.extract.capture.runtime.receiver import CallReceiver
from attlas.extract.collector import Collector
from attlas.extract.engines import choose
from attlas.extract.engines.needs import Needs
from attlas.extract.engines.visibility import Axis
from attlas.extract.errors import CaptureError, ResidualWarning
from attlas.extract.measurement import layout_of, observe
from attlas.extract.tables import TABLES
from tests import oracles
from tests.extract.models import eager_patterns, tiny
from tests.extract.test_heads import assert_columns, real_batch

RESIDUAL = TABLES["residual"]
# those that follow from the states of the stream and the heads' contexts alone
OF_STATES = [c for c in RESIDUAL.facts if not c.name.startswith(("mixing_ratio", "head_diversity"))]
FAMILIES = ["bert", "roberta", "distilbert", "albert", "electra", "gpt2", "llama", "mistral", "qwen2"]


def states(model, names: dict[str, str], **inputs) -> dict[str, np.ndarray]:
    """What the named modules read (`<`) or wrote (`>`), by a forward pass of the plain model, in float64."""
    held: dict[str, np.ndarray] = {}
    handles = []
    for name, spec in names.items():
        path, side = spec[:-1], spec[-1]

        def keep(module, read, wrote, name=name, side=side):
            value = read[0] if side == "<" else wrote
            held[name] = (value[0] if isinstance(value, tuple) else value).double().numpy()

        handles.append(model.get_submodule(path).register_forward_hook(keep))
    with torch.inference_mode():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return held


def rows_of(tables, sequence: int) -> dict[tuple[int, str], dict]:
    return {(r["layer"], r["site"]): r for r in tables["residual"].to_pylist() if r["sequence_id"] == sequence}


def test_every_column_of_a_post_norm_model_equals_the_oracle_on_real_sequences(demo, demo_texts):
    inputs = real_batch(demo, [demo_texts[2][:400], demo_texts[40][:150]])
    tables = measure(demo.model, tokenizer=demo.tokenizer, statistics="all", **inputs)
    patterns = eager_patterns(demo.model, **inputs)
    compared = 0
    for layer in range(6):
        base = f"encoder.layer.{layer}"
        before = "embeddings.LayerNorm" if layer == 0 else f"encoder.layer.{layer - 1}.output.LayerNorm"
        s = states(
            demo.model,
            {
                "x": f"{before}>",
                "f": f"{base}.attention.output.dense>",
                "y": f"{base}.attention.output.LayerNorm<",
                "n": f"{base}.attention.output.LayerNorm>",
                "g": f"{base}.output.dense>",
                "z": f"{base}.output.LayerNorm<",
                "o": f"{base}.output.LayerNorm>",
                "c": f"{base}.attention.output.dense<",
                "v": f"{base}.attention.self.value>",
            },
            **inputs,
        )
        for sequence in range(2):
            n = int(inputs["attention_mask"][sequence].sum())
            one = {name: value[sequence, :n] for name, value in s.items()}
            contexts = one["c"].reshape(n, 12, 32).transpose(1, 0, 2)
            w_o = demo.model.get_submodule(f"{base}.attention.output.dense").weight.detach().double().T.numpy()
            of_heads = {
                "contexts": contexts,
                "patterns": patterns[layer][sequence, :, :n, :n].numpy(),
                "v": one["v"].reshape(n, 12, 32).transpose(1, 0, 2),
                "w_o": w_o.reshape(12, 32, -1),
                "gain": demo.model.get_submodule(f"{base}.attention.output.LayerNorm").weight.detach().double().numpy(),
            }
            common = {"norm_kind": "layer", "eps": demo.model.config.layer_norm_eps}
            expected = {
                "attention": oracles.residual_columns(
                    one["x"], one["f"], one["y"], norm_input=one["y"], norm_output=one["n"], **of_heads, **common
                ),
                "mlp": oracles.residual_columns(
                    one["n"], one["g"], one["z"], norm_input=one["z"], norm_output=one["o"], **common
                ),
            }
            got = rows_of(tables, sequence)
            for site, columns in expected.items():
                assert {c.name for c in RESIDUAL.facts} <= set(columns)
                assert_columns(got[layer, site], {c.name: columns[c.name] for c in RESIDUAL.facts}, f"L{layer} {site}")
                np.testing.assert_allclose(one["x"] + one["f"], one["y"], atol=1e-4)
                compared += 1
    assert compared == 24


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_layers_and_profiles_of_sites_equal_the_oracle(family, engine):
    """Post-norm and pre-norm, with padding."""
    model = tiny(family)
    ids = torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    tables = measure(model, engine=engine, statistics="all", **inputs)
    for layer in range(3):
        if family == "bert":
            before = "embeddings.LayerNorm" if layer == 0 else f"encoder.layer.{layer - 1}.output.LayerNorm"
            names = {"x": f"{before}>", "z": f"encoder.layer.{layer}.output.LayerNorm<"}
        else:
            after = "norm" if layer == 2 else f"layers.{layer + 1}.input_layernorm"
            names = {"x": f"layers.{layer}.input_layernorm<", "z": f"{after}<"}
        held = states(model, names, **inputs)
        lengths = mask.sum(-1).tolist()
        rows = {(r["layer"], r["sequence_id"]): r for r in tables["layers"].to_pylist()}
        for sequence, n in enumerate(lengths):
            x, z = (held[name][sequence, :n] for name in ("x", "z"))
            assert_columns(rows[layer, sequence], oracles.layer_columns(x, z), f"L{layer}")
        after = [held["z"][sequence, :n] for sequence, n in enumerate(lengths)]
        of_site = pl.DataFrame(tables["residual_profiles"]).filter(layer=layer, site="mlp")
        for profile, histogram in (("token_norm", oracles.norm_histogram), ("massive", oracles.massive_histogram)):
            found = of_site.filter(pl.col("profile").cast(pl.String) == profile)
            assert dict(found.select("bin", "count").rows()) == histogram(after), profile
            assert (found["sum"] == found["count"]).all()


def test_every_column_of_a_pre_norm_model_equals_the_oracle():
    model = tiny("llama")
    ids = torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(3))
    tables = measure(model, input_ids=ids, statistics="all")
    patterns = eager_patterns(model, input_ids=ids)
    for layer in range(3):
        base = f"layers.{layer}"
        after = "norm" if layer == 2 else f"layers.{layer + 1}.input_layernorm"
        s = states(
            model,
            {
                "x": f"{base}.input_layernorm<",
                "xn": f"{base}.input_layernorm>",
                "f": f"{base}.self_attn.o_proj>",
                "y": f"{base}.post_attention_layernorm<",
                "yn": f"{base}.post_attention_layernorm>",
                "g": f"{base}.mlp.down_proj>",
                "z": f"{after}<",
                "c": f"{base}.self_attn.o_proj<",
                "v": f"{base}.self_attn.v_proj>",
            },
            input_ids=ids,
        )
        for sequence in range(2):
            one = {name: value[sequence] for name, value in s.items()}
            contexts = one["c"].reshape(11, 4, 8).transpose(1, 0, 2)
            of_heads = {
                "contexts": contexts,
                "patterns": patterns[layer][sequence].numpy(),
                "v": one["v"].reshape(11, -1, 8).transpose(1, 0, 2).repeat(2, axis=0),
                "w_o": model.get_submodule(f"{base}.self_attn.o_proj")
                .weight.detach()
                .double()
                .T.numpy()
                .reshape(4, 8, -1),
            }
            common = {"norm_kind": "rms", "eps": model.config.rms_norm_eps}
            got = rows_of(tables, sequence)
            attention = oracles.residual_columns(
                one["x"], one["f"], one["y"], norm_input=one["x"], norm_output=one["xn"], **of_heads, **common
            )
            mlp = oracles.residual_columns(
                one["y"], one["g"], one["z"], norm_input=one["y"], norm_output=one["yn"], **common
            )
            for site, columns in (("attention", attention), ("mlp", mlp)):
                assert_columns(got[layer, site], {c.name: columns[c.name] for c in RESIDUAL.facts}, f"L{layer} {site}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_holds_from_the_columns_own_inputs_in_every_family(family):
    """The columns are made from x, F and x' as three tensors that the model made; their sum is checked here once more."""
    model = tiny(family)
    layout = layout_of(model)
    assert layout.residual_refusal is None
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(5))

    checked = 0

    def identity(observed):
        nonlocal checked
        if observed.stream is not None and observed.update is not None:
            torch.testing.assert_close(observed.stream + observed.update, observed.after, atol=1e-4, rtol=1e-4)
            assert observed.update.norm() > 0
            checked += 1
        return observed.mean(observed.after_norms)

    zeros = torch.zeros(2, dtype=torch.int64)
    observe(
        model,
        layout,
        {"input_ids": ids},
        batch=Batch(2, {"input_ids": Tokens(Axis(zeros, zeros + 9, 9), ids)}),
        engine=choose("reference"),
        collector=Collector([], Needs(residual={"identity": identity}), sequences=2),
    )
    assert checked == 2 * len(layout.attentions)
    names = [(s.layer, s.name) for s in layout.sites]
    assert len(names) == len(set(names)) and names[0] == (0, "embedding")


def test_a_layer_that_hides_its_attention_is_an_error_and_not_a_gap():
    model = tiny("bert")
    layout = layout_of(model)
    hidden = model.encoder.layer[1].attention.self

    def by_hand(hidden_states, *args, **kwargs):
        return (hidden_states, None)

    hidden.forward = by_hand
    zeros = torch.zeros(1, dtype=torch.int64)
    batch = Batch(1, {"input_ids": Tokens(Axis(zeros, zeros + 8, 8))})
    with (
        pytest.raises(CaptureError, match="expected 3 patterns, got 2"),
        instrumented_pass(
            model, layout, batch=batch, engine=choose("reference"), observer=Collector([], Needs(), sequences=1)
        ),
        torch.inference_mode(),
    ):
        model(input_ids=torch.randint(2, 60, (1, 8)))


def test_what_a_pass_keeps_is_freed_when_it_ends(monkeypatch: pytest.MonkeyPatch):
    """Not when the garbage collector runs next: masks and states of a batch may be most of a GPU's memory."""
    passes = []

    class Recorded(CallReceiver):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            passes.append(weakref.ref(self))

    monkeypatch.setattr("attlas.extract.capture.runtime.instrumented_pass.CallReceiver", Recorded)
    gc.disable()
    try:
        measure(tiny("bert"), input_ids=torch.randint(2, 60, (2, 8)))
        left = [receiver() for receiver in passes]
    finally:
        gc.enable()
    assert left == [None]


def test_a_model_that_never_shows_a_layer_is_refused_when_it_is_examined():
    model = tiny("gpt2")
    model.h[2].attn.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    with pytest.raises(CaptureError, match="ran without showing one"):
        layout_of(model)


def test_a_broken_identity_is_an_error():
    model = tiny("gpt2")
    layout = layout_of(model)
    projection = model.h[1].mlp.c_proj
    projection.register_forward_hook(lambda module, read, wrote: wrote.mul(1.5))
    first = model.h[1].mlp.dropout
    first.register_forward_hook(lambda module, read, wrote: wrote / 1.5 + 1.0)
    zeros = torch.zeros(1, dtype=torch.int64)
    batch = Batch(1, {"input_ids": Tokens(Axis(zeros, zeros + 8, 8))})
    inputs = {"input_ids": torch.randint(2, 60, (1, 8))}
    with pytest.raises(CaptureError, match=r"x' = x \+ F\(x\) must hold"):
        observe(
            model,
            layout,
            inputs,
            batch=batch,
            engine=choose("reference"),
            collector=Collector([], RESIDUAL.needs(RESIDUAL.facts), sequences=1),
        )
    assert "residual" in measure(model, **inputs), "examined again, the update is what is added now"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_measured_in_float32(dtype):
    model = tiny("bert").to(dtype)
    ids = torch.randint(2, 60, (2, 16), generator=torch.Generator().manual_seed(7))
    tables = measure(model, input_ids=ids)
    frame = pl.DataFrame(tables["heads"])
    ways = frame.select(pl.sum_horizontal("mass_self", "mass_backward", "mass_forward")).to_series()
    np.testing.assert_allclose(ways.to_numpy(), 1, atol=1e-5)
    assert tables["residual"].num_rows == 2 * 7


def test_weights_that_change_between_two_measurements_are_the_ones_that_count():
    model = tiny("bert")
    ids = torch.randint(2, 60, (1, 9), generator=torch.Generator().manual_seed(9))
    before = pl.DataFrame(measure(model, input_ids=ids)["heads"]).filter(pl.col("layer") == 2)
    with torch.no_grad():
        model.encoder.layer[2].attention.output.dense.weight.mul_(3)  # the last layer: its pattern stays as it is
    after = pl.DataFrame(measure(model, input_ids=ids)["heads"]).filter(pl.col("layer") == 2)
    np.testing.assert_allclose(after["output_norm"].to_numpy(), 3 * before["output_norm"].to_numpy(), rtol=1e-5)
    np.testing.assert_array_equal(after["entropy_nats"].to_numpy(), before["entropy_nats"].to_numpy())


def massive_llama():
    """A Llama in which two token ids have a massive activation, which its norms keep."""
    model = tiny("llama")
    with torch.no_grad():
        model.embed_tokens.weight[7, 3], model.embed_tokens.weight[9, 20] = 900, -400
        model.embed_tokens.weight[11, 5] = 90  # large, but not massive
    return model


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_mass_on_massive_keys_equals_the_oracle_on_the_stream_that_each_layer_reads(engine):
    model = massive_llama()
    ids = torch.randint(20, 60, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[0, 4], ids[0, 8], ids[1, 0], ids[1, 2] = 7, 11, 9, 7
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    rows = {
        (r["layer"], r["head"], r["sequence_id"]): r["mass_massive"]
        for r in measure(model, engine=engine, statistics="mass_massive", **inputs)["heads"].to_pylist()
    }
    patterns = eager_patterns(model, **inputs)
    for layer in range(3):
        x = states(model, {"x": f"layers.{layer}.input_layernorm<"}, **inputs)["x"]
        for sequence, n in enumerate((12, 7)):
            for head in range(4):
                expected = oracles.massive_mass(patterns[layer][sequence, head, :n, :n].numpy(), x[sequence, :n])
                assert expected is not None and expected > 0
                assert rows[layer, head, sequence] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_mass_on_massive_keys_is_null_where_the_stream_is_not_known():
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with pytest.warns(ResidualWarning):
        tables = measure(layer, query=x, key=x, value=x, need_weights=False, statistics="all")
    assert "residual" not in tables and tables["heads"].num_rows == 8
    assert tables["heads"]["mass_massive"].null_count == 8
