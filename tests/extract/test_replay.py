"""Attention over blocks, by hashing or for a sample: measured by running its module again, against the pattern by hand."""

import math
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from attlas.extract import measure
from attlas.extract.capture.intercept.recorded_call import RecordedCall
from attlas.extract.errors import CaptureError
from attlas.extract.measurement import layout_of
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shards, plan_run
from tests import oracles
from tests.extract.test_heads import assert_columns
from tests.extract.test_torch_modules import exact, linear

BATCH, TOKENS, WIDTH, HEADS, BLOCK = 3, 12, 16, 4, 3


# --- layers of a user's own ------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Projections around `weights`, which are never a matrix of all queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        return self.out(self.contexts(q / math.sqrt(WIDTH // HEADS), k, v).transpose(1, 2).flatten(2))

    def contexts(self, q, k, v):
        raise NotImplementedError


class Blocks(Layer):
    """A query sees its own block and the one before."""

    def contexts(self, q, k, v):
        q, k, v = (x.unflatten(2, (-1, BLOCK)) for x in (q, k, v))
        k, v = (torch.cat((nn.functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x), -2) for x in (k, v))
        scores = q @ k.transpose(-1, -2)
        scores[:, :, 0, :, :BLOCK] = -torch.inf
        return (scores.softmax(-1) @ v).flatten(2, 3)

    @staticmethod
    def visible() -> np.ndarray:
        block = np.arange(TOKENS) // BLOCK
        return (block[:, None] - block >= 0) & (block[:, None] - block <= 1)


class Shuffled(Layer):
    """A query sees those that a random order puts into its block; another order at every call."""

    def contexts(self, q, k, v):
        order = torch.randperm(q.shape[2])
        q, k, v = (x[:, :, order].unflatten(2, (-1, BLOCK)) for x in (q, k, v))
        inside = ((q @ k.transpose(-1, -2)).exp() / (q @ k.transpose(-1, -2)).exp().sum(-1, keepdim=True)) @ v
        return inside.flatten(2, 3)[:, :, order.argsort()]


class Dropping(Layer):
    """A query sees itself and the keys that chance leaves it."""

    def contexts(self, q, k, v):
        left = (torch.rand(q.shape[2], q.shape[2]) < 0.5) | torch.eye(q.shape[2], dtype=torch.bool)
        weights = (q @ k.transpose(-1, -2)).exp() * left
        return weights / weights.sum(-1, keepdim=True) @ v


class Sampled(Layer):
    """Every second query looks by softmax, the others at all keys alike."""

    def contexts(self, q, k, v):
        contexts = v.mean(2, keepdim=True).repeat(1, 1, q.shape[2], 1)
        contexts[:, :, ::2] = (q[:, :, ::2] @ k.transpose(-1, -2)).softmax(-1) @ v
        return contexts


class WithMemory(Layer):
    """Every query also looks at what is no token."""

    def contexts(self, q, k, v):
        weights = (q @ k.transpose(-1, -2)).exp()
        return weights / (weights.sum(-1, keepdim=True) * 2) @ v


