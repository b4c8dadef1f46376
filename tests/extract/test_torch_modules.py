"""torch's own attention modules in all their settings, each computed once more by hand in float64 from its parameters."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack  # pyright: ignore

import attlas
from attlas.extract.errors import CaptureError, Refusal
from tests import oracles
from tests.extract.models import tiny
from tests.extract.test_heads import assert_columns

Floats = np.ndarray
BATCH, TOKENS, MEMORY, WIDTH, HEADS = 3, 7, 5, 16, 4
# about distance, or about the same token at either end: not defined between two sequences
WITHIN_ONE_SEQUENCE = (
    *("distance_tokens", "offset_tokens", "offset_std_tokens", "distance_vs_uniform", "mass_self", "mass_previous"),
    *("mass_next", "mass_backward", "mass_forward", "mass_same_token", "mass_induction"),
    *("mean_log_self", "mass_streaming", "norm_distance_tokens"),
)

measure = partial(attlas.measure, statistics="all,pattern_effective_rank")


# --- by hand -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """One attention layer: scores with what the mask adds, who sees whom, pattern, values, and W_O of each head."""

    s: Floats | None  # [batch, head, query, key]; None: the scores are not measured
    visible: Floats
    p: Floats
    v: Floats  # [batch, head, key, head_width]
    w_o: Floats  # [head, head_width, width]


@dataclass(frozen=True)
class Sublayer:
    """x, F(x), x' of a residual site, and what its norm read and wrote."""

    x: Floats
    update: Floats
    after: Floats
    norm_input: Floats
    norm_output: Floats


def exact(tensor: torch.Tensor) -> Floats:
    return tensor.detach().double().numpy()


def linear(x: Floats, weight: torch.Tensor, bias: torch.Tensor | None) -> Floats:
    return x @ exact(weight).T + (0 if bias is None else exact(bias))


def norm(x: Floats, module) -> Floats:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + module.eps) * exact(module.weight) + exact(
        module.bias
    )


def added(mask: torch.Tensor | None, heads: int) -> Floats:
    """What a mask of torch's modules adds to the scores [batch, head, query, key]; True hides."""
    if mask is None:
        return np.zeros((1, 1, 1, 1))
    adds = np.where(mask.numpy(), -np.inf, 0) if mask.dtype == torch.bool else exact(mask)
    return adds[None, None] if adds.ndim == 2 else adds.reshape(-1, heads, *adds.shape[1:])


