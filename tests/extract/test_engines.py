"""Every engine gives the reference engine's numbers, and the reference engine those of a float64 call."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attlas.extract.engines import choose
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.profiles import PROFILE_COLUMNS
from attlas.extract.engines.quantities import ROW_QUANTITIES, TOKEN_CLASSES, known_quantities
from attlas.extract.engines.rows import AttentionCall, Rows, ScoredCall
from attlas.extract.engines.visibility import Axis, visibility_from_mask
from attlas.extract.tables import TABLES, needs_of
from tests.properties import cases


def call_of(
    seed: int,
    *,
    batch,
    heads,
    grouped,
    tokens,
    width,
    causal,
    size,
    mask="none",
    value_width=None,
    softcap=None,
    sinks=False,
    write=False,
) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)

    def normal(h: int, w: int) -> torch.Tensor:
        return torch.randn(batch, tokens, h, w, generator=generator).transpose(1, 2)

    key_heads = 1 if grouped else heads
    values = value_width or width
    query, key, value = normal(heads, width) * size, normal(key_heads, width), normal(key_heads, values)
    length = torch.randint(1, tokens + 1, (batch,), generator=generator)
    start = (torch.rand(batch, generator=generator) * (tokens - length + 1)).long()
    place = torch.arange(tokens)
    real = (place >= start[:, None]) & (place < (start + length)[:, None])
    among_real = real[:, None, None, :] & real[:, None, :, None]
    given = None
    if mask in ("holes", "bias"):
        given = (torch.rand(batch, 1, tokens, tokens, generator=generator) < 0.7) & among_real
        if mask == "bias":
            bias = torch.randn(batch, heads, tokens, tokens, generator=generator)
            given = bias.masked_fill(~given, torch.finfo(torch.float32).min)
    elif mask == "window":
        given = ((place[:, None] - place).abs() <= max(1, tokens // 5)) & among_real
    elif mask == "prefix":
        given = ((place <= place[:, None]) | (place < max(1, tokens // 3))) & among_real
    elif mask == "late":  # the first rows see nothing
        given = (place >= tokens // 2) & (place[:, None] >= tokens // 3) & among_real
    seen = visibility_from_mask(given, causal=causal, queries=Axis(start, length, tokens))
    ids = torch.randint(0, 5, (batch, tokens), generator=generator)
    return AttentionCall(
        query,
        key,
        value,
        seen,
        width**-0.5,
        softcap=softcap,
        sinks=torch.randn(heads, generator=generator) * size if sinks else None,
        write=torch.randn(heads, values, values, generator=generator).tril() if write else None,
        token_ids=ids,
    )


def doubled(call: AttentionCall) -> AttentionCall:
    exact = {name: None if t is None else t.double() for name in ("sinks", "write") for t in [getattr(call, name)]}
    return dataclasses.replace(
        call, query=call.query.double(), key=call.key.double(), value=call.value.double(), **exact
    )


def of_all_heads(grouped: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    return grouped.double().repeat_interleave(call.query.shape[1] // grouped.shape[1], 1)


def own_scores(call: AttentionCall) -> torch.Tensor:
    """Scores in float64 by their formula, with all that is added to them; −∞ where nothing is seen."""
    scores = call.query.double() @ of_all_heads(call.key, call).transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = (scores / call.softcap).tanh() * call.softcap
    if call.visibility.bias is not None:
        scores = scores + call.visibility.bias
    return scores.masked_fill(~call.visibility.seen(0, call.visibility.keys.tokens), -torch.inf)


def own_output(call: AttentionCall) -> torch.Tensor:
    """Attention in float64 by its formula, over real tokens; zero at padding and where nothing is seen."""
    scores, value = own_scores(call), of_all_heads(call.value, call)
    if call.sinks is not None:
        sinks = call.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1).nan_to_num(0) @ value


def assert_rows_agree(got: Rows, expected: Rows, *, absolute: float, relative: float) -> None:
    assert torch.equal(got.measured, expected.measured)
    assert got.quantities.keys() == expected.quantities.keys()
    for name, values in expected.quantities.items():
        if name.startswith(
            "keys_for_"
        ):  # a sum of weights that reaches the share by rounding alone is one key more or less
            assert ((got[name] - values).abs() <= 1).all(), name
            continue
        torch.testing.assert_close(
            got[name].double(), values.double(), atol=absolute, rtol=relative, msg=lambda m, n=name: f"{n}: {m}"
        )


ALL = frozenset(ROW_QUANTITIES)
HEAD_NAMES = needs_of({"heads": TABLES["heads"].facts}).head_names
CALLS = {
    "seed": st.integers(0, 2**31),
    "batch": st.integers(1, 3),
    "heads": st.sampled_from([1, 2, 4]),
    "grouped": st.booleans(),
    "tokens": st.integers(1, 40),
    "width": st.sampled_from([4, 8, 12, 16, 33, 64]),
    "causal": st.booleans(),
    "size": st.sampled_from([0.1, 1.0, 4.0]),
}
ALL_CALLS = CALLS | {
    "tokens": st.one_of(st.integers(1, 40), st.integers(41, 150)),
    "mask": st.sampled_from(["none", "holes", "bias", "window", "prefix", "late"]),
    "value_width": st.sampled_from([None, 8, 24, 40]),
    "softcap": st.sampled_from([None, None, 5.0]),
    "sinks": st.booleans(),
    "write": st.booleans(),
}


def agrees_with_float64(engine: str, facts: dict) -> None:
    call = call_of(**facts)
    exact = choose("reference").attend(doubled(call), lambda: own_output(call), ALL)[1]
    output, rows = choose(engine).attend(call, lambda: own_output(call).float(), ALL)
    # entropy of a row and its spread lose digits to float32 scores of this size; the columns' own tolerance is kept
    assert_rows_agree(rows, exact, absolute=2e-5 * max(1.0, facts["size"]), relative=1e-4)
    real = call.visibility.keys.real[:, None, :, None]
    torch.testing.assert_close(
        output.double() * real, own_output(call) * real, atol=1e-5 * max(1, facts["size"]), rtol=1e-4
    )


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@given(facts=st.fixed_dictionaries(ALL_CALLS))
@cases(1000, quick=100)
def test_every_engine_agrees_with_float64(engine, facts):
    agrees_with_float64(engine, facts)


def scored(call: AttentionCall) -> ScoredCall:
    """The call as a model makes it by hand: grouped heads side by side, scores masked and with all that is added to them."""
    scores, value = own_scores(call).float(), of_all_heads(call.value, call).float()
    seen = dataclasses.replace(call.visibility, bias=None)
    return ScoredCall(scores, value, seen, write=call.write, token_ids=call.token_ids)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@given(facts=st.fixed_dictionaries(ALL_CALLS | {"sinks": st.just(False)}))
@cases(400, quick=60)
def test_a_call_that_the_model_has_made_agrees_with_float64_and_is_left_as_it_is(engine, facts):
    call = call_of(**facts)
    exact = choose("reference").attend(doubled(call), lambda: own_output(call), ALL)[1]
    made, contexts = scored(call), own_output(call).float().nan_to_num(7.0)
    known = known_quantities(ALL, made.facts)
    assert ALL - known == {"query_norm", "key_norm"} | ALL - known_quantities(ALL, call.facts)
    exact = Rows(exact.measured, {name: exact[name] for name in known})
    before = made.scores.clone(), contexts.clone()
    rows = choose(engine).rows_of_scores(made, contexts, ALL)
    assert_rows_agree(rows, exact, absolute=2e-5 * max(1.0, facts["size"]), relative=1e-4)
    assert torch.equal(made.scores, before[0]) and torch.equal(contexts, before[1])


@given(facts=st.fixed_dictionaries(ALL_CALLS), classes=st.booleans())
@cases(300, quick=60)
def test_compiled_sums_are_those_of_plain_torch(facts, classes):
    call = call_of(**facts)
    _, rows = choose("cpu").attend(call, lambda: own_output(call).float(), ALL)
    known = torch.randint(
        0, len(TOKEN_CLASSES), call.query.shape[::2], generator=torch.Generator().manual_seed(facts["seed"])
    )
    observed = HeadObservation(rows, call.visibility, known if classes else None)
    got, expected = (choose(name).head_sums(observed, HEAD_NAMES, profiles=True) for name in ("cpu", "reference"))
    for name, a, b in zip(HEAD_NAMES, got.values, expected.values, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    off = (got.profiles - expected.profiles).abs()
    # a share that lies on the edge of a bin to the last digit of float32 may fall on either side
    histograms = torch.tensor([name in ("entropy", "max_weight") for name, _ in PROFILE_COLUMNS])
    assert off[..., ~histograms].max() < 1e-4
    assert off[..., histograms].max() <= 2 and off[..., histograms].sum() <= 8


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_from_the_scores_that_the_model_computes(engine, kind):
    call = call_of(11, batch=2, heads=4, grouped=True, tokens=50, width=16, causal=True, size=1.0)
    rounded = dataclasses.replace(call, query=call.query.to(kind), key=call.key.to(kind), value=call.value.to(kind))
    exact = choose("reference").attend(doubled(rounded), lambda: own_output(rounded), ALL)[1]
    output, rows = choose(engine).attend(rounded, lambda: own_output(rounded).to(kind), ALL)
    assert output.dtype == kind and rows["entropy"].dtype == torch.float32
    relative = torch.finfo(kind).eps  # the output is rounded to the model's type; context norms of `reference` with it
    assert_rows_agree(rows, exact, absolute=2e-5, relative=relative)


def test_rows_of_a_long_sequence_are_the_same_in_pieces():
    """Beyond some length a head is cut into pieces of rows, whose sums are added."""
    call = call_of(2, batch=1, heads=2, grouped=False, tokens=2500, width=8, causal=True, size=2.0, write=True)
    exact = choose("reference").attend(doubled(call), lambda: own_output(call), ALL)[1]
    _, rows = choose("cpu").attend(call, lambda: own_output(call).float(), ALL)
    assert_rows_agree(rows, exact, absolute=1e-4, relative=1e-4)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("size", [1e3, 1e4])
def test_very_large_scores_stay_finite_and_exact(engine, size):
    call = call_of(3, batch=2, heads=2, grouped=False, tokens=24, width=8, causal=False, size=size)
    rounded = call.query @ call.key.transpose(
        -1, -2
    )  # float32 scores carry an error of their own: compare what is robust
    output, rows = choose(engine).attend(call, lambda: own_output(call).float(), ALL)
    assert rounded.abs().max() > size
    assert all(
        t.isfinite().all()
        for t in (rows["entropy"], rows["score_max"], rows["score_variance"], rows["received"], output)
    )
    exact = choose("reference").attend(doubled(call), lambda: own_output(call), ALL)[1]
    torch.testing.assert_close(rows["score_max"].double(), exact["score_max"], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(rows["score_mean"].double(), exact["score_mean"], rtol=1e-4, atol=size * 1e-5)
    torch.testing.assert_close(rows["score_variance"].double(), exact["score_variance"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_rows_with_non_finite_scores_are_left_out_and_counted(engine, poison):
    call = call_of(5, batch=1, heads=2, grouped=False, tokens=12, width=8, causal=False, size=1.0)
    first = int(call.visibility.keys.start[0])
    call.query[0, 1, first] = poison
    marker = torch.full_like(call.value, 7.0)
    output, rows = choose(engine).attend(call, lambda: marker, ALL)
    assert not rows.measured[0, 1, first]
    assert rows.measured.sum() == 2 * int(call.visibility.keys.length[0]) - 1
    assert output is marker
    assert all(values.isfinite().all() for values in rows.quantities.values())
    torch.testing.assert_close(rows["received"].sum(-1), rows.measured.sum(-1).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_narrow_pattern_far_away_keeps_its_spread(engine):
    tokens = 3000
    query = torch.ones(1, 1, tokens, 4)
    key = torch.full((1, 1, tokens, 4), -30.0)
    key[0, 0, :2] = 0.0
    zeros = torch.zeros(1, dtype=torch.int64)
    seen = visibility_from_mask(None, causal=False, queries=Axis(zeros, zeros + tokens, tokens))
    _, rows = choose(engine).attend(
        AttentionCall(query, key, torch.ones(1, 1, tokens, 4), seen, 1.0), lambda: query, ALL
    )
    torch.testing.assert_close(rows["offset_std"], torch.full_like(rows["offset_std"], 0.5), atol=1e-5, rtol=1e-5)


def test_a_prefix_that_sees_itself_whole_is_not_taken_for_causal():
    """Everything causal is visible and something more besides: dropping the mask would measure another pattern."""
    tokens = 6
    zeros = torch.zeros(1, dtype=torch.int64)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask[:3, :3] = True
    seen = visibility_from_mask(mask, causal=False, queries=Axis(zeros, zeros + tokens, tokens))
    assert torch.equal(seen.seen(0, tokens)[0, 0], mask)
    assert seen.visible[0, 0].tolist() == mask.sum(-1).tolist()


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_that_says_no_more_than_padding_and_causality_is_dropped(causal):
    start, length = torch.tensor([0, 2]), torch.tensor([5, 3])
    place = torch.arange(5)
    real = (place >= start[:, None]) & (place < (start + length)[:, None])
    mask = real[:, None, None, :] & (place[None, :] <= place[:, None] if causal else torch.ones(5, 5, dtype=torch.bool))
    seen = visibility_from_mask(mask, causal=False, queries=Axis(start, length, 5))
    assert seen.allowed is None
    assert torch.equal(seen.seen(0, 5), mask & real[:, None, :, None])
