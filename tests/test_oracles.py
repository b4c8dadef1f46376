"""The oracle itself: it must give the catalogue's closed forms, and agree with formulas written by others."""

import math

import numpy as np
import pytest
from scipy import linalg, stats
from scipy.spatial.distance import cosine, jensenshannon

from tests import oracles, patterns

LENGTHS = (1, 2, 3, 7, 32)


def near(expected):
    """Equal but for the rounding of float64."""
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


def random_scores(n: int, *, seed: int, causal: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pattern, its masked scores and its mask."""
    visible = np.tril(np.ones((n, n), dtype=bool)) if causal else np.ones((n, n), dtype=bool)
    s = np.where(visible, 2 * np.random.default_rng(seed).standard_normal((n, n)), -np.inf)
    e = np.exp(s - s.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True), s, visible


def same(first: oracles.Columns, second: oracles.Columns) -> None:
    assert first.keys() == second.keys()
    for column, value in first.items():
        assert second[column] == (None if value is None else near(value)), column


# --- heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("letter", patterns.PATTERNS)
def test_closed_forms_hold(letter, n):
    p, visible = patterns.PATTERNS[letter](n)
    columns = oracles.head_columns(p, visible=visible) | oracles.sample_columns(p, visible=visible)
    expected = {c: patterns.closed_form(c, letter, n) for c, forms in patterns.CLOSED_FORMS.items() if letter in forms}
    same(expected, {column: columns[column] for column in expected})


def test_only_the_cells_that_the_catalogue_leaves_blank_have_no_closed_form():
    blank = {
        (column, letter)
        for column, forms in patterns.CLOSED_FORMS.items()
        for letter in set(patterns.PATTERNS) - set(forms)
    }
    assert blank == {
        ("entropy_std_nats", "C"),
        ("received_entropy_nats", "C"),
        ("received_entropy_nats", "P"),
        ("mutual_information_nats", "C"),  # positive, see below
        ("received_max_key", "U"),  # a tie, see below
        ("received_max_key", "I"),
        ("sink_keys", "C"),
        ("pattern_effective_rank", "C"),
    }


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("letter", patterns.PATTERNS)
def test_known_patterns_are_distributions_over_visible_keys(letter, n):
    p, visible = patterns.PATTERNS[letter](n)
    assert p.sum(axis=1) == near(np.ones(n))
    assert not p[~visible].any()


@pytest.mark.parametrize("letter", ["U", "I"])
def test_a_tie_for_the_most_received_key_goes_to_the_lowest(letter):
    p, visible = patterns.PATTERNS[letter](7)
    assert oracles.head_columns(p, visible=visible)["received_max_key"] == 0


@pytest.mark.parametrize("n", [2, 3, 7, 32])
def test_a_causal_mask_alone_gives_mutual_information(n):
    p, visible = patterns.causal_uniform(n)
    information = oracles.head_columns(p, visible=visible)["mutual_information_nats"]
    assert information is not None
    assert information > 0.1


def test_one_token_has_no_normalised_entropy_and_no_distance_to_compare_with():
    (one, _) = patterns.uniform(1)
    columns = oracles.head_columns(one) | oracles.sample_columns(one)
    assert {c for c in patterns.CLOSED_FORMS if columns[c] is None} == patterns.UNDEFINED_FOR_ONE_TOKEN


@pytest.mark.parametrize("causal", [False, True])
def test_entropies_agree_with_scipy(causal):
    p, s, visible = random_scores(17, seed=1, causal=causal)
    columns = oracles.head_columns(p, s, visible)
    h = np.asarray(stats.entropy(p, axis=1))
    keys = visible.sum(axis=1)
    assert columns["entropy_nats"] == near(h.mean())
    assert columns["entropy_std_nats"] == near(np.std(h))
    assert columns["entropy_normalized"] == near((h[keys > 1] / np.log(keys[keys > 1])).mean())
    assert columns["attended_keys"] == near(np.exp(h).mean())
    assert columns["received_entropy_nats"] == near(stats.entropy(p.mean(axis=0)))


def test_mutual_information_is_that_of_the_joint_distribution_of_query_and_key():
    p, _, _ = random_scores(13, seed=2)
    joint = p / len(p)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    expected = stats.entropy(joint.ravel(), independent.ravel())
    assert oracles.head_columns(p)["mutual_information_nats"] == near(expected)


def test_entropy_from_scores_agrees_with_entropy_from_the_pattern():
    p, s, visible = random_scores(11, seed=3, causal=True)
    shifted = np.where(visible, s, 0)
    from_scores = np.log(np.exp(s).sum(axis=1)) - (p * shifted).sum(axis=1)
    assert oracles.head_columns(p, s, visible)["entropy_nats"] == near(from_scores.mean())


def test_self_backward_and_forward_are_all_the_mass():
    p, s, visible = random_scores(9, seed=4)
    columns = oracles.head_columns(p, s, visible)
    parts = [columns[c] for c in ("mass_self", "mass_backward", "mass_forward")]
    assert sum(part for part in parts if part is not None) == near(1)


def test_offset_spread_is_the_deviation_of_the_offset_under_the_pattern():
    p, _, _ = random_scores(9, seed=5)
    d = np.arange(9)[None, :] - np.arange(9)[:, None]
    spread = [math.sqrt(np.cov(d[i], aweights=p[i], ddof=0).item()) for i in range(9)]
    assert oracles.head_columns(p)["offset_std_tokens"] == near(np.mean(spread))


@pytest.mark.parametrize("with_sink", [False, True])
def test_class_masses_and_the_sink_sum_to_one(with_sink):
    p, _, _ = random_scores(16, seed=6)
    sink = np.linspace(0.1, 0.6, 16) if with_sink else None
    if sink is not None:
        p = p * (1 - sink)[:, None]
    columns = oracles.head_columns(p, classes=2 * list(oracles.TOKEN_CLASSES), sink=sink)
    masses = [columns[f"mass_{name}"] for name in oracles.TOKEN_CLASSES] + [columns["mass_sink"]]
    assert (columns["mass_sink"] is None) is not with_sink
    assert sum(mass for mass in masses if mass is not None) == near(1)


def test_a_class_has_its_share_of_a_uniform_pattern_and_an_absent_one_nothing():
    classes = ["bos", "word_start", "subword", "word_start", "separator"]
    columns = oracles.head_columns(patterns.uniform(5)[0], classes=classes)
    assert columns["mass_word_start"] == near(0.4)
    assert columns["mass_bos"] == near(0.2)
    assert columns["mass_number"] == 0


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match="got \\['verb'\\]"):
        oracles.head_columns(patterns.uniform(1)[0], classes=["verb"])


def test_a_sink_is_one_outcome_of_the_entropy_and_leaves_the_rest_as_it_is():
    p, _ = patterns.uniform(4)
    columns = oracles.head_columns(0.2 * p, sink=np.full(4, 0.8))
    expected = stats.entropy([0.05, 0.05, 0.05, 0.05, 0.8])
    assert columns["entropy_nats"] == near(expected)
    assert columns["received_entropy_nats"] == near(expected)
    assert columns["mutual_information_nats"] == near(0)
    assert columns["mass_sink"] == near(0.8)
    assert columns["mass_first"] == near(0.05)
    assert columns["max_weight"] == near(0.05)
    assert columns["distance_tokens"] == near(0.2 * 15 / 12)


def test_same_token_and_induction_find_the_earlier_copy():
    tokens = [5, 6, 7, 5, 6]  # query 3 (5): copy at 0, the token after it at 1; query 4 (6): copy at 1, after it 2
    columns = oracles.head_columns(patterns.uniform(5)[0], tokens=tokens)
    assert columns["mass_same_token"] == near(4 / 25)  # 0↔3, 1↔4
    assert columns["mass_induction"] == near(2 / 25)  # 3→1, 4→2
    pointing = np.eye(5)[[0, 0, 0, 1, 2]]
    assert oracles.head_columns(pointing, tokens=tokens)["mass_induction"] == near(2 / 5)


def test_induction_reaches_the_token_itself_when_the_previous_token_is_its_copy():
    columns = oracles.head_columns(patterns.identity(2)[0], tokens=[9, 9])  # query 1: token 0 = token 1, so key 1
    assert columns["mass_induction"] == near(1 / 2)
    assert columns["mass_same_token"] == 0


def test_scores_are_summarised_over_visible_keys():
    p, s, visible = random_scores(6, seed=7, causal=True)
    seen = s[visible]
    columns = oracles.head_columns(p, s, visible)
    assert columns["score_max"] == seen.max()
    assert columns["score_mean"] == near(seen.mean())
    assert columns["score_std"] == near(np.std(seen))


def test_writes_of_the_known_patterns():
    rng = np.random.default_rng(8)
    v, w_o = rng.standard_normal((5, 3)), rng.standard_normal((3, 4))
    own = oracles.head_columns(patterns.identity(5)[0], v=v, w_o=w_o)
    assert own["context_norm"] == near(np.linalg.norm(v, axis=1).mean())
    assert own["output_norm"] == near(np.linalg.norm(v @ w_o, axis=1).mean())
    to_first = oracles.head_columns(patterns.first(5)[0], v=v, w_o=w_o)
    assert to_first["context_norm"] == near(np.linalg.norm(v[0]))
    assert to_first["value_weighted_first"] == near(1)
    flat = oracles.head_columns(patterns.uniform(5)[0], v=v, w_o=w_o)
    written = np.linalg.norm(v @ w_o, axis=1)
    assert flat["value_weighted_first"] == near(written[0] / written.sum())
    assert flat["output_norm"] == near(np.linalg.norm(v.mean(axis=0) @ w_o))


def test_output_norm_follows_from_the_gram_matrix():
    p, _, _ = random_scores(6, seed=9)
    rng = np.random.default_rng(9)
    v, w_o = rng.standard_normal((6, 3)), rng.standard_normal((3, 8))
    c = p @ v
    expected = np.sqrt(np.einsum("ia,ab,ib->i", c, w_o @ w_o.T, c)).mean()
    assert oracles.head_columns(p, v=v, w_o=w_o)["output_norm"] == near(expected)
    assert oracles.head_columns(p, context=c, w_o=w_o)["output_norm"] == near(expected)


def test_a_sink_that_writes_nothing_has_no_value_weighted_mass():
    v = np.ones((4, 2))
    v[0] = 0
    columns = oracles.head_columns(np.tile([0.9, 0.05, 0.03, 0.02], (4, 1)), v=v, w_o=np.eye(2))
    assert columns["mass_first"] == near(0.9)
    assert columns["value_weighted_first"] == 0


def test_a_masked_row_is_counted_and_left_out():
    p, s, visible = random_scores(5, seed=10)
    p[2], s[2], visible[2] = np.nan, -np.inf, False
    columns = oracles.head_columns(p, s, visible)
    assert (columns["query_rows"], columns["masked_rows"], columns["nonfinite_rows"]) == (4, 1, 0)
    assert columns["entropy_nats"] == near(stats.entropy(np.delete(p, 2, axis=0), axis=1).mean())
    assert columns["score_max"] == np.delete(s, 2, axis=0).max()


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_row_with_a_nonfinite_visible_score_is_counted_and_left_out(score):
    p, s, visible = random_scores(5, seed=11)
    s[3, 1] = score
    columns = oracles.head_columns(p, s, visible)
    assert (columns["query_rows"], columns["masked_rows"], columns["nonfinite_rows"]) == (4, 0, 1)
    assert columns["max_weight"] == near(np.delete(p, 3, axis=0).max(axis=1).mean())


def test_a_nonfinite_score_behind_the_mask_changes_nothing():
    p, s, visible = random_scores(5, seed=12, causal=True)
    noisy = s.copy()
    noisy[~visible] = np.nan
    same(oracles.head_columns(p, s, visible), oracles.head_columns(p, noisy, visible))


def test_values_behind_the_mask_change_nothing():
    p, s, visible = random_scores(5, seed=13)
    p, visible = p.copy(), visible.copy()
    p[:, 4], visible[:, 4] = 0, False
    v, w_o = np.random.default_rng(13).standard_normal((5, 3)), np.eye(3)
    clean = oracles.head_columns(p, s, visible, v=v, w_o=w_o) | oracles.sample_columns(p, s, visible, v=v, w_o=w_o)
    v[4] = np.nan
    dirty = oracles.head_columns(p, s, visible, v=v, w_o=w_o) | oracles.sample_columns(p, s, visible, v=v, w_o=w_o)
    of_tokens = ("value_norm", "value_ratio_first")  # whether a row sees them or not
    assert all(math.isnan(dirty.pop(name) or 0) for name in of_tokens) and all(clean.pop(name) for name in of_tokens)
    same(clean, dirty)
    assert dirty["output_norm"] is not None


def test_nothing_measured_is_null_everywhere_but_in_the_counts():
    nothing = np.zeros((3, 3), dtype=bool)
    p = np.full((3, 3), np.nan)
    v, w_o = np.ones((3, 2)), np.eye(2)
    columns = oracles.head_columns(p, p, nothing, tokens=[1, 1, 1], classes=["bos"] * 3, sink=np.zeros(3), v=v, w_o=w_o)
    counts = {c: columns.pop(c) for c in ("query_rows", "masked_rows", "nonfinite_rows")}
    assert counts == {"query_rows": 0, "masked_rows": 3, "nonfinite_rows": 0}
    assert (columns.pop("value_norm"), columns.pop("value_ratio_first")) == (
        near(math.sqrt(2)),
        1,
    )  # of tokens, not rows
    assert set((columns | oracles.sample_columns(p, p, nothing, v=v, w_o=w_o)).values()) == {None}


def test_mass_where_nothing_is_visible_is_refused():
    with pytest.raises(ValueError, match="row 0 has some elsewhere"):
        oracles.head_columns(patterns.uniform(3)[0], visible=np.tril(np.ones((3, 3), dtype=bool)))


# --- heads, on the sample ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
def test_sample_columns_of_a_uniform_pattern(n):
    p, visible = patterns.uniform(n)
    columns = oracles.sample_columns(p, visible=visible, v=np.ones((n, 2)), w_o=np.eye(2))
    assert columns["keys_for_half_mass"] == -(-n // 2)
    assert columns["keys_for_90_mass"] == -(-9 * n // 10)
    assert columns["gini"] == near(0)
    assert columns["norm_entropy_nats"] == near(math.log(n))
    assert columns["norm_max_weight"] == near(1 / n)
    assert columns["norm_distance_tokens"] == near(patterns.closed_form("distance_tokens", "U", n))


@pytest.mark.parametrize("letter", ["I", "P", "F"])
def test_one_key_holds_everything_in_a_one_hot_pattern(letter):
    p, visible = patterns.PATTERNS[letter](7)
    columns = oracles.sample_columns(p, visible=visible)
    assert columns["keys_for_half_mass"] == columns["keys_for_90_mass"] == 1
    assert columns["gini"] == near(6 / 7)
    assert columns["norm_entropy_nats"] is None


def test_gini_counts_visible_keys_only():
    p, visible = patterns.causal_uniform(6)
    assert oracles.sample_columns(p, visible=visible)["gini"] == near(0)


def test_the_rank_of_a_pattern_agrees_with_scipy_and_counts_its_measured_rows():
    p, s, visible = random_scores(12, seed=16, causal=True)
    squares = np.square(linalg.svdvals(p))
    rank = oracles.sample_columns(p, s, visible)["pattern_effective_rank"]
    assert rank == near(math.exp(stats.entropy(squares / squares.sum())))
    s[5, 2] = np.inf
    others = np.delete(p, 5, axis=0)
    assert oracles.sample_columns(p, s, visible)["pattern_effective_rank"] == near(oracles.pattern_rank(others))


def test_gini_agrees_with_the_lorenz_curve():
    weights = np.random.default_rng(14).dirichlet(np.ones(9))
    lorenz = np.concatenate([[0], np.cumsum(np.sort(weights))])
    assert oracles.gini(weights) == near(1 - 2 * np.trapezoid(lorenz, dx=1 / 9))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tie_in_the_keys_that_hold_the_mass_does_not_turn_on_rounding(dtype):
    for n in range(1, 130):
        weights = np.full(n, 1 / n, dtype=dtype).astype(np.float64)
        assert oracles.keys_for_mass(weights, 0.5) == -(-n // 2)
        assert oracles.keys_for_mass(weights, 0.9) == -(-9 * n // 10)


def test_fewest_keys_that_hold_the_mass():
    weights = np.array([0.05, 0.45, 0.3, 0.15, 0.05])
    assert oracles.keys_for_mass(weights, 0.5) == 2
    assert oracles.keys_for_mass(weights, 0.9) == 3
    assert oracles.keys_for_mass(weights / 10, 0.9) == 3


def test_values_of_one_length_leave_the_norm_pattern_the_pattern():
    p, s, visible = random_scores(8, seed=15, causal=True)
    v = np.random.default_rng(15).standard_normal((8, 3))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    columns = oracles.head_columns(p, s, visible)
    norm = oracles.sample_columns(p, s, visible, v=v, w_o=np.eye(3))
    assert norm["norm_entropy_nats"] == near(columns["entropy_nats"])
    assert norm["norm_distance_tokens"] == near(columns["distance_tokens"])
    assert norm["norm_max_weight"] == near(columns["max_weight"])


# --- residual ------------------------------------------------------------------------------------------------------


def stream(n: int = 6, d: int = 5, *, seed: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (-1, {"update_ratio": 1, "update_cosine": -1, "stream_gain": 0, "step_cosine": None}),
        (-0.5, {"update_ratio": 0.5, "update_cosine": -1, "stream_gain": 0.5, "step_cosine": 1}),
        (1, {"update_ratio": 1, "update_cosine": 1, "stream_gain": 2, "step_cosine": 1}),
        (3, {"update_ratio": 3, "update_cosine": 1, "stream_gain": 4, "step_cosine": 1}),
        (0, {"update_ratio": 0, "update_cosine": None, "stream_gain": 1, "step_cosine": 1}),
    ],
)
def test_an_update_along_the_stream(factor, expected):
    x = stream()
    columns = oracles.residual_columns(x, factor * x, x + factor * x)
    for column, value in expected.items():
        assert columns[column] == (None if value is None else near(value)), column
    assert columns["stream_norm"] == near(np.linalg.norm(x, axis=1).mean())
    assert columns["update_norm"] == near(abs(factor) * np.linalg.norm(x, axis=1).mean())


def test_cosines_agree_with_scipy():
    x, update = stream(seed=21), stream(seed=22)
    columns = oracles.residual_columns(x, update, x + update)
    pairs = list(zip(x, update, strict=True))
    assert columns["update_cosine"] == near(np.mean([1 - cosine(a, b) for a, b in pairs]))
    assert columns["step_cosine"] == near(np.mean([1 - cosine(a, a + b) for a, b in pairs]))


def test_ratios_are_per_token_before_they_are_averaged():
    x, update = np.array([[1.0, 0], [10, 0]]), np.array([[1.0, 0], [0, 1]])
    columns = oracles.residual_columns(x, update, x + update)
    assert columns["update_ratio"] == near((1 + 0.1) / 2)
    assert columns["update_cosine"] == near(1 / 2)


def test_without_a_stream_before_only_the_stream_after_is_described():
    columns = oracles.residual_columns(None, None, stream())
    defined = {name for name, value in columns.items() if value is not None}
    of_the_stream_after = {"stream_norm_median", "max_abs_token", "rank_collapse", "curvature", "effective_rank"}
    assert defined == {"anisotropy", "max_abs", "outlier_dim", "outlier_ratio", "kurtosis"} | of_the_stream_after


def test_anisotropy_of_known_streams():
    assert oracles.anisotropy(np.tile(stream(1), (4, 1))) == near(1)
    assert oracles.anisotropy(3 * np.eye(4)) == near(0)
    assert oracles.anisotropy(np.array([[1.0, 0], [-1, 0]])) == near(-1)
    assert oracles.anisotropy(stream(1)) is None


def test_anisotropy_follows_from_the_sum_of_unit_vectors():
    x = stream(9)
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = (np.linalg.norm(u.sum(axis=0)) ** 2 - 9) / (9 * 8)
    assert oracles.anisotropy(x) == near(expected)


def test_outliers_of_known_streams():
    one_hot = oracles.residual_columns(None, None, -7 * np.eye(5)[[3, 3]])
    assert one_hot["kurtosis"] == near(5)
    assert one_hot["outlier_ratio"] == near(math.sqrt(5))
    assert (one_hot["max_abs"], one_hot["outlier_dim"]) == (7, 3)
    constant = oracles.residual_columns(None, None, np.full((3, 8), -2.0))
    assert constant["kurtosis"] == near(1)
    assert constant["outlier_ratio"] == near(1)


def test_kurtosis_agrees_with_scipy_on_centred_tokens():
    half = stream(4)
    x = np.concatenate([half, -half], axis=1)
    expected = stats.kurtosis(x, axis=1, fisher=False).mean()
    assert oracles.residual_columns(None, None, x)["kurtosis"] == near(expected)


def test_the_norm_reads_mean_and_deviation_and_has_no_gain_without_parameters():
    x, eps = stream(), 1e-5
    output = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + eps)
    columns = oracles.residual_columns(None, None, x, norm_input=x, norm_output=output, eps=eps)
    assert columns["norm_mean"] == near(x.mean())
    assert columns["norm_scale"] == near(np.sqrt(x.var(axis=1) + eps).mean())
    assert columns["norm_output_gain"] == near(1)
    doubled = oracles.residual_columns(None, None, x, norm_input=x, norm_output=2 * output, eps=eps)
    assert doubled["norm_output_gain"] == near(2)


def test_an_rms_norm_has_no_mean():
    x, eps = stream(), 1e-6
    rms = np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)
    columns = oracles.residual_columns(None, None, x, norm_input=x, norm_output=3 * x / rms, norm_kind="rms", eps=eps)
    assert columns["norm_mean"] is None
    assert columns["norm_scale"] == near(rms.mean())
    assert columns["norm_output_gain"] == near(3)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match='"layer" or "rms"; got \'batch\''):
        oracles.residual_columns(None, None, stream(), norm_kind="batch")


def test_equal_heads():
    columns = oracles.heads_columns(np.tile(stream(), (4, 1, 1)))
    assert columns["heads_mean_norm"] == near(np.linalg.norm(stream(), axis=1).mean())
    assert columns["heads_concat_norm"] == near(2 * np.linalg.norm(stream(), axis=1).mean())
    assert columns["heads_cosine"] == near(1)


def test_orthogonal_heads_and_a_single_head():
    orthogonal = oracles.heads_columns(np.eye(3)[:, None, :])
    assert orthogonal["heads_cosine"] == near(0)
    assert orthogonal["heads_concat_norm"] == near(math.sqrt(3))
    assert oracles.heads_columns(stream()[None])["heads_cosine"] is None


def test_mixing_ratio_is_none_of_itself_and_all_of_others():
    rng = np.random.default_rng(23)
    v, w_o, x = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 3, 6)), rng.standard_normal((4, 6))
    assert oracles.mixing_ratio(np.tile(np.eye(4), (2, 1, 1)), v, w_o, x) == 0
    shifted = np.tile(np.roll(np.eye(4), 1, axis=1), (2, 1, 1))
    assert oracles.mixing_ratio(shifted, v, w_o, 0 * x) == near(1)


def test_mixing_ratio_agrees_with_matrix_products():
    rng = np.random.default_rng(24)
    p = np.stack([random_scores(5, seed=h)[0] for h in range(3)])
    v, w_o, x = rng.standard_normal((3, 5, 2)), rng.standard_normal((3, 2, 6)), rng.standard_normal((5, 6))
    update = sum(p[h] @ v[h] @ w_o[h] for h in range(3))
    own = sum(np.diag(p[h])[:, None] * (v[h] @ w_o[h]) for h in range(3))
    a, b = np.linalg.norm(update - own, axis=1), np.linalg.norm(x + own, axis=1)
    assert oracles.mixing_ratio(p, v, w_o, x) == near((a / (a + b)).mean())


def test_head_diversity_is_the_generalised_jensen_shannon_divergence():
    p, q = random_scores(6, seed=25)[0], random_scores(6, seed=26)[0]
    expected = np.mean([jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)])
    assert oracles.head_diversity_nats(np.stack([p, q])) == near(expected)
    assert oracles.head_diversity_nats(np.stack([p, p, p])) == near(0)
    disjoint = np.stack([np.roll(np.eye(6), shift, axis=1) for shift in range(4)])
    assert oracles.head_diversity_nats(disjoint) == near(math.log(4))


def test_effective_rank_of_known_matrices():
    assert oracles.effective_rank(np.outer([1.0, 2, 3], [4.0, 5])) == near(1)
    assert oracles.effective_rank(5 * np.eye(4)) == near(4)
    assert oracles.effective_rank(np.zeros((3, 3))) is None


# --- profiles ------------------------------------------------------------------------------------------------------


def test_bins_double():
    expected = [0, 1, 2, 3, 3, 4, 4, 4, 4, *[5] * 8, *[6] * 16]
    assert [oracles.doubling_bin(d) for d in range(33)] == expected
    assert [oracles.signed_bin(-d) for d in range(33)] == [-b for b in expected]


def test_the_top_of_a_histogram_belongs_to_its_last_bin():
    assert [oracles.histogram_bin(v) for v in (-1e-9, 0, 1 / 64, 1.9 / 64, 0.5, 1, 1.1)] == [0, 0, 1, 1, 32, 63, 63]


@pytest.mark.parametrize("causal", [False, True])
def test_profiles_sum_to_the_columns_they_refine(causal):
    p, s, visible = random_scores(19, seed=30, causal=causal)
    columns = oracles.head_columns(p, s, visible)

    def total(profile):
        return near(sum(t for t, _ in profile.values())), sum(c for _, c in profile.values())

    assert total(oracles.offset_profile(p, visible)) == (19, visible.sum())
    assert total(oracles.received_by_position(p, visible)) == (19, 19)
    assert total(oracles.max_weight_histogram(p, visible)) == (19, 19)
    assert total(oracles.entropy_histogram(p, visible)) == (19 - causal, 19 - causal)
    assert columns["entropy_nats"] is not None
    assert columns["distance_tokens"] is not None
    assert total(oracles.entropy_by_position(p, visible)) == (19 * columns["entropy_nats"], 19)
    assert total(oracles.distance_by_position(p, visible)) == (19 * columns["distance_tokens"], 19)


def test_the_offset_profile_refines_the_masses():
    p, s, visible = random_scores(12, seed=31)
    columns, profile = oracles.head_columns(p, s, visible), oracles.offset_profile(p, visible)
    for number, column in ((0, "mass_self"), (-1, "mass_previous"), (1, "mass_next")):
        assert profile[number][0] / 12 == near(columns[column])
    assert {b: count for b, (_, count) in profile.items() if b >= 0} == {0: 12, 1: 11, 2: 10, 3: 17, 4: 22, 5: 6}


def test_profiles_of_known_patterns():
    p, visible = patterns.previous(8)
    assert oracles.offset_profile(p, visible)[-1] == (7, 7)
    assert oracles.offset_profile(p, visible)[4] == (0, 3 + 2 + 1)
    assert oracles.entropy_histogram(p, visible) == {0: (8, 8)}
    assert oracles.entropy_histogram(*patterns.uniform(8)) == {63: (8, 8)}
    assert oracles.max_weight_histogram(p, visible) == {63: (8, 8)}
    assert oracles.distance_by_position(p, visible) == {0: (0, 1), 1: (1, 1), 2: (1, 1), 3: (2, 2), 4: (3, 3)}
    assert oracles.received_by_position(p, visible) == {0: (2, 1), 1: (1, 1), 2: (1, 1), 3: (2, 2), 4: (2, 3)}


def test_a_masked_row_adds_to_no_profile_but_its_key_is_still_a_key():
    p, _, visible = random_scores(5, seed=32)
    p[4], visible[4] = np.nan, False
    assert sum(c for _, c in oracles.offset_profile(p, visible).values()) == 20
    assert sum(c for _, c in oracles.entropy_by_position(p, visible).values()) == 4
    received = oracles.received_by_position(p, visible)
    assert sum(c for _, c in received.values()) == 5
    assert sum(t for t, _ in received.values()) == near(4)


# --- weights -------------------------------------------------------------------------------------------------------


def test_weights_of_known_circuits():
    basis = np.linalg.qr(stream(6, 3, seed=40))[0]  # 6 × 3, orthonormal columns
    columns = oracles.weights_columns(basis, basis, basis, 2 * basis.T)
    assert columns["qk_norm"] == near(1)  # a projection of rank 3 over √3
    assert columns["qk_spectral"] == near(1 / math.sqrt(3))
    assert columns["ov_norm"] == near(2 * math.sqrt(3))
    assert columns["ov_spectral"] == near(2)
    assert columns["qk_effective_rank"] == near(3)
    assert columns["ov_effective_rank"] == near(3)
    assert columns["ov_copying"] == near(1)
    assert columns["qk_symmetry"] == near(1)
    assert oracles.weights_columns(basis, basis, basis, -basis.T)["ov_copying"] == near(-1)


def test_a_rotation_neither_copies_nor_is_symmetric():
    turn = np.array([[0.0, 1], [-1, 0]])
    columns = oracles.weights_columns(turn, np.eye(2), turn, np.eye(2))
    assert columns["ov_copying"] == near(0)
    assert columns["qk_symmetry"] == near(0)


def test_norms_follow_from_gram_matrices():
    w_q, w_k, w_v = (stream(9, 4, seed=seed) for seed in (41, 42, 43))
    w_o = stream(4, 9, seed=44)
    columns = oracles.weights_columns(w_q, w_k, w_v, w_o)
    assert columns["qk_norm"] == near(math.sqrt(np.trace(w_q.T @ w_q @ w_k.T @ w_k) / 4))
    assert columns["ov_norm"] == near(math.sqrt(np.trace(w_v.T @ w_v @ w_o @ w_o.T)))
    eigenvalues = np.linalg.eigvals(w_v @ w_o)
    assert columns["ov_copying"] == pytest.approx(eigenvalues.real.sum() / np.abs(eigenvalues).sum(), abs=1e-9)


def test_weights_of_zeros_have_no_rank_and_no_shares():
    zeros = np.zeros((4, 2))
    columns = oracles.weights_columns(zeros, zeros, zeros, zeros.T)
    assert (columns["qk_norm"], columns["ov_spectral"]) == (0, 0)
    assert columns["qk_effective_rank"] is columns["ov_copying"] is columns["qk_symmetry"] is None


# --- inference -----------------------------------------------------------------------------------------------------


def test_one_sequence_per_document_gives_the_standard_error_of_the_mean():
    y = np.random.default_rng(50).standard_normal(30)
    estimate, error, effective = oracles.cluster_mean(y, np.full(30, 7.0), np.arange(30))
    assert estimate == near(y.mean())
    assert error == near(stats.sem(y))
    assert effective == near(30)


def test_the_cluster_error_of_equal_documents_is_the_sandwich_of_a_weighted_regression_on_a_constant():
    rng = np.random.default_rng(51)
    y, w, document = rng.standard_normal(40), np.tile(rng.uniform(1, 9, 5), 8), np.repeat(np.arange(8), 5)
    x, weight = np.ones((40, 1)), np.diag(w)
    bread = np.linalg.inv(x.T @ weight @ x)
    beta = bread @ x.T @ weight @ y
    same_document = (document[:, None] == document[None, :]).astype(float)
    residual = y - x @ beta
    meat = x.T @ weight @ (same_document * np.outer(residual, residual)) @ weight @ x
    estimate, error, effective = oracles.cluster_mean(y, w, document)
    assert estimate == near(beta[0])
    assert error == near(math.sqrt(8 / 7 * (bread @ meat @ bread)[0, 0]))
    assert effective == near(8)


def test_repeating_a_sequence_within_its_document_adds_no_information():
    y, w, document = np.array([1.0, 2, 4]), np.ones(3), np.arange(3)
    once = oracles.cluster_mean(y, w, document)
    assert oracles.cluster_mean(np.repeat(y, 5), np.repeat(w, 5), np.repeat(document, 5)) == near(once)


def test_one_document_has_an_estimate_and_no_error():
    assert oracles.cluster_mean([1, 3], [1, 3], [4, 4]) == (2.5, None, 1)