class Encoder(nn.Module):
    def __init__(self, kind: type[Layer], layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def encoder_of(kind: type[Layer]) -> Any:
    torch.manual_seed(0)
    encoder = Encoder(kind).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(2)
    return encoder


def states() -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def of_heads(x: np.ndarray) -> np.ndarray:
    """[batch, token, width] → [batch, head, token, head width]."""
    return x.reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def scores_of(layer: Layer, x: np.ndarray) -> np.ndarray:
    q, k = (of_heads(linear(x, part.weight, part.bias)) for part in (layer.query, layer.key))
    return q @ k.swapaxes(-1, -2) / math.sqrt(WIDTH // HEADS)


def assert_layer(tables, number: int, layer: Layer, x: np.ndarray, p: np.ndarray, visible: np.ndarray) -> None:
    v = of_heads(linear(x, layer.value.weight, layer.value.bias))
    w_o = exact(layer.out.weight).T.reshape(HEADS, -1, WIDTH)
    rows = {(r["sequence_id"], r["head"]): r for r in tables["heads"].to_pylist() if r["layer"] == number}
    assert len(rows) == BATCH * HEADS
    for (sequence, head), row in rows.items():
        pattern = p[sequence, head]
        columns = oracles.head_columns(pattern, visible=visible, v=v[sequence, head], w_o=w_o[head])
        where = f"layer {number} head {head} sequence {sequence}"
        assert_columns(row, {name: value for name, value in columns.items() if name in row}, where)
        assert row["score_max"] is row["score_mean"] is row["score_std"] is None


@pytest.mark.parametrize("kind", [Blocks, Sampled])
def test_every_column_is_that_of_the_pattern_by_hand(kind):
    encoder, x = encoder_of(kind), states()
    tables = measure(encoder, x)
    assert layout_of(encoder, {"x": x}).methods == {"replay"}
    states_of = exact(x)
    for number, layer in enumerate(encoder.layers):
        scores = scores_of(layer, states_of)
        if kind is Blocks:
            visible = Blocks.visible()
            p = softmax(np.where(visible, scores, -np.inf))
        else:
            visible, p = np.ones((TOKENS, TOKENS), bool), softmax(scores)
            p[:, :, 1::2] = 1 / TOKENS
        assert_layer(tables, number, layer, states_of, p, visible)
        contexts = p @ of_heads(linear(states_of, layer.value.weight, layer.value.bias))
        written = contexts.transpose(0, 2, 1, 3).reshape(BATCH, TOKENS, WIDTH)
        states_of = states_of + linear(written, layer.out.weight, layer.out.bias)


def test_what_is_drawn_at_random_is_drawn_again_alike_and_the_users_own_numbers_go_on():
    encoder, x = encoder_of(Shuffled), states()
    kept = []
    encoder.register_forward_hook(lambda _m, _a, output: kept.append(output))
    measure(encoder, x)  # examines it
    torch.manual_seed(5)
    with torch.inference_mode():
        plain = encoder(x)
    after = torch.rand(1)
    torch.manual_seed(5)
    kept.clear()
    tables = measure(encoder, x)
    assert torch.equal(kept[0], plain)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(5)
    group = np.empty(TOKENS, int)
    group[torch.randperm(TOKENS).numpy()] = np.arange(TOKENS) // BLOCK
    visible = group[:, None] == group
    p = softmax(np.where(visible, scores_of(encoder.layers[0], exact(x)), -np.inf))
    assert_layer(tables, 0, encoder.layers[0], exact(x), p, visible)


def test_the_users_hooks_hear_each_call_once():
    encoder, x = encoder_of(Blocks), states()
    heard = []
    encoder.layers[0].value.register_forward_hook(lambda *_: heard.append(1))
    # `weights` asks a module with hooks what it does, as output projections are asked
    tables = ("heads", "residual", "profiles")
    measure(encoder, x, tables=tables)  # examines it, as it does whenever there are other hooks
    heard.clear()
    measure(encoder, x, tables=tables)
    assert heard == [1]


def test_rows_that_do_not_sum_to_one_are_refused_by_name():
    with pytest.raises(CaptureError, match=r"weights of tokens that sum to one; layers\.0 .* rows sum to 0\.5 to 0\.5"):
        measure(encoder_of(WithMemory), states())


RANDOM = """
import torch
from torch import nn

from tests.extract.checkpoints import VOCABULARY, tokenizer_of
from tests.extract.test_replay import WIDTH, Dropping, Encoder


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(VOCABULARY, WIDTH), Encoder(Dropping)

    def forward(self, input_ids, attention_mask):
        return self.body(self.embed(input_ids))


def build():
    return Own(), tokenizer_of()
"""


def test_a_run_of_what_draws_at_random_gives_the_same_bytes_whatever_was_drawn_before(tmp_path):
    (tmp_path / "random.py").write_text(RANDOM)
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 12)
    runs = []
    for number in range(2):
        out = tmp_path / f"out{number}"
        planned = plan_run(
            RunOptions(
                model=f"{tmp_path / 'random.py'}:build",
                corpus=str(tmp_path / "text.txt"),
                out=out,
                max_length=12,
            )
        )
        torch.manual_seed(number)
        measure_shards(planned.open_worker(), planned.remaining)
        finish(out)
        runs.append({p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.parquet"))})
    assert len(runs[0]) > 3
    assert runs[0] == runs[1]


# --- Longformer, whose chosen tokens look with projections of their own, at all tokens ---------------------------------


@pytest.fixture(scope="module")
def longformer() -> Any:
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=24,
        attention_window=4,
        vocab_size=60,
        max_position_embeddings=64,
        pad_token_id=1,
    )
    model = transformers.LongformerModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def by_hand(
    attention, x: np.ndarray, real: np.ndarray, chosen: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pattern and visibility of one sequence [token, width], of its real tokens."""
    place = np.arange(len(x))
    near = np.abs(place[:, None] - place) <= window // 2
    everywhere = np.broadcast_to(real, near.shape)
    visible = np.where(chosen[:, None], everywhere, (near | chosen) & everywhere)
    scores = np.empty((HEADS, len(x), len(x)))
    for queries, q, k in ((~chosen, "query", "key"), (chosen, "query_global", "key_global")):
        projected = (
            of_heads(linear(x[None], getattr(attention, n).weight, getattr(attention, n).bias)) for n in (q, k)
        )
        asking, asked = (one[0] for one in projected)
        scores[:, queries] = (asking @ asked.swapaxes(-1, -2))[:, queries] / math.sqrt(WIDTH // HEADS)
    return softmax(np.where(visible, scores, -np.inf)[:, real][:, :, real]), visible[real][:, real]


@pytest.mark.parametrize("lengths", [(11, 7), (43, 30)], ids=["few blocks", "many blocks"])
@pytest.mark.parametrize("chosen", [(), (0, 5)], ids=["local", "with global tokens"])
def test_longformer_equals_its_computation_by_hand_padded_by_the_user_and_by_itself(longformer, chosen, lengths):
    tokens = max(lengths)
    ids = torch.randint(2, 60, (2, tokens), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    special = torch.zeros_like(ids)
    special[:, list(chosen)] = 1
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask} | (
        {"global_attention_mask": special} if chosen else {}
    )
    tables = measure(longformer, **inputs)
    with torch.inference_mode():
        hidden = longformer(**inputs, output_hidden_states=True).hidden_states
    rows = {(r["sequence_id"], r["layer"], r["head"]): r for r in tables["heads"].to_pylist()}
    assert len(rows) == 2 * 2 * HEADS
    for (sequence, layer, head), row in rows.items():
        attention = longformer.encoder.layer[layer].attention.self
        real = np.arange(tokens) < lengths[sequence]
        p, visible = by_hand(attention, exact(hidden[layer][sequence])[:tokens], real, special[sequence].numpy() > 0, 4)
        columns = oracles.head_columns(p[head], visible=visible)
        known = {name: value for name, value in columns.items() if value is not None and name in row}
        assert_columns(row, known, f"layer {layer} head {head} sequence {sequence}")
        assert row["query_rows"] == lengths[sequence]
        assert (row["value_weighted_first"] is None) == bool(chosen)  # then a value depends on who asks


def test_a_window_takes_as_many_runs_as_it_has_blocks_however_long_the_sequence_is(longformer):
    measure(longformer, input_ids=torch.arange(2, 8)[None])  # examined
    for tokens in (25, 33, 57):
        with patch.object(RecordedCall, "replay", autospec=True, side_effect=RecordedCall.replay) as again:
            measure(longformer, input_ids=torch.arange(tokens)[None] + 2)
        blocks = math.ceil(tokens / (WIDTH // HEADS))
        who_sees_which = math.ceil(blocks / (WIDTH // HEADS))
        assert again.call_count == 2 * (1 + who_sees_which + 2)  # two blocks hold the five keys that a query sees


def test_the_stream_of_a_model_that_pads_a_few_tokens_to_a_long_window_is_found(longformer):
    config = transformers.LongformerConfig(**{**longformer.config.to_dict(), "attention_window": [512, 512]})
    torch.manual_seed(0)
    assert layout_of(transformers.LongformerModel(config).eval()).residual_refusal is None


def test_the_stream_of_longformer_is_measured_without_its_own_padding(longformer):
    ids = torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(3))
    found = measure(longformer, input_ids=ids)["residual"]
    read = []
    handle = longformer.embeddings.LayerNorm.register_forward_pre_hook(lambda _m, args: read.append(args[0]))
    with torch.inference_mode():
        longformer(input_ids=ids)
    handle.remove()
    assert read[0].shape == (2, 12, WIDTH)  # one is the model's own
    norms = [row["stream_norm"] for row in found.to_pylist() if row["site"] == "embedding"]
    assert norms == pytest.approx([float(x[:11].norm(dim=-1).mean()) for x in read[0]], rel=1e-5)