def attend(mha, query: Floats, key: Floats, value: Floats, mask=None, padding=None) -> tuple[Floats, Heads]:
    """nn.MultiheadAttention by its formula, batch first; its update, and its heads."""
    packed = mha.in_proj_weight
    q_weight, k_weight, v_weight = (
        packed.chunk(3) if packed is not None else (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
    )
    biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
    of_heads = (
        linear(x, weight, bias).reshape(*x.shape[:2], mha.num_heads, -1).transpose(0, 2, 1, 3)
        for x, weight, bias in zip((query, key, value), (q_weight, k_weight, v_weight), biases, strict=True)
    )
    q, k, v = of_heads
    of_padding = added(None if padding is None else padding[:, None].repeat_interleave(mha.num_heads, 0), mha.num_heads)
    adds = np.broadcast_to(added(mask, mha.num_heads) + of_padding, (*q.shape[:3], k.shape[2]))
    visible = np.isfinite(adds)
    s = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1]) + np.where(visible, adds, 0)
    weights = np.where(visible, np.exp(s - s.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    p = weights / np.where(total > 0, total, 1)
    contexts = (p @ v).transpose(0, 2, 1, 3).reshape(*query.shape[:2], -1)
    w_o = exact(mha.out_proj.weight).T.reshape(mha.num_heads, -1, mha.embed_dim)
    return linear(contexts, mha.out_proj.weight, mha.out_proj.bias), Heads(s, visible, p, v, w_o)


def feed_forward(layer, x: Floats) -> Floats:
    hidden = linear(x, layer.linear1.weight, layer.linear1.bias)
    active = np.maximum(hidden, 0) if layer.activation is functional.relu else hidden * (1 + erf(hidden / 2**0.5)) / 2
    return linear(active, layer.linear2.weight, layer.linear2.bias)


def sublayer(layer, module, x: Floats, update_of) -> tuple[Floats, Sublayer]:
    """A residual sublayer, its norm before it or after it; the next x, and what the site is."""
    if layer.norm_first:
        read = norm(x, module)
        update = update_of(read)
        return x + update, Sublayer(x, update, x + update, x, read)
    update = update_of(x)
    after = x + update
    return norm(after, module), Sublayer(x, update, after, after, norm(after, module))


def encode(encoder, x: Floats, mask=None, padding=None) -> tuple[Floats, list[Heads], list[dict[str, Sublayer]]]:
    """nn.TransformerEncoder by hand, batch first: what it gives, the heads of its layers, and their residual sites."""
    seen: list[Heads] = []
    sites = []
    for layer in encoder.layers:

        def attention(read: Floats, layer=layer) -> Floats:
            update, heads = attend(layer.self_attn, read, read, read, mask, padding)
            seen.append(heads)
            return update

        x, first = sublayer(layer, layer.norm1, x, attention)
        x, second = sublayer(layer, layer.norm2, x, lambda read, layer=layer: feed_forward(layer, read))
        sites.append({"attention": first, "mlp": second})
    return (x if encoder.norm is None else norm(x, encoder.norm)), seen, sites


def decode(decoder, x: Floats, memory: Floats, mask=None, padding=None, memory_padding=None):
    """nn.TransformerDecoder by hand: what it gives, and the heads of its own and of its cross-attention."""
    own: list[Heads] = []
    cross: list[Heads] = []
    for layer in decoder.layers:

        def attention(read: Floats, layer=layer) -> Floats:
            update, heads = attend(layer.self_attn, read, read, read, mask, padding)
            own.append(heads)
            return update

        def crossing(read: Floats, layer=layer) -> Floats:
            update, heads = attend(layer.multihead_attn, read, memory, memory, None, memory_padding)
            cross.append(heads)
            return update

        x, _ = sublayer(layer, layer.norm1, x, attention)
        x, _ = sublayer(layer, layer.norm2, x, crossing)
        x, _ = sublayer(layer, layer.norm3, x, lambda read, layer=layer: feed_forward(layer, read))
    return (x if decoder.norm is None else norm(x, decoder.norm)), own, cross


# --- comparison ----------------------------------------------------------------------------------------------------


def crossing_columns(p: Floats, s: Floats | None, visible: Floats, *, v: Floats, w_o: Floats) -> oracles.Columns:
    """Every column of a head whose keys are another sequence's."""
    rows, masked, nonfinite = oracles.classify_rows(p, s, visible)
    return {
        **oracles.entropy_columns(p, visible, rows, None),
        **oracles.concentration_columns(p, rows),
        **oracles.received_columns(p, rows, None),
        **oracles.score_columns(s, visible, rows),
        **oracles.write_columns(p, visible, rows, v=v, w_o=w_o, context=None),
        **oracles.vector_columns(rows, q=None, k=None, v=v, w_o=w_o),
        "sink_keys": oracles.sink_keys(p, visible, rows),
        **dict.fromkeys(WITHIN_ONE_SEQUENCE),
        "mass_first": oracles.mean(float(p[i, 0]) for i in rows),
        "mass_sink": None,
        "query_rows": len(rows),
        "masked_rows": masked,
        "nonfinite_rows": nonfinite,
    }


def expected_columns(
    heads: Heads, sequence: int, head: int, queries: Floats, keys: Floats, *, is_cross_attention: bool
) -> oracles.Columns:
    """Of one head on the real tokens of one sequence."""
    p, visible = (getattr(heads, name)[sequence, head][queries][:, keys] for name in ("p", "visible"))
    s = None if heads.s is None else heads.s[sequence, head][queries][:, keys]
    v, w_o = heads.v[sequence, head][keys], heads.w_o[head]
    of_head = crossing_columns if is_cross_attention else oracles.head_columns
    columns = oracles.sample_columns(p, s, visible, v=v, w_o=w_o) | of_head(p, s, visible, v=v, w_o=w_o)
    if s is None:
        columns["mean_log_self"] = None
    named = {name: value for name, value in columns.items() if name.removeprefix("mass_") not in oracles.TOKEN_CLASSES}
    return {**named, "distance_patches": None, "mass_patches": None}  # there are no patches


def assert_heads(tables, expected: Mapping[str, list[Heads]], *, queries=None, keys=None) -> None:
    """Every column of every head; `queries` and `keys` [batch, token] are the real tokens of each stack, if not all."""
    got = {(r["stack"], r["sequence_id"], r["layer"], r["head"]): r for r in tables["heads"].to_pylist()}
    compared = 0
    for stack, layers in expected.items():
        for layer, heads in enumerate(layers):
            batch, count, asking, asked = heads.p.shape
            real = (queries or {}).get(stack, np.ones((batch, asking), bool))
            looked_at = real if stack != "cross" else (keys or {}).get(stack, np.ones((batch, asked), bool))
            for sequence in range(batch):
                for head in range(count):
                    columns = expected_columns(
                        heads, sequence, head, real[sequence], looked_at[sequence], is_cross_attention=stack == "cross"
                    )
                    row = got[stack, sequence, layer, head]
                    # queries and keys are compared where they are at hand, in test_heads
                    columns = {name: value for name, value in columns.items() if name not in ("query_norm", "key_norm")}
                    assert set(columns) == set(row) - {
                        "stack",
                        "sequence_id",
                        "layer",
                        "head",
                        "query_norm",
                        "key_norm",
                        "mass_massive",
                    }
                    assert row["mass_massive"] in (None, 0), "no activation here is massive; see test_residual"
                    assert_columns(row, columns, f"{stack} sequence {sequence} L{layer}H{head}")
                    compared += 1
    assert compared == len(got)


# --- modules and their masks ---------------------------------------------------------------------------------------


def scaled(module: Any) -> Any:
    """In eval mode; weights of attention are large enough for patterns that are not flat, norms and biases are no ones."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) - 0.5)
            elif "in_proj" in name or "proj_weight" in name:
                parameter.mul_(2.5)
    return module.eval()


def encoder_of(
    *, batch_first: bool, norm_first: bool, dtype=torch.float32, activation="relu", final=False, heads=HEADS
) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, heads, 24, activation=activation, batch_first=batch_first, norm_first=norm_first, dtype=dtype
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the nested tensors, which are on by default, can't be used
        encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH, dtype=dtype) if final else None)
    return scaled(encoder)


def states(tokens: int = TOKENS, *, dtype=torch.float32, seed: int = 1, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(BATCH, tokens, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def padding_of(tokens: int = TOKENS) -> torch.Tensor:
    """Padding right of the second sequence and left of the third; True is padding."""
    padding = torch.zeros(BATCH, tokens, dtype=torch.bool)
    padding[1, 4:] = padding[2, :2] = True
    return padding


def drawn_mask(*shape: int) -> torch.Tensor:
    """A boolean mask with holes; each token sees itself, and every token is seen."""
    hidden = torch.rand(*shape, generator=torch.Generator().manual_seed(2)) < 0.3
    return hidden & ~torch.eye(shape[-1], dtype=torch.bool)


def masks(dtype) -> dict[str, dict]:
    """The masks that nn.TransformerEncoder.forward takes, in all their forms."""
    finite = torch.randn(TOKENS, TOKENS, dtype=dtype, generator=torch.Generator().manual_seed(3))
    hiding = torch.zeros(BATCH, TOKENS, dtype=dtype).masked_fill(padding_of(), -torch.inf)
    return {
        "none": {},
        "padding": {"src_key_padding_mask": padding_of()},
        "padding added": {"src_key_padding_mask": hiding},
        "mask": {"mask": drawn_mask(TOKENS, TOKENS)},
        "mask added": {"mask": finite.masked_fill(drawn_mask(TOKENS, TOKENS), -torch.inf)},
        "causal": {"mask": nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=dtype), "is_causal": True},
        "mask of each head": {"mask": drawn_mask(BATCH * HEADS, TOKENS, TOKENS)},
        "both": {"mask": drawn_mask(TOKENS, TOKENS), "src_key_padding_mask": padding_of()},
        "causal and padding": {
            "mask": nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=dtype),
            "src_key_padding_mask": hiding,
        },
    }


def real_tokens(given: dict) -> Floats:
    padded = given.get("src_key_padding_mask")
    if padded is None:
        return np.ones((BATCH, TOKENS), bool)
    return ~padding_of().numpy()


def as_taken(x: torch.Tensor, *, batch_first: bool) -> torch.Tensor:
    return x if batch_first else x.transpose(0, 1)


def as_given(x: torch.Tensor, *, batch_first: bool) -> Floats:
    return exact(x if batch_first else x.transpose(0, 1))


# --- nn.TransformerEncoder -----------------------------------------------------------------------------------------


@pytest.mark.sample(12)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("masked", masks(torch.float32))
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["token-first", "batch-first"])
def test_an_encoder_equals_its_computation_by_hand_under_every_mask(batch_first, norm_first, masked, dtype):
    encoder = encoder_of(batch_first=batch_first, norm_first=norm_first, dtype=dtype)
    x, given = states(dtype=dtype), masks(dtype)[masked]
    kept = Kept(encoder)
    with kept:
        tables = measure(encoder, as_taken(x, batch_first=batch_first), **given)
    output, heads, _ = encode(encoder, exact(x), given.get("mask"), given.get("src_key_padding_mask"))
    real = real_tokens(given)
    np.testing.assert_allclose(as_given(kept.output, batch_first=batch_first)[real], output[real], atol=1e-5)
    stack = "decoder" if "causal" in masked else "encoder"
    assert_heads(tables, {stack: heads}, queries={stack: real})


class Kept:
    """The output of a module, kept by a hook while it is measured."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.output = torch.empty(0)

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self.keep)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def keep(self, _module, _read, wrote) -> None:
        self.output = (wrote[0] if isinstance(wrote, tuple) else wrote).clone()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("final", [False, True], ids=["", "final-norm"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_an_encoder_equals_its_computation_by_hand_with_every_activation_and_final_norm(norm_first, final, activation):
    encoder = encoder_of(batch_first=True, norm_first=norm_first, activation=activation, final=final)
    x, padding = states(), padding_of()
    with Kept(encoder) as kept:
        tables = measure(encoder, src=x, src_key_padding_mask=padding)
    output, heads, _ = encode(encoder, exact(x), padding=padding)
    real = ~padding.numpy()
    np.testing.assert_allclose(exact(kept.output)[real], output[real], atol=1e-5)
    assert_heads(tables, {"encoder": heads}, queries={"encoder": real})


@pytest.mark.parametrize("batch_first", [False, True], ids=["token-first", "batch-first"])
def test_what_an_encoder_gives_is_what_it_gives_by_itself_on_its_fast_path(batch_first):
    encoder = encoder_of(batch_first=batch_first, norm_first=False)
    x, padding = as_taken(states(), batch_first=batch_first), padding_of()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
        plain = encoder(x, src_key_padding_mask=padding)
    with Kept(encoder) as kept:
        measure(encoder, x, src_key_padding_mask=padding)
    real = ~padding.numpy()
    inside, outside = (as_given(t, batch_first=batch_first) for t in (kept.output, plain))
    np.testing.assert_allclose(inside[real], outside[real], atol=1e-5)


def test_a_row_that_sees_nothing_is_counted_and_left_out():
    encoder = encoder_of(batch_first=True, norm_first=True)
    mask = drawn_mask(TOKENS, TOKENS)
    mask[2] = True
    x = states()
    tables = measure(encoder, x, mask=mask)
    assert_heads(tables, {"encoder": encode(encoder, exact(x), mask)[1]})
    assert {r["masked_rows"] for r in tables["heads"].to_pylist()} == {1}


def test_a_key_between_others_that_no_query_sees_is_refused():
    mask = drawn_mask(TOKENS, TOKENS)
    mask[:, 3] = True
    with pytest.raises(CaptureError, match="keys between them that no query sees"):
        measure(encoder_of(batch_first=True, norm_first=True), states(), mask=mask)


@pytest.mark.parametrize("batch_first", [False, True], ids=["token-first", "batch-first"])
def test_one_sequence_without_a_batch_measures_as_a_batch_of_one(batch_first):
    encoder = encoder_of(batch_first=batch_first, norm_first=True)
    x = states()[0]
    tables = measure(encoder, x)
    assert_heads(tables, {"encoder": encode(encoder, exact(x)[None])[1]})
    with_mask = measure(encoder, x, mask=drawn_mask(TOKENS, TOKENS))
    assert_heads(with_mask, {"encoder": encode(encoder, exact(x)[None], drawn_mask(TOKENS, TOKENS))[1]})


def test_an_odd_number_of_heads_and_one_token_are_no_special_case():
    encoder = encoder_of(batch_first=True, norm_first=False, heads=1)
    for tokens in (1, 3):
        x = states(tokens)
        assert_heads(measure(encoder, x), {"encoder": encode(encoder, exact(x))[1]})


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["token-first", "batch-first"])
def test_the_same_module_measures_each_mask_for_what_it_is(batch_first, norm_first):
    """What was found with one mask is not taken for what another makes of the module."""
    encoder = encoder_of(batch_first=batch_first, norm_first=norm_first)
    x = states()
    for stack, mask in (
        ("encoder", drawn_mask(TOKENS, TOKENS)),
        ("decoder", nn.Transformer.generate_square_subsequent_mask(TOKENS)),
        ("encoder", drawn_mask(TOKENS, TOKENS)),
    ):
        tables = measure(encoder, as_taken(x, batch_first=batch_first), mask=mask)
        assert_heads(tables, {stack: encode(encoder, exact(x), mask)[1]})


def test_sequences_of_other_lengths_and_batches_of_other_sizes_measure_after_the_first():
    encoder = encoder_of(batch_first=False, norm_first=True)
    for x in (states(), states(11), states(11)[:1], states(3)[:2]):
        tables = measure(encoder, x.transpose(0, 1))
        assert_heads(tables, {"encoder": encode(encoder, exact(x))[1]})


# --- its residual stream -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["token-first", "batch-first"])
def test_the_residual_sites_of_an_encoder_equal_their_computation_by_hand(batch_first, norm_first, padded):
    encoder = encoder_of(batch_first=batch_first, norm_first=norm_first, final=True)
    x, padding = states(), padding_of() if padded else None
    tables = measure(encoder, as_taken(x, batch_first=batch_first), src_key_padding_mask=padding)
    _, heads, sites = encode(encoder, exact(x), padding=padding)
    real = np.ones((BATCH, TOKENS), bool) if padding is None else ~padding.numpy()
    got = {(r["sequence_id"], r["layer"], r["site"]): r for r in tables["residual"].to_pylist()}
    for layer, of_layer in enumerate(sites):
        for name, site in of_layer.items():
            for sequence in range(BATCH):
                one = {f: getattr(site, f)[sequence, real[sequence]] for f in site.__dataclass_fields__}
                contexts = (
                    (heads[layer].p @ heads[layer].v)[sequence][:, real[sequence]] if name == "attention" else None
                )
                of_heads = (
                    {} if name == "mlp" else _heads_of(encoder.layers[layer], heads[layer], sequence, real[sequence])
                )
                expected = oracles.residual_columns(
                    **one, eps=encoder.layers[0].norm1.eps, contexts=contexts, **of_heads
                )
                row = got[sequence, layer, name]
                known = {column: value for column, value in expected.items() if column in row}
                assert {"stream_norm", "update_norm", "norm_scale", "heads_cosine"} <= set(known)
                assert_columns(row, known, f"sequence {sequence} L{layer} {name}")


def _heads_of(layer: Any, heads: Any, sequence: int, real: np.ndarray) -> dict[str, np.ndarray | None]:
    """What the oracle needs of the heads of an attention sublayer."""
    w_o = layer.self_attn.out_proj.weight.detach().double().numpy().T
    return {
        "patterns": heads.p[sequence][:, real][:, :, real],
        "v": heads.v[sequence][:, real],
        "w_o": w_o.reshape(heads.p.shape[1], -1, w_o.shape[1]),
        "gain": None if layer.norm_first else layer.norm1.weight.detach().double().numpy(),
    }


# --- nn.TransformerEncoderLayer and nn.MultiheadAttention alone ----------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["token-first", "batch-first"])
def test_a_layer_alone_equals_its_computation_by_hand(batch_first, norm_first):
    encoder = encoder_of(batch_first=batch_first, norm_first=norm_first)
    x, padding = states(), padding_of()
    tables = measure(encoder.layers[0], as_taken(x, batch_first=batch_first), src_key_padding_mask=padding)
    _, heads, _ = encode(encoder, exact(x), padding=padding)
    assert_heads(tables, {"encoder": heads[:1]}, queries={"encoder": ~padding.numpy()})


def multihead(**settings: Any) -> Any:
    torch.manual_seed(4)
    return scaled(nn.MultiheadAttention(WIDTH, HEADS, **settings))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["token-first", "batch-first"])
def test_self_attention_alone_equals_its_computation_by_hand(batch_first, need_weights, padded):
    mha, x, padding = multihead(batch_first=batch_first), states(), padding_of() if padded else None
    taken = as_taken(x, batch_first=batch_first)
    with Kept(mha) as kept:
        tables = measure(mha, query=taken, key=taken, value=taken, key_padding_mask=padding, need_weights=need_weights)
    output, heads = attend(mha, *(exact(x),) * 3, padding=padding)
    real = np.ones((BATCH, TOKENS), bool) if padding is None else ~padding.numpy()
    assert_heads(tables, {"encoder": [heads]}, queries={"encoder": real})
    np.testing.assert_allclose(as_given(kept.output, batch_first=batch_first)[real], output[real], atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["token-first", "batch-first"])
@pytest.mark.parametrize("keys", [MEMORY, TOKENS], ids=["other-length", "same-length"])
def test_attention_to_another_sequence_equals_its_computation_by_hand(keys, batch_first, need_weights):
    mha, x = multihead(batch_first=batch_first, kdim=12, vdim=10), states()
    key, value, padding = states(keys, seed=5, width=12), states(keys, seed=6, width=10), padding_of(keys)
    taken = [as_taken(t, batch_first=batch_first) for t in (x, key, value)]
    tables = measure(mha, *taken, key_padding_mask=padding, need_weights=need_weights)
    _, heads = attend(mha, exact(x), exact(key), exact(value), padding=padding)
    assert_heads(tables, {"cross": [heads]}, keys={"cross": ~padding.numpy()})


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_the_same_module_measures_self_and_cross_attention_for_what_each_is(need_weights):
    mha, x, other = multihead(batch_first=True), states(), states(seed=5)
    for key in (x, other, x):
        tables = measure(mha, x, key, key, need_weights=need_weights)
        _, heads = attend(mha, exact(x), exact(key), exact(key))
        assert_heads(tables, {"encoder" if key is x else "cross": [heads]})


def test_attention_of_equal_tokens_held_twice_is_self_attention():
    """As in attention(norm(x), norm(x), norm(x)): what is looked at, not which object holds it."""
    mha, x = multihead(batch_first=True), states()
    tables = measure(mha, x, x.clone(), x.clone(), need_weights=False)
    assert_heads(tables, {"encoder": [attend(mha, *(exact(x),) * 3)[1]]})


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("setting", ["add_bias_kv", "add_zero_attn"])
@pytest.mark.parametrize("is_cross_attention", [False, True], ids=["self", "cross"])
def test_keys_that_are_no_tokens_are_refused_by_name(is_cross_attention, setting, need_weights):
    mha, x = multihead(batch_first=True, **{setting: True}), states()
    key = states(MEMORY) if is_cross_attention else x
    with pytest.raises(CaptureError, match=setting):
        measure(mha, x, key, key, need_weights=need_weights)


class Asking(nn.Module):
    """Layers whose attention is asked for its weights, as it is by default, beside one that computes softmax itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))
        self.last = ByHand()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x)[0]
        return x + self.last(x)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x[:, None] @ x[:, None].transpose(-1, -2) / 10
        return self.out((scores.softmax(-1) @ x[:, None])[:, 0])


def test_attention_that_is_asked_for_its_weights_shows_once_beside_one_by_hand():
    torch.manual_seed(0)
    model, x = scaled(Asking()), states()
    tables = measure(model, x)
    expected, stream = [], exact(x)
    for layer in model.layers:
        update, heads = attend(layer, stream, stream, stream)
        stream = stream + update
        expected.append(heads)
    s = stream @ stream.transpose(0, 2, 1) / 10
    p = np.exp(s - s.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    w_o = exact(model.last.out.weight).T[None]
    expected.append(Heads(s[:, None], np.ones_like(s[:, None], bool), p[:, None], stream[:, None], w_o))
    assert_heads(tables, {"encoder": expected})


# --- nn.TransformerDecoder and nn.Transformer ----------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["token-first", "batch-first"])
def test_a_decoder_equals_its_computation_by_hand(batch_first, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 24, batch_first=batch_first, norm_first=norm_first)
    decoder = scaled(nn.TransformerDecoder(layer, 2))
    x, memory, padding = states(), states(MEMORY, seed=5), padding_of(MEMORY)
    causal = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    tables = measure(
        decoder,
        *(as_taken(t, batch_first=batch_first) for t in (x, memory)),
        tgt_mask=causal,
        tgt_is_causal=True,
        memory_key_padding_mask=padding,
    )
    _, own, cross = decode(decoder, exact(x), exact(memory), causal, memory_padding=padding)
    assert_heads(tables, {"decoder": own, "cross": cross}, keys={"cross": ~padding.numpy()})


def test_padded_queries_of_a_decoder_count_in_neither_of_its_stacks():
    torch.manual_seed(0)
    decoder = scaled(nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 24, batch_first=True), 2))
    x, memory, padding = states(), states(MEMORY, seed=5), padding_of()
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    # the third sequence is padded left: what is hidden from a query before its first token is everything
    padding[2] = False
    tables = measure(decoder, x, memory, tgt_mask=causal, tgt_key_padding_mask=padding)
    _, own, cross = decode(decoder, exact(x), exact(memory), causal, padding)
    real = ~padding.numpy()
    assert_heads(tables, {"decoder": own, "cross": cross}, queries={"decoder": real, "cross": real})


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["token-first", "batch-first"])
def test_a_transformer_equals_its_computation_by_hand(batch_first, norm_first):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = scaled(nn.Transformer(WIDTH, HEADS, 2, 2, 24, batch_first=batch_first, norm_first=norm_first))
    x, target, padding = states(), states(MEMORY, seed=5), padding_of()
    causal = nn.Transformer.generate_square_subsequent_mask(MEMORY)
    with Kept(model) as kept:
        tables = measure(
            model,
            *(as_taken(t, batch_first=batch_first) for t in (x, target)),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
    memory, encoder, _ = encode(model.encoder, exact(x), padding=padding)
    output, decoder, cross = decode(model.decoder, exact(target), memory, causal, memory_padding=padding)
    np.testing.assert_allclose(as_given(kept.output, batch_first=batch_first), output, atol=1e-5)
    real = ~padding.numpy()
    assert_heads(
        tables,
        {"encoder": encoder, "decoder": decoder, "cross": cross},
        queries={"encoder": real},
        keys={"cross": real},
    )


# --- what is left as it was ----------------------------------------------------------------------------------------


def global_state(*models: Any) -> tuple:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return (
        functional.scaled_dot_product_attention,
        functional.multi_head_attention_forward,
        functional.softmax,
        torch.backends.mha.get_fastpath_enabled(),
        list(_get_current_function_mode_stack()),
        sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        sorted(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
        [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m), m.training)
            for model in models
            for name, m in model.named_modules()
        ],
        [model.config._attn_implementation for model in models if hasattr(model, "config")],
        torch.is_inference_mode_enabled(),
    )


class Failing(nn.Module):
    """Attends, and then does what it may not."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = multihead(batch_first=True)
        self.fails = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x)[0]
        if self.fails:
            raise ZeroDivisionError
        return x


