"""Attention calls of every kind on the device, and what they should give, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attlas.extract.engines import Engine, choose, reference, sums
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.profiles import PROFILE_COLUMNS
from attlas.extract.engines.quantities import TOKEN_CLASSES
from attlas.extract.engines.rows import AttentionCall, Rows
from attlas.extract.engines.visibility import Axis, visibility_from_mask
from attlas.extract.tables import measured_columns, needs_of
from tests.gpu.machine import DEVICE, IS_REHEARSAL

NEEDS = needs_of(measured_columns())
CORE = NEEDS.row_quantities
# of the output, which is rounded to the model's type
_OF_OUTPUT = ("context_norm", "output_norm")
# in tokens: rounding is relative to the longest distance
_IN_TOKENS = ("distance", "offset", "offset_std")
_ROWS_AT_ONCE = 1 << 26  # pairs of a float64 block of the oracle: 512 MiB


@dataclass(frozen=True)
class Case:
    """An attention call, by its properties. `padding` shortens every sequence but the first."""

    tokens: int
    dtype: str = "float32"
    width: int = 64
    value_width: int | None = None
    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    padding: str = "none"
    causal: bool = False
    mask: str = "none"
    softcap: float | None = None
    sinks: bool = False
    size: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        named = {name: value for name, value in vars(self).items() if value != getattr(Case, name, None)}
        return ", ".join(f"{name} {value}" for name, value in named.items())


def call_of(case: Case) -> AttentionCall:
    """The call, laid out as models lay theirs out: the heads of a token side by side."""
    generator = torch.Generator().manual_seed(case.seed + case.tokens)
    dtype = getattr(torch, case.dtype)

    def normal(heads: int, width: int, size: float = 1.0) -> Tensor:
        states = torch.randn(case.batch, case.tokens, heads, width, generator=generator) * size
        return states.to(DEVICE, dtype).transpose(1, 2)

    values = case.value_width or case.width
    query, key = normal(case.heads, case.width, case.size), normal(case.key_heads, case.width)
    axis = _axis(case)
    return AttentionCall(
        query,
        key,
        normal(case.key_heads, values),
        visibility_from_mask(_mask(case, axis, generator), causal=case.causal, queries=axis),
        case.width**-0.5,
        softcap=case.softcap,
        sinks=torch.randn(case.heads, generator=generator).to(DEVICE, dtype) if case.sinks else None,
        write=torch.randn(case.heads, values, values, generator=generator).tril().to(DEVICE),
        token_ids=torch.randint(0, 50, (case.batch, case.tokens), generator=generator).to(DEVICE),
    )


def _axis(case: Case) -> Axis:
    length = torch.full((case.batch,), case.tokens)
    if case.padding != "none":
        length[1:] = torch.arange(1, case.batch) * case.tokens // case.batch
    start = case.tokens - length if case.padding == "left" else torch.zeros_like(length)
    return Axis(start.to(DEVICE), length.to(DEVICE), case.tokens)


def _mask(case: Case, axis: Axis, generator: torch.Generator) -> Tensor | None:
    """The mask that a model would give to scaled_dot_product_attention, besides causality."""
    place = torch.arange(case.tokens, device=DEVICE)
    real = (axis.real[:, None, :] & axis.real[:, :, None])[:, None]
    if case.mask == "window":
        return ((place[:, None] - place).abs() <= max(1, case.tokens // 5)) & real
    if case.mask == "late":  # the first rows see nothing
        return (place >= case.tokens // 2) & (place[:, None] >= case.tokens // 3) & real
    if case.mask in ("holes", "bias"):
        drawn = torch.rand(case.batch, 1, case.tokens, case.tokens, generator=generator).to(DEVICE)
        seen = (drawn < 0.7) & real
        if case.mask == "holes":
            return seen
        dtype = getattr(torch, case.dtype)
        bias = torch.randn(case.batch, case.heads, case.tokens, case.tokens, generator=generator).to(DEVICE, dtype)
        return bias.masked_fill(~seen, torch.finfo(dtype).min)
    assert case.mask == "none", case.mask
    return None


def engine_under_test() -> Engine:
    """The fastest engine for the device; in a rehearsal the Triton engine in its interpreter."""
    if not IS_REHEARSAL:
        return choose("auto", device=DEVICE)
    from attlas.extract import engines

    return engines._ENGINES["triton"]()


def in_float64(call: AttentionCall) -> AttentionCall:
    """The call with the same numbers in float64."""
    names = ("query", "key", "value", "sinks", "write")
    return replace(call, **{n: None if (t := getattr(call, n)) is None else t.double() for n in names})


def exact_rows(call: AttentionCall, output: Tensor) -> Rows:
    """The core row quantities by the reference engine in float64."""
    exact = in_float64(call)
    return reference.rows_of(exact, output, known(exact))


def known(call: AttentionCall) -> frozenset[str]:
    """The core row quantities for which the call has what they need."""
    from attlas.extract.engines.quantities import known_quantities

    return known_quantities(CORE, call.facts)


def exact_output(call: AttentionCall) -> Tensor:
    """The output by its formula in float64; zero at padding and where nothing is seen."""
    exact = in_float64(call)
    groups = call.query.shape[1] // call.key.shape[1]
    output = exact.query.new_zeros(*call.query.shape[:3], call.value.shape[-1])
    for head in range(call.query.shape[1]):
        for rows, scores in _scores(exact, head, exact.key[:, head // groups]):
            if exact.sinks is not None:
                sink = exact.sinks[head].expand(*scores.shape[:-1], 1)
                pattern = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
            else:
                pattern = scores.softmax(-1)
            output[:, head, rows] = pattern.nan_to_num(0) @ exact.value[:, head // groups]
    return output


def _scores(call: AttentionCall, head: int, key: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of a head's scores, −∞ where nothing is seen."""
    tokens, seen = call.query.shape[2], call.visibility
    size = max(1, _ROWS_AT_ONCE // (len(key) * tokens))
    for first in range(0, tokens, size):
        rows = slice(first, min(first + size, tokens))
        scores = call.query[:, head, rows] @ key.transpose(-1, -2) * call.scale
        if call.softcap is not None:
            scores = (scores / call.softcap).tanh() * call.softcap
        if seen.bias is not None:
            scores = scores + _of_head(seen.bias, head)[:, rows].double()
        yield rows, scores.masked_fill(~_of_head(seen.seen(rows.start, rows.stop), head), -torch.inf)


def _of_head(tensor: Tensor, head: int) -> Tensor:
    return tensor[:, head if tensor.shape[1] > 1 else 0]


def assert_rows_agree(got: Rows, expected: Rows, case: Case) -> None:
    """Scores are products in the model's type summed in float32, so rows keep float32's digits in every type.

    What comes from the output has the rounding of the model's type. Distances have that of float32 at the sequence's length.
    """
    assert torch.equal(got.measured, expected.measured)
    assert got.quantities.keys() == expected.quantities.keys()
    rounding = output_rounding(case)
    wrong = []
    for name, values in expected.quantities.items():
        absolute, relative = 2e-5 * max(1.0, case.size), 1e-4
        if name in _OF_OUTPUT:
            absolute, relative = max(absolute, rounding), max(relative, rounding)
        if name in _IN_TOKENS:
            absolute += 1e-6 * case.tokens
        off = (got[name].double() - values.double()).abs() - relative * values.double().abs()
        if not off.max() <= absolute:  # NaN is wrong as well
            worst = tuple(int(n) for n in torch.unravel_index(off.nan_to_num(torch.inf).argmax(), off.shape))
            wrong.append(f"{name}{[*worst]} is {got[name][worst].item():.9g}, not {values[worst].item():.9g}")
    assert not wrong, f"{case}: {'; '.join(wrong)}"


def classes_of(call: AttentionCall) -> Tensor:
    """A class for each key."""
    assert call.token_ids is not None
    return call.token_ids % len(TOKEN_CLASSES)


def assert_sums_agree(rows: Rows, exact: Rows, call: AttentionCall, case: Case) -> None:
    """The engine's sums over its rows are those of torch over the exact rows, each within what its rows may differ."""
    classes = classes_of(call)
    got = engine_under_test().head_sums(
        HeadObservation(rows, call.visibility, classes), NEEDS.head_names, profiles=NEEDS.profiles
    )
    expected = sums.head_sums(
        HeadObservation(exact, call.visibility, classes), NEEDS.head_names, profiles=NEEDS.profiles
    )
    relative = max(2e-4, output_rounding(case))
    absolute = (1e-4 * max(1.0, case.size) ** 2 + relative) * case.tokens  # of as many rows, some of them of squares
    wrong = []
    for name, values, others in zip(NEEDS.head_names, got.values, expected.values, strict=True):
        off = (values - others).abs() - relative * others.abs()
        if not torch.equal(values.isnan(), others.isnan()) or off.nan_to_num(0).max() > absolute:
            worst = off.nan_to_num(0).argmax()
            wrong.append(f"{name} is {values.flatten()[worst].item():.9g}, not {others.flatten()[worst].item():.9g}")
    if got.profiles is not None and expected.profiles is not None:
        # a share on the edge of a bin may be counted on either side
        is_histogram = torch.tensor([name in ("entropy", "max_weight") for name, _ in PROFILE_COLUMNS], device=DEVICE)
        profiles, others = (made.double().sum(0) for made in (got.profiles, expected.profiles))
        off = (profiles - others).abs()
        if off[..., ~is_histogram].max() > absolute + relative * others[..., ~is_histogram].max():
            wrong.append(f"profiles are off by {off[..., ~is_histogram].max().item():.3g}")
        if off[..., is_histogram].sum() > 4 + 0.01 * others[..., is_histogram].sum():
            wrong.append(f"{off[..., is_histogram].sum().item():.0f} rows are in other bins")
    assert not wrong, f"{case}: sums: {'; '.join(wrong)}"


def assert_chosen_rows_agree(
    rows: Rows, call: AttentionCall, exact: AttentionCall, measured: Tensor, *, absolute: float
) -> None:
    """Some rows of the pattern, and entropies of mixtures of two heads, of all sequences of a call, the last, and the others.

    exact: the call in float64. measured: which of its rows are.
    """
    from attlas.extract.engines.chosen_rows import chosen_rows

    places = torch.arange(len(call.query), device=call.query.device)
    for sequences in (None, places[-1:], places[:-1]):
        if sequences is not None and not len(sequences):
            continue
        got = rows.chosen_rows(call, sequences, 16)
        assert got is not None, "made by the kernels"
        some = slice(None) if sequences is None else sequences
        expected = chosen_rows(exact if sequences is None else exact.of_sequences(sequences), measured[some], 16)
        assert torch.equal(got.measured, expected.measured)
        torch.testing.assert_close(got.patterns, expected.patterns, atol=absolute, rtol=1e-4)
        torch.testing.assert_close(got.mixed, expected.mixed, atol=absolute, rtol=1e-4)


def output_rounding(case: Case) -> float:
    """Two roundings to the model's type: of the weights and of the output; none in float32."""
    return 0.0 if case.dtype == "float32" else 2 * torch.finfo(getattr(torch, case.dtype)).eps


def assert_agrees(case: Case) -> None:
    """The engine's output and rows are those of float64, also where some rows are not measured."""
    call = call_of(case)
    output = exact_output(call)
    exact = exact_rows(call, output)
    original = output.where(exact.measured[..., None], 7.0).to(call.query.dtype)
    got, rows = engine_under_test().attend(call, lambda: original, known(call))
    assert got.dtype == call.query.dtype
    assert_rows_agree(rows, exact, case)
    real = call.visibility.queries.real[:, None, :, None]
    assert_sums_agree(rows, exact, call, case)
    within = 2e-5 * max(1.0, case.size)
    assert_chosen_rows_agree(rows, call, in_float64(call), exact.measured, absolute=within)
    rounding = output_rounding(case)
    torch.testing.assert_close(
        got.double() * real,
        original.double() * real,
        atol=max(2e-5 * max(1.0, case.size), rounding),
        rtol=max(1e-4, rounding),
        msg=lambda m: f"{case}: output: {m}",
    )
