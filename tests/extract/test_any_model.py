"""Models of the user's own: attention written in every way that people write it is measured exactly, or refused by name."""

import math
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as imported

import attlas
from attlas.extract.errors import CaptureError, Refusal
from attlas.extract.measurement import layout_of
from tests import oracles
from tests.extract.models import tiny
from tests.extract.test_heads import assert_columns
from tests.extract.test_torch_modules import Heads, Kept, assert_heads, exact, linear

BATCH, TOKENS, WIDTH, HEADS, HEAD_WIDTH = 3, 7, 16, 4, 4
measure = partial(attlas.measure, statistics="all,pattern_effective_rank")
SDPA = functional.scaled_dot_product_attention


# --- the user's layers ---------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Projections around `attend`, which is written otherwise in every layer below."""

    heads = key_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        keys = self.key_heads * WIDTH // self.heads
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, keys), nn.Linear(WIDTH, keys)

    def forward(self, x, mask=None):
        q, k, v = (
            part(x).unflatten(-1, (count, -1)).transpose(1, 2)
            for part, count in ((self.query, self.heads), (self.key, self.key_heads), (self.value, self.key_heads))
        )
        return self.out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def attend(self, q, k, v, mask):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class ByTorch(Layer):
    """As torch's function is called."""


class Grouped(Layer):
    key_heads = 2

    def attend(self, q, k, v, mask):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Imported(Layer):
    """Torch's function by a name of the module's own, which nothing can replace."""

    def attend(self, q, k, v, mask):
        return imported(q, k, v, attn_mask=mask)


class WithoutHeads(Layer):
    heads = key_heads = 1

    def forward(self, x, mask=None):
        mask = mask if mask is None else mask[:, 0]
        return self.out(functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), mask))


def masked(scores, mask):
    return scores if mask is None else scores + mask


class Matmul(Layer):
    def attend(self, q, k, v, mask):
        return masked(q @ k.transpose(-1, -2) / math.sqrt(HEAD_WIDTH), mask).softmax(-1) @ v


class BySoftmaxModule(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.2)

    def attend(self, q, k, v, mask):
        scores = masked(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(HEAD_WIDTH), mask)
        return torch.matmul(self.dropout(self.softmax(scores)), v)


class Einsum(Layer):
    def attend(self, q, k, v, mask):
        scores = masked(torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(HEAD_WIDTH), mask)
        return torch.einsum("bhqk,bhkd->bhqd", functional.softmax(scores, dim=-1), v)


class EinsumOfTokens(Layer):
    """Heads stay behind the tokens."""

    def attend(self, q, k, v, mask):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = masked(torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(HEAD_WIDTH), mask)
        return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v).transpose(1, 2)


class Bmm(Layer):
    """Batch and heads are one dimension."""

    def attend(self, q, k, v, mask):
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(HEAD_WIDTH)
        scores = masked(scores, None if mask is None else mask.expand(-1, HEADS, -1, -1).flatten(0, 1))
        return torch.bmm(functional.softmax(scores, dim=-1), v).unflatten(0, (-1, HEADS))


class ValuesFirst(Layer):
    """(Vᵀ Pᵀ)ᵀ."""

    def attend(self, q, k, v, mask):
        p = masked(q @ k.transpose(-1, -2) / math.sqrt(HEAD_WIDTH), mask).softmax(-1)
        return (v.transpose(-1, -2) @ p.transpose(-1, -2)).transpose(-1, -2)


class EinsumValuesFirst(Layer):
    def attend(self, q, k, v, mask):
        p = masked(torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(HEAD_WIDTH), mask).softmax(-1)
        return torch.einsum("bhkd,bhqk->bhqd", v, p)


class EinsumWithDots(Layer):
    def attend(self, q, k, v, mask):
        p = masked(torch.einsum("...qd,...kd->...qk", q, k) / math.sqrt(HEAD_WIDTH), mask).softmax(-1)
        return torch.einsum("...qk,...kd->...qd", p, v)


class KeysFirst(Layer):
    def attend(self, q, k, v, mask):
        scores = masked(q @ k.transpose(-1, -2) / math.sqrt(HEAD_WIDTH), mask).transpose(-1, -2)
        return scores.softmax(-2).transpose(-1, -2) @ v