@pytest.mark.parametrize("fast", [False, True], ids=["slow", "fast"])
def test_torch_and_the_model_are_left_as_they_were(fast):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        encoder, bert, ids = encoder_of(batch_first=True, norm_first=False), tiny("bert"), torch.tensor([[4, 5, 6]])
        bert(ids, output_attentions=True)  # transformers puts hooks of its own in, and leaves them
        held = global_state(encoder, bert)
        assert held[3] == fast
        measure(encoder, states())
        measure(bert, input_ids=ids)
        assert global_state(encoder, bert) == held
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("examined", [False, True], ids=["when-examined", "when-measured"])
def test_they_are_so_after_an_exception_too(examined):
    model, x = Failing().eval(), states()
    held = global_state(model)
    if examined:
        model.fails = False
        measure(model, x)
        model.fails = True
    with pytest.raises(ZeroDivisionError):
        measure(model, x)
    assert global_state(model) == held
    model.fails = False
    assert measure(model, x)["heads"].num_rows == BATCH * HEADS


@pytest.mark.parametrize("inputs", [{"source": states()}, {}, {"src": None}], ids=["unknown-name", "nothing", "none"])
def test_inputs_that_are_not_the_modules_are_refused_before_any_work(inputs):
    encoder = encoder_of(batch_first=True, norm_first=True)
    ran = []
    with encoder.register_forward_pre_hook(lambda *_: ran.append(1)), pytest.raises(Refusal):
        measure(encoder, **inputs)
    assert not ran


def test_dropout_is_refused():
    with pytest.raises(Refusal, match=r"model\.eval\(\)"):
        measure(encoder_of(batch_first=True, norm_first=True).train(), states())
    partly = encoder_of(batch_first=True, norm_first=True)
    partly.layers[1].self_attn.train()
    with pytest.raises((Refusal, CaptureError), match=r"model\.eval\(\)"):
        measure(partly, states())
    partly.eval()
    assert measure(partly, states())["heads"].num_rows == 2 * BATCH * HEADS
