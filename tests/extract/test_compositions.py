"""`compositions`: how much of what a head writes later heads read, against full matrices, hand-made heads and simulation."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from attlas.extract import measure
from attlas.extract.capture.compositions import layer_pairs, random_composition
from attlas.extract.measurement import layout_of
from tests.extract.models import tiny
from tests.extract.test_weights import LLAMA, ids, of_bert, of_llama, random

SCORES = ("q_composition", "k_composition", "v_composition")
KEYS = ("layer", "head", "later_layer", "later_head")


def compositions_of(model: nn.Module, **inputs) -> pl.DataFrame:
    return pl.DataFrame(measure(model, tables=("compositions",), **inputs)["compositions"])


def ratio(A: np.ndarray, B: np.ndarray) -> float:
    return float(np.linalg.norm(A @ B) / (np.linalg.norm(A) * np.linalg.norm(B)))


@pytest.mark.parametrize(
    ("model", "matrices"), [(tiny("bert"), of_bert), (random("llama", **LLAMA), of_llama)], ids=["bert", "llama"]
)
def test_scores_are_their_formulas_on_full_matrices(model: nn.Module, matrices):
    heads = dict(zip([(n // 4, n % 4) for n in range(99)], matrices(model), strict=False))
    qk, ov = (
        {place: f(*m) for place, m in heads.items()} for f in (lambda q, k, v, o: q @ k.T, lambda q, k, v, o: v @ o)
    )
    rows = compositions_of(model, **ids()).to_dicts()
    layers = 1 + max(layer for layer, _ in heads)
    assert len(rows) == 16 * layers * (layers - 1) // 2
    for row in rows:
        early, late = (row["layer"], row["head"]), (row["later_layer"], row["later_head"])
        expected = (ratio(ov[early], qk[late]), ratio(ov[early], qk[late].T), ratio(ov[early], ov[late]))
        assert [row[name] for name in SCORES] == pytest.approx(expected, abs=1e-5)
        assert row["random_composition"] == pytest.approx(32**-0.5, rel=1e-2)


def test_rows_are_all_pairs_sorted_and_each_once():
    rows = compositions_of(tiny("bert"), **ids()).select(KEYS)
    assert rows.rows() == sorted(set(rows.rows()))
    assert (rows["later_layer"] > rows["layer"]).all()


class TwoLayers(nn.Module):
    """Two layers of one head each, of matrices that are given: W_Q, W_K, W_V [8, 2], W_O [2, 8]."""

    def __init__(self, *layers):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(60, 8)
        self.inputs = nn.ModuleList(nn.ModuleList(nn.Linear(8, 2, bias=False) for _ in range(3)) for _ in layers)
        self.outputs = nn.ModuleList(nn.Linear(2, 8, bias=False) for _ in layers)
        with torch.no_grad():
            for inputs, output, (*matrices, W_O) in zip(self.inputs, self.outputs, layers, strict=True):
                output.weight.copy_(W_O.T)
                for module, matrix in zip(inputs, matrices, strict=True):
                    module.weight.copy_(matrix.T)
        self.eval()

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        for inputs, output in zip(self.inputs, self.outputs, strict=True):
            q, k, v = (module(x)[:, None] for module in inputs.children())
            x = x + output(functional.scaled_dot_product_attention(q, k, v)[:, 0])
        return x


def plane(first: int) -> torch.Tensor:
    """A map from two of eight dimensions."""
    return torch.eye(8)[:, first : first + 2]


def hand_made(reads: int) -> dict[str, float]:
    """The first head reads dimensions 0 and 1 and writes 2 and 3; the second reads `reads` and the one after by its keys."""
    first = (plane(0), plane(0), plane(0), plane(2).T)
    second = (plane(4), plane(reads), plane(4), plane(6).T)
    return compositions_of(TwoLayers(first, second), **ids()).to_dicts()[0]


def test_what_is_written_where_the_later_head_reads_is_read_and_nothing_else_is():
    row = hand_made(reads=2)
    # all that is written is read: of norms √2 each, the product has √2
    assert row["k_composition"] == pytest.approx(2**-0.5, rel=1e-6)
    assert row["q_composition"] == row["v_composition"] == 0
    assert row["k_composition"] > row["random_composition"]


def test_heads_that_share_no_dimension_do_not_compose():
    row = hand_made(reads=0)
    assert [row[name] for name in SCORES] == [0, 0, 0]


def test_one_direction_that_is_written_and_read_composes_wholly():
    one = torch.zeros(8, 2)
    one[0, 0] = 1
    model = TwoLayers((one, one, one, one.T), (one, one, one, one.T))
    row = compositions_of(model, **ids()).to_dicts()[0]
    assert [row[name] for name in SCORES] == pytest.approx([1, 1, 1], rel=1e-6)


def test_heads_of_zeros_have_no_score():
    zero = torch.zeros(8, 2)
    first = (plane(0), plane(0), plane(0), zero.T)
    model = TwoLayers(first, (plane(0), plane(2), plane(4), plane(6).T), (plane(0), plane(2), plane(4), zero.T))
    rows = {(r["layer"], r["later_layer"]): r for r in compositions_of(model, **ids()).to_dicts()}
    assert [rows[0, 1][name] for name in SCORES] == [None, None, None]
    assert rows[1, 2]["q_composition"] == 0 and rows[1, 2]["v_composition"] is None


def test_cross_attention_has_no_compositions():
    model = random("t5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    found = compositions_of(model, **ids(), decoder_input_ids=ids(7)["input_ids"])
    assert dict(found["stack"].value_counts().iter_rows()) == {"encoder": 16, "decoder": 16}


def test_where_queries_are_normalised_only_values_compose():
    found = compositions_of(random("qwen3", **LLAMA), **ids())
    assert found["q_composition"].null_count() == found["k_composition"].null_count() == found.height == 16
    assert found["v_composition"].null_count() == 0


def test_pairs_are_kept_until_a_weight_changes():
    model = tiny("bert")
    attentions = layout_of(model, ids()).attentions
    first = layer_pairs(model, "encoder", attentions)
    assert layer_pairs(model, "encoder", attentions) is first
    model.encoder.layer[1].attention.self.key.weight.data[0] += 1
    again = layer_pairs(model, "encoder", attentions)
    assert again is not first
    changed = [
        (pair.layer, pair.later_layer)
        for pair, other in zip(first, again, strict=True)
        if (pair.scores != other.scores).any()
    ]
    assert changed == [(0, 1)], "what layer 1 writes has not changed"


# --- the mean for random matrices

SIZES = [(32, 4), (32, 8), (64, 8), (64, 64), (128, 32), (384, 32), (768, 64)]


@pytest.mark.parametrize(("d", "rank"), SIZES)
def test_the_random_score_is_the_mean_of_simulated_ones(d: int, rank: int):
    """To 0.5 %, or the error of the simulation, whichever is larger."""
    generator = torch.Generator().manual_seed(d + rank)
    scores = []
    for _ in range(40 if d > 200 else 400):
        A1, A2, B1, B2 = (torch.randn(d, rank, generator=generator, dtype=torch.float64) for _ in range(4))
        # ‖A1 A2ᵀ B1 B2ᵀ‖ by Gram matrices, tested above
        middle = A2.T @ B1
        square = ((A1.T @ A1) * (middle @ (B2.T @ B2) @ middle.T)).sum()
        norms = [((X.T @ X) * (Y.T @ Y)).sum() for X, Y in ((A1, A2), (B1, B2))]
        scores.append(float((square / norms[0] / norms[1]).sqrt()))
    error = np.std(scores) / len(scores) ** 0.5
    assert np.mean(scores) == pytest.approx(random_composition(d, (rank, rank)), abs=max(0.005 * d**-0.5, 4 * error))
    assert np.mean(np.square(scores)) == pytest.approx(1 / d, rel=5 * 2 * error * d**0.5 + 1e-3)


@given(st.integers(1, 4096), st.integers(1, 256), st.integers(1, 256))
def test_the_random_score_is_at_most_its_root_mean_square(d: int, rank: int, other: int):
    assert 0 < random_composition(d, (min(d, rank), min(d, other))) <= d**-0.5 * (1 + 1e-12)