class Baddbmm(Layer):
    def attend(self, q, k, v, mask):
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        p = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / math.sqrt(HEAD_WIDTH), -1)
        return torch.baddbmm(torch.zeros_like(q), p, v).unflatten(0, (-1, HEADS))


class SumOfProducts(Layer):
    def attend(self, q, k, v, mask):
        p = masked(q @ k.transpose(-1, -2) / math.sqrt(HEAD_WIDTH), mask).softmax(-1)
        return (p[..., None] * v[:, :, None]).sum(-2)


class ExpAndSum(Layer):
    """Hides on purpose."""

    def attend(self, q, k, v, mask):
        return exp_and_sum(q, k, v, mask)


def exp_and_sum(q, k, v, mask):
    weights = masked(q @ k.transpose(-1, -2) / math.sqrt(HEAD_WIDTH), mask).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


class LogSoftmax(Layer):
    def attend(self, q, k, v, mask):
        return masked(q @ k.transpose(-1, -2) / math.sqrt(HEAD_WIDTH), mask).log_softmax(-1).exp() @ v


class SometimesHidden(Layer):
    def __init__(self, *, hides: bool = False) -> None:
        super().__init__()
        self.hides = hides

    def attend(self, q, k, v, mask):
        return (exp_and_sum if self.hides else functional.scaled_dot_product_attention)(q, k, v, mask)


class Dropping(Layer):
    """Forgets that there is an eval mode."""

    def attend(self, q, k, v, mask):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x, mask=None):
        return self.down(self.up(x).relu())


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = x + layer(x, mask)
        return x


def stack_of(*kinds: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return drawn(Stack(*(kind() for kind in kinds)))


def drawn(stack: Any) -> Any:
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if "query" in name or "key" in name:
                parameter.mul_(2.5)
    return stack.eval()


def states(batch: int = BATCH, tokens: int = TOKENS, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, tokens, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1))


def added_mask() -> torch.Tensor:
    """A bias everywhere, and holes: each token sees itself, and every token is seen."""
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(BATCH, 1, TOKENS, TOKENS, generator=generator)
    holes = torch.rand(BATCH, 1, TOKENS, TOKENS, generator=generator) < 0.3
    return bias.masked_fill(holes & ~torch.eye(TOKENS, dtype=torch.bool), -torch.inf)


# --- by hand -------------------------------------------------------------------------------------------------------


