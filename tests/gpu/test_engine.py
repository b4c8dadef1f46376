"""The engine of the GPU gives the numbers of a float64 call, in every type, width, mask and length, and the same bytes again."""

import pytest
import torch

from tests.gpu.calls import Case, assert_agrees, call_of, engine_under_test, exact_output, exact_rows, known
from tests.gpu.machine import IS_REHEARSAL

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

FULL, HALF, BRAIN = "float32", "float16", "bfloat16"
# 16-bit types share tiles: float16 is tried at the widths that differ in them
WIDTHS = [
    *((dtype, width) for dtype in (FULL, BRAIN) for width in (16, 24, 32, 64, 80, 96, 128, 192, 256)),
    *((HALF, width) for width in (32, 64, 128, 256)),
]
FEATURES = {
    "holes": dict(mask="holes", padding="right"),
    "holes-left": dict(mask="holes", padding="left", causal=True),
    "bias": dict(mask="bias", padding="right"),
    "window": dict(mask="window", padding="right"),
    "window-causal": dict(mask="window", causal=True),
    "soft-cap": dict(softcap=5.0, size=3.0, causal=True),
    "sinks": dict(sinks=True, size=2.0, causal=True, padding="right"),
    "fully-masked": dict(mask="late"),
    "wide-values": dict(value_width=128, padding="left"),
    "large-scores": dict(size=8.0),
    "one-key-head": dict(key_heads=1, heads=8, causal=True),
    "everything": dict(mask="bias", softcap=20.0, sinks=True, causal=True, padding="left"),
}
SHORT = (
    (1, 2, 3)
    if IS_REHEARSAL
    else (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 1000)
)
LONG = (140,) if IS_REHEARSAL else (2048, 4095, 8192, 16_384)
# within one tile, and beyond
BRIEF, TOKENS = (18, 130) if IS_REHEARSAL else (100, 197)


@pytest.mark.parametrize("dtype", [FULL, BRAIN])
@pytest.mark.parametrize("tokens", [TOKENS, BRIEF])
@pytest.mark.parametrize("feature", FEATURES)
def test_every_kind_of_call_agrees_with_float64(feature: str, tokens: int, dtype: str) -> None:
    assert_agrees(Case(tokens, dtype=dtype, **FEATURES[feature]))


def test_everything_at_once_agrees_in_float16() -> None:
    assert_agrees(Case(TOKENS, dtype=HALF, **FEATURES["everything"]))


@pytest.mark.parametrize("dtype", [FULL, BRAIN])
def test_every_short_length_agrees_with_float64(dtype: str) -> None:
    for tokens in SHORT:
        for causal in (False, True):
            assert_agrees(Case(tokens, dtype=dtype, causal=causal, padding="right" if tokens > 2 else "none"))


@pytest.mark.parametrize("dtype", [FULL, BRAIN])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", LONG)
def test_long_sequences_agree_with_float64(tokens: int, causal: bool, dtype: str) -> None:
    assert_agrees(Case(tokens, dtype=dtype, causal=causal, batch=1, heads=2, key_heads=1, size=2.0))


@pytest.mark.parametrize("dtype", [FULL, BRAIN])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_rows_with_non_finite_scores_are_left_out_and_counted(poison: float, dtype: str) -> None:
    case = Case(TOKENS, dtype=dtype, padding="right")
    call = call_of(case)
    call.query[0, 1, 5] = poison
    expected = exact_rows(call, exact_output(call))
    original = torch.full_like(call.value, 7.0).repeat_interleave(2, 1)
    output, rows = engine_under_test().attend(call, lambda: original, known(call))
    assert torch.equal(rows.measured, expected.measured)
    assert not rows.measured[0, 1, 5]
    assert rows.measured.sum() == case.heads * call.visibility.keys.length.sum() - 1
    assert (output[0, 1, 5] == 7).all()
    for name, values in rows.quantities.items():
        assert values.isfinite().all(), name
    torch.testing.assert_close(rows["received"].sum(-1), rows.measured.sum(-1).float(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [FULL, BRAIN])
def test_what_stands_at_padding_does_not_matter(dtype: str) -> None:
    clean, soiled = (call_of(Case(TOKENS, dtype=dtype, padding="left")) for _ in range(2))
    padding = ~clean.visibility.keys.real
    for tensor in (soiled.query, soiled.key, soiled.value):
        tensor.transpose(1, 2)[padding] = torch.nan
    wanted = known(clean) - {"value_norm"}
    results = [engine_under_test().attend(call, lambda: clean.query, wanted) for call in (clean, soiled)]
    (output, rows), (other_output, others) = results
    real = clean.visibility.keys.real[:, None, :, None].expand_as(output)
    assert torch.equal(output[real], other_output[real])
    for name in wanted:
        assert torch.equal(rows[name], others[name]), name


@pytest.mark.parametrize("dtype", [FULL, BRAIN])
@pytest.mark.parametrize("tokens", [BRIEF, TOKENS, LONG[-1]])
def test_the_same_call_gives_the_same_bytes(tokens: int, dtype: str) -> None:
    call = call_of(Case(tokens, dtype=dtype, causal=True, padding="right"))
    first = _attend(call)
    for _ in range(4):
        output, rows = _attend(call)
        assert torch.equal(output, first[0])
        for name, values in rows.quantities.items():
            assert torch.equal(values, first[1][name]), name


# last, because each width is compiled anew
@pytest.mark.parametrize(("dtype", "width"), WIDTHS)
def test_every_width_agrees_with_float64(dtype: str, width: int) -> None:
    for causal in (False, True):
        assert_agrees(Case(TOKENS, dtype=dtype, width=width, causal=causal, padding="right" if causal else "left"))


@pytest.mark.parametrize(("dtype", "width"), [of for of in WIDTHS if of[1] in (24, 32, 64, 128, 256)])
def test_every_width_agrees_in_short_sequences(dtype: str, width: int) -> None:
    for causal in (False, True):
        assert_agrees(Case(BRIEF, dtype=dtype, width=width, causal=causal, padding="right" if causal else "left"))


def _attend(call):
    def refused() -> torch.Tensor:
        raise AssertionError("every row is measured: the engine's output stands")

    return engine_under_test().attend(call, refused, known(call))
