"""Columns of `residual` on states whose values are known."""

import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from attlas.extract import measure
from attlas.extract.engines.observations import ResidualObservation
from attlas.extract.tables import TABLES
from tests.extract.models import tiny

COLUMNS = {column.name: column for column in TABLES["residual"].facts}


def of(states: Any, *, lengths: tuple[int, ...] | None = None, **others: Any) -> ResidualObservation:
    """Sequences of states [batch, token, width], of these lengths."""
    after = torch.as_tensor(states, dtype=torch.float32)
    after = after[None] if after.dim() == 2 else after
    real = torch.ones(after.shape[:2], dtype=torch.bool)
    for sequence, length in enumerate(lengths or ()):
        real[sequence, length:] = False
    return ResidualObservation(real, after, **others)


def value(name: str, o: ResidualObservation) -> list[float]:
    compute = COLUMNS[name].compute
    assert compute is not None
    return compute(o).tolist()


def test_equal_tokens_have_collapsed_and_centred_ones_have_not():
    equal, centred = [[1.0, 2.0, 3.0]] * 4, [[1.0, -2.0], [-1.0, 2.0]]
    assert value("rank_collapse", of(equal)) == [0.0]
    assert value("rank_collapse", of(centred)) == [1.0]


def test_a_nearly_collapsed_sequence_keeps_its_digits():
    """‖X‖² − n‖x̄‖² would be nothing but rounding here."""
    states = torch.full((50, 16), 1000.0)
    states[::2] += 0.01
    states = states.float()
    exact = states.double() - states.double().mean(0)
    expected = float(exact.norm() / states.double().norm())
    assert 0 < expected < 1e-5
    assert value("rank_collapse", of(states)) == [pytest.approx(expected, rel=1e-4)]


def test_a_straight_line_has_no_curvature_and_back_and_forth_is_half_a_turn():
    line = torch.arange(1, 7)[:, None] * torch.tensor([1.0, 2.0, -1.0])
    assert value("curvature", of(line)) == [pytest.approx(0, abs=1e-6)]
    assert value("curvature", of([[1.0, 0], [2.0, 0], [1.0, 0], [2.0, 0]])) == [pytest.approx(math.pi)]
    square = [[0.0, 0], [1.0, 0], [1.0, 1], [0.0, 1]]
    assert value("curvature", of(square)) == [pytest.approx(math.pi / 2)]


def test_two_tokens_have_no_curvature_and_neither_do_states_that_stand_still():
    assert math.isnan(value("curvature", of([[1.0, 0], [2.0, 0]]))[0])
    assert math.isnan(value("curvature", of([[1.0, 0]] * 5))[0])


def test_states_of_one_direction_have_rank_one_and_orthogonal_ones_that_of_their_number():
    one = torch.arange(1, 6)[:, None] * torch.tensor([0.5, -1.0, 2.0])
    assert value("effective_rank", of(one)) == [pytest.approx(1)]
    assert value("effective_rank", of(torch.eye(7) * 3)) == [pytest.approx(7)]
    assert value("effective_rank", of(torch.eye(3).repeat(5, 1))) == [pytest.approx(3)]


def test_effective_rank_is_there_for_the_sample_alone():
    o = of(torch.eye(4).repeat(3, 1, 1), sample=torch.tensor([True, False, True]))
    first, second, third = value("effective_rank", o)
    assert (first, third) == (pytest.approx(4), pytest.approx(4)) and math.isnan(second)


def test_a_median_is_that_of_a_usual_token_whatever_a_massive_one_does():
    states = torch.eye(5)
    states[0] *= 1e6
    assert value("stream_norm_median", of(states)) == [1.0]
    assert value("stream_norm_median", of(torch.diag(torch.tensor([1.0, 2.0, 3.0, 10.0])))) == [2.5]
    assert value("max_abs_token", of(states)) == [0.0]


def test_the_first_of_equal_largest_tokens_counts_and_padding_does_not():
    states = torch.zeros(2, 5, 3)
    states[0, 2, 1], states[0, 4, 0] = -7, 7
    states[1, 1, 0], states[1, 3, 0] = 1, 9
    assert value("max_abs_token", of(states, lengths=(5, 2))) == [2.0, 1.0]


def test_the_position_of_the_largest_activation_counts_from_the_first_real_token():
    states = torch.zeros(1, 6, 2)
    states[0, 4, 0] = 5
    real = torch.tensor([[False, False, False, True, True, True]])
    assert value("max_abs_token", ResidualObservation(real, states)) == [1.0]


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_columns_keep_their_bounds_and_do_not_depend_on_scale_or_padding(n: int, d: int, seed: int, scale: float):
    states = torch.randn(1, n, d, generator=torch.Generator().manual_seed(seed))
    padded = torch.cat((states, torch.full((1, 3, d), 1e9)), 1)
    bounds = {"rank_collapse": 1, "curvature": math.pi, "effective_rank": min(n, d), "max_abs_token": n - 1}
    for name, highest in bounds.items():
        (got,) = value(name, of(states))
        for other in (of(padded, lengths=(n,)), of(states * scale)):
            assert value(name, other) == [pytest.approx(got, rel=1e-4, abs=1e-5, nan_ok=True)], name
        if not math.isnan(got):
            assert -1e-6 <= got <= highest * (1 + 1e-6), name


def test_tokens_that_see_only_themselves_are_mixed_with_nothing_and_their_heads_are_not_diverse():
    """The first token of a causal model is such a token: a sequence of its own shows it."""
    ids = torch.randint(2, 60, (2, 1), generator=torch.Generator().manual_seed(0))
    rows = measure(tiny("gpt2"), input_ids=ids, statistics="all")["residual"].to_pylist()
    attention = [row for row in rows if row["site"] == "attention"]
    assert len(attention) == 2 * 3
    for row in attention:
        assert row["mixing_ratio"] == pytest.approx(0, abs=1e-6)
        assert row["mixing_ratio_attention"] == pytest.approx(0, abs=1e-6)
        assert row["head_diversity_nats"] == pytest.approx(0, abs=1e-6)


def test_heads_that_look_at_different_tokens_have_the_largest_diversity():
    """Four heads, each of which is made to look at one token of its own."""
    model = tiny("bert")
    ids = torch.randint(2, 60, (1, 4), generator=torch.Generator().manual_seed(0))
    each_its_own = torch.eye(4, dtype=torch.bool)[None, :, None].expand(1, 4, 4, 4)
    rows = measure(model, input_ids=ids, attention_mask=each_its_own, statistics="all")["residual"].to_pylist()
    for row in rows:
        expected = pytest.approx(math.log(4)) if row["site"] == "attention" else None
        assert row["head_diversity_nats"] == expected


def test_a_sandwich_norm_leaves_mixing_ratios_null():
    """Its update is not what the contexts write: a norm stands between."""
    ids = torch.randint(2, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.Gemma2Model(config).eval()
    rows = measure(model, input_ids=ids, statistics="all")["residual"].to_pylist()
    attention = [row for row in rows if row["site"] == "attention"]
    assert attention and all(row["mixing_ratio"] is None for row in attention)


def test_a_column_of_the_sample_and_what_patterns_cost_are_not_in_the_core():
    needs = TABLES["residual"].needs([c for c in TABLES["residual"].facts if c.core])
    assert not needs.patterns and not needs.outputs and not needs.calls