def heads_of(layer: Any, x: np.ndarray, adds: np.ndarray) -> tuple[np.ndarray, Heads]:
    """The update of any layer above, in float64 from its formula, and its heads."""
    split = (
        linear(x, part.weight, part.bias).reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)
        for part, count in ((layer.query, layer.heads), (layer.key, layer.key_heads), (layer.value, layer.key_heads))
    )
    q, k, v = split
    k, v = (np.repeat(t, layer.heads // layer.key_heads, axis=1) for t in (k, v))
    adds = np.broadcast_to(adds, (*q.shape[:3], k.shape[2]))
    visible = np.isfinite(adds)
    s = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1]) + np.where(visible, adds, 0)
    weights = np.where(visible, np.exp(s), 0)
    p = weights / weights.sum(-1, keepdims=True)
    contexts = (p @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    w_o = exact(layer.out.weight).T.reshape(layer.heads, -1, WIDTH)
    return linear(contexts, layer.out.weight, layer.out.bias), Heads(s, visible, p, v, w_o)


def computed(stack: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[np.ndarray, list[Heads]]:
    """What a stack gives, and the heads of its layers that attend."""
    stream, heads = exact(x), []
    for layer in stack.layers:
        if isinstance(layer, Layer):
            update, of_layer = heads_of(layer, stream, np.zeros((1, 1, 1, 1)) if mask is None else exact(mask))
            heads.append(of_layer)
        else:
            hidden = np.maximum(linear(stream, layer.up.weight, layer.up.bias), 0)
            update = linear(hidden, layer.down.weight, layer.down.bias)
        stream = stream + update
    return stream, heads


def assert_exact(stack: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    with Kept(stack) as kept:
        tables = measure(stack, x, mask)
    output, heads = computed(stack, x, mask)
    np.testing.assert_allclose(exact(kept.output), output, atol=1e-5)
    attentions = layout_of(stack, {"x": x} | ({} if mask is None else {"mask": mask})).attentions
    heads = [replace(h, s=None) if a.method == "replay" else h for h, a in zip(heads, attentions, strict=True)]
    assert_heads(tables, {"encoder": heads})


WAYS = [ByTorch, Grouped, Imported, WithoutHeads, Matmul, BySoftmaxModule, Einsum, EinsumOfTokens, Bmm]


@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_attending_equals_its_computation_by_hand(way, with_mask):
    assert_exact(stack_of(way, way), states(), added_mask() if with_mask else None)


@pytest.mark.sample(12)
@pytest.mark.parametrize("one", WAYS)
@pytest.mark.parametrize("other", WAYS)
def test_layers_that_attend_in_different_ways_are_all_measured(one, other):
    assert_exact(stack_of(one, Mlp, other, one), states())


@pytest.mark.parametrize("way", [ByTorch, Matmul, Imported])
def test_a_float64_model_and_batches_of_other_sizes_are_exact_too(way):
    stack = stack_of(way, way).double()
    for batch, tokens in ((3, 7), (1, 9), (2, 1), (1, 1)):
        assert_exact(stack, states(batch, tokens, torch.float64))


# written so that they may be read or refused, but never passed over
ODD = [ValuesFirst, EinsumValuesFirst, EinsumWithDots, KeysFirst, Baddbmm, SumOfProducts, ExpAndSum, LogSoftmax]


@pytest.mark.parametrize("way", ODD)
def test_an_odd_way_beside_a_usual_one_is_measured_or_refused_and_never_passed_over(way):
    try:
        assert_exact(stack_of(ByTorch, way, ByTorch), states())
    except CaptureError as refused:
        assert "layers.1" in str(refused)


@pytest.mark.parametrize("way", ODD)
def test_an_odd_way_alone_is_measured_or_refused_and_never_passed_over(way):
    try:
        assert_exact(stack_of(way, way), states())
    except CaptureError as refused:
        assert "Stack" in str(refused) or "layers.0" in str(refused)


def test_layers_without_attention_among_others_are_no_reason_to_refuse():
    assert_exact(stack_of(ByTorch, Mlp, Matmul, Mlp), states())


def test_a_layer_that_hides_on_purpose_shows_its_pattern_when_run_again():
    torch.manual_seed(0)
    stack = drawn(Stack(SometimesHidden(), SometimesHidden(), SometimesHidden(hides=True), SometimesHidden()))
    assert_exact(stack, states())
    methods = [attention.method for attention in layout_of(stack, {"x": states()}).attentions]
    assert [method == "replay" for method in methods] == [False, False, True, False]


def test_a_layer_that_hides_and_whose_contexts_are_not_linear_in_its_values_is_refused_by_name():
    torch.manual_seed(0)
    stack = drawn(Stack(SometimesHidden(), SometimesHidden(), SometimesHidden(hides=True), SometimesHidden()))
    stack.layers[2].attend = lambda q, k, v, mask: exp_and_sum(q, k, v.tanh(), mask)
    with pytest.raises(CaptureError, match=r"layers\.2 of Stack ran without showing one.*SometimesHidden"):
        measure(stack, states())


@pytest.mark.parametrize("way", [SometimesHidden, ByTorch])
def test_a_layer_that_hides_after_it_was_examined_is_examined_again(way):
    stack = drawn(Stack(way(), way(), way()))
    measure(stack, states())
    stack.layers[1].attend = exp_and_sum
    assert_exact(stack, states())


def test_a_layer_that_attends_otherwise_after_it_was_examined_is_examined_again():
    stack = stack_of(ByTorch, Matmul)
    measure(stack, states())
    stack.layers[0].attend = lambda q, k, v, mask: Matmul.attend(stack.layers[0], q, k, v, mask)
    assert_exact(stack, states())


# --- transformers models that hide a layer -------------------------------------------------------------------------


def t5():
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=60, decoder_start_token_id=0
    )
    return transformers.T5Model(transformers.T5Config(**sizes)).eval()


def hide(model, name: str) -> None:
    """The module computes what it did, and nothing of it is seen: neither by torch's name nor by the interface."""
    module = model.get_submodule(name)
    forward, config = module.forward, model.config
    own = config._attn_implementation_internal

    def hidden(*args, **kwargs):
        asked = config._attn_implementation_internal
        config._attn_implementation_internal = own
        try:
            with torch._C.DisableTorchFunction(), patch.object(functional, "scaled_dot_product_attention", SDPA):
                return forward(*args, **kwargs)
        finally:
            config._attn_implementation_internal = asked

    module.forward = hidden


SCORES = ("score_max", "score_mean", "score_std")
HIDDEN = {
    "bert": (lambda: tiny("bert"), "encoder.layer.1.attention.self"),
    "gpt2": (lambda: tiny("gpt2"), "h.2.attn"),
    "t5 encoder": (t5, "encoder.block.1.layer.0.SelfAttention"),
    "t5 decoder": (t5, "decoder.block.2.layer.0.SelfAttention"),
    "t5 cross": (t5, "decoder.block.0.layer.1.EncDecAttention"),
}


@pytest.mark.parametrize("was_examined", [False, True], ids=["at first", "after it was examined"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_transformers_model_that_hides_a_layer_shows_it_when_run_again_or_is_refused_by_name(hidden, was_examined):
    build, name = HIDDEN[hidden]
    model, ids = build(), torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    inputs: dict[str, Any] = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :6]} if "t5" in hidden else {})
    with torch.inference_mode():
        plain = model(**inputs)[0]
        shown = measure(model if was_examined else build(), **inputs)["heads"].to_pylist()
        hide(model, name)
        torch.testing.assert_close(model(**inputs)[0], plain)
    if hidden in ("gpt2", "t5 cross"):  # values in one projection with the rest, or of other tokens than the contexts
        with pytest.raises(CaptureError, match=f"{name.replace('.', r'[.]')} of .* ran without showing one"):
            measure(model, **inputs)
        return
    again = measure(model, **inputs)["heads"].to_pylist()
    replayed = [(a.stack, a.layer) for a in layout_of(model, inputs).attentions if a.method == "replay"]
    assert len(replayed) == 1 and len(again) == len(shown)
    for row, known in zip(again, shown, strict=True):
        place = (row["stack"], row["layer"], row["head"], row["sequence_id"])
        assert place == (known["stack"], known["layer"], known["head"], known["sequence_id"])
        columns = {n: value for n, value in known.items() if n != "stack"}
        assert_columns(
            row,
            columns
            | (dict.fromkeys((*SCORES, "query_norm", "key_norm", "mean_log_self")) if place[:2] in replayed else {}),
            str(place),
        )


# --- odd batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt2", "bert"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_single_tokens_attends_to_itself_in_every_head(family, batch):
    """Grouped heads of one token come packed as queries of the key heads in some versions."""
    tables = measure(tiny(family), input_ids=torch.arange(5, 5 + batch)[:, None])
    rows = tables["heads"].to_pylist()
    assert {r["head"] for r in rows} == set(range(4)) and len(rows) % (4 * batch) == 0
    for row in rows:
        known = {"mass_self": 1, "max_weight": 1, "entropy_nats": 0, "query_rows": 1, "mass_first": 1}
        assert_columns(row, known, f"{family} {row['layer']}")
        assert row["entropy_normalized"] is None and row["distance_vs_uniform"] is None
        assert row["context_norm"] > 0 and row["output_norm"] > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bert", "roberta"])
def test_a_left_padded_sequence_measures_as_it_does_alone(family):
    """With positions given: absolute ones are an input of the model, and counted from the batch's left edge else."""
    model, ids = tiny(family), torch.randint(4, 60, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    first = 2 if family == "roberta" else 0  # which counts past its padding token
    positions = (mask.cumsum(-1) - 1).clamp_min(0) + first
    padded = measure(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    alone = measure(model, input_ids=ids[1:, 4:], position_ids=torch.arange(7)[None] + first)
    got = [r for r in padded["heads"].to_pylist() if r["sequence_id"] == 1]
    for row, expected in zip(got, alone["heads"].to_pylist(), strict=True):
        assert row.pop("sequence_id") == 1 and expected.pop("sequence_id") == 0
        assert row.pop("stack") == expected.pop("stack")
        assert_columns(row, expected, f"{family} L{row['layer']}H{row['head']}")


# --- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [ByTorch, Grouped, Imported])
def test_a_half_precision_model_is_measured_from_the_queries_and_keys_that_it_computed(way, dtype):
    stack = stack_of(way).to(dtype)
    layer, x = stack.layers[0], states().to(dtype)
    with torch.inference_mode():
        projected = ((layer.query(x), layer.heads), (layer.key(x), layer.key_heads), (layer.value(x), layer.key_heads))
        q, k, v = (exact(t.unflatten(-1, (count, -1)).transpose(1, 2)) for t, count in projected)
    k, v = (np.repeat(t, layer.heads // layer.key_heads, axis=1) for t in (k, v))
    assert_half(stack, x, q @ k.transpose(0, 1, 3, 2) / 2, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [Matmul, Einsum, Bmm])
def test_a_half_precision_model_by_hand_is_measured_from_the_scores_that_it_computed(way, dtype):
    stack = stack_of(way).to(dtype)
    x, read = states().to(dtype), []
    with torch.inference_mode(), Softmaxed(read):
        value = stack.layers[0].value(x)
        stack(x)
    scores = exact(read[0]).reshape(BATCH, HEADS, TOKENS, TOKENS)
    assert_half(stack, x, scores, exact(value.unflatten(-1, (HEADS, -1)).transpose(1, 2)))


class Softmaxed(torch.overrides.TorchFunctionMode):
    """Keeps what a softmax reads."""

    def __init__(self, read: list[torch.Tensor]) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "softmax":
            self.read.append(args[0].clone())
        return func(*args, **(kwargs or {}))


def assert_half(stack: Any, x: torch.Tensor, s: np.ndarray, v: np.ndarray) -> None:
    """Columns of the pattern and the scores as exact as in float32; what the model rounded, to its own rounding."""
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    w_o = exact(stack.layers[0].out.weight).T.reshape(HEADS, -1, WIDTH)
    rows = measure(stack, x)["heads"].to_pylist()
    assert len(rows) == BATCH * HEADS
    for row in rows:
        of = row["sequence_id"], row["head"]
        written = {"v": v[of], "w_o": w_o[row["head"]]}
        expected = oracles.head_columns(p[of], s[of], **written) | oracles.sample_columns(p[of], s[of], **written)
        of_values = ("context_norm", "output_norm", "value_norm", "value_ratio_first")
        rounded = {name: expected.pop(name) for name in of_values}
        for name in ("query_norm", "key_norm"):  # not of the scores
            del expected[name]
        known = {name: value for name, value in expected.items() if name in row}
        assert_columns(row, known, f"sequence {of[0]} H{of[1]}")
        for name, value in rounded.items():
            assert row[name] == pytest.approx(value, rel=2e-2), name


# --- refusals ------------------------------------------------------------------------------------------------------


def test_training_mode_is_refused_before_the_model_runs():
    stack = stack_of(BySoftmaxModule).train()  # its dropout would drop
    with (
        stack.register_forward_pre_hook(lambda *_: pytest.fail("ran")),
        pytest.raises(Refusal, match=r"model\.eval\(\)"),
    ):
        measure(stack, states())


def test_dropout_inside_an_attention_call_is_refused_in_eval_mode_too():
    with pytest.raises(CaptureError, match="without dropout"):
        measure(stack_of(Dropping), states())


def test_a_layer_left_in_training_mode_is_refused():
    stack = stack_of(BySoftmaxModule, BySoftmaxModule)
    stack.layers[1].dropout.train()
    with pytest.raises((Refusal, CaptureError), match=r"model\.eval\(\)"):
        measure(stack, states())


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"input_ids": torch.tensor([2, 3, 4])}, r"input_ids of shape \[batch, token\]"),
        ({"input_ids": [[2, 3, 4]]}, "a model reads tensors; got input_ids as a list of numbers"),
        (
            {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 4).long()},
            "must have the shape of the ids",
        ),
        ({"input_ids": torch.ones(1, 5).long(), "attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "has gaps"),
        ({"input_ids": torch.ones(2, 2).long(), "attention_mask": torch.tensor([[1, 1], [0, 0]])}, "row 1"),
        ({}, "got nothing"),
    ],
)
def test_inputs_that_cannot_be_measured_are_refused_before_the_model_runs(inputs, said):
    model = tiny("bert")
    with model.register_forward_pre_hook(lambda *_: pytest.fail("ran")), pytest.raises(Refusal, match=said):
        measure(model, **inputs)


def test_an_input_that_the_model_itself_cannot_read_is_the_models_own_error():
    stack = stack_of(ByTorch)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure(stack, torch.randn(2, 5, WIDTH + 1))
    assert functional.scaled_dot_product_attention is SDPA
    assert_exact(stack, states())


def test_a_model_without_attention_is_refused():
    with pytest.raises(CaptureError, match="Stack showed none"):
        measure(stack_of(Mlp, Mlp), states())
