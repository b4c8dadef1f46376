"""The Triton engine's kernels: their numbers in Triton's interpreter, their resources in its compiler; no GPU needed.

Run as a program this module compiles: the interpreter, chosen when a kernel is defined, is chosen for a whole process.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attlas.extract.engines import Engine, FusedPass, reference
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.profiles import LARGEST_DOUBLING_BIN
from attlas.extract.engines.quantities import ROW_QUANTITIES, TOKEN_CLASSES, known_quantities
from attlas.extract.engines.rows import AttentionCall, Rows
from attlas.extract.engines.sums import HEAD_QUANTITIES, head_sums
from attlas.extract.engines.visibility import Axis, visibility_from_mask
from tests.extract.models import tiny
from tests.extract.test_engines import assert_rows_agree, call_of, doubled, own_output
from tests.gpu.calls import assert_chosen_rows_agree
from tests.properties import cases

pytest.importorskip("triton")
from attlas.extract.engines import triton as engine
from attlas.extract.engines.triton import summing

# NumPy, in which the interpreter computes, says so when infinities and NaN are made; a kernel takes them in its stride
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

ROOT = Path(__file__).parents[2]
# several tiles each way within few tokens; all products whole, or all in parts
SMALL = engine.Blocks(16, 16, chunk=64, part=64, warps=4, stages=1, tile=16, tile_warps=4, tile_stages=1, short=0)
PARTS = engine.Blocks(32, 16, chunk=16, part=16, warps=4, stages=1, tile=16, tile_warps=4, tile_stages=1, short=0)
WHOLE = SMALL._replace(short=64)
FITTED = [SMALL, PARTS, WHOLE, engine._BLOCKS[4, 32]]


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot

    def product(self: Any, left: Any, right: Any, *others: Any) -> Any:
        """The interpreter would multiply the bits of bfloat16 (triton-lang/triton#11584)."""
        left, right = (self.cast_impl(t, float32) if t.dtype == bfloat16 else t for t in (left, right))
        return plain(self, left, right, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", product)
        yield


def formula(call: AttentionCall) -> torch.Tensor:
    """The output in float64, with sinks and soft-cap."""
    exact = doubled(call)
    key, value = (t.repeat_interleave(call.query.shape[1] // t.shape[1], 1) for t in (exact.key, exact.value))
    scores = exact.query @ key.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = (scores / call.softcap).tanh() * call.softcap
    scores = scores.masked_fill(~call.visibility.seen(0, call.visibility.keys.tokens), -torch.inf)
    if call.sinks is not None:
        sink = call.sinks.double()[None, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1).nan_to_num(0) @ value


def whole_call(*, tokens: int, heads: int = 2, width: int = 16, size: float = 1.0, mask=None, causal=False, **others):
    """A call over one sequence without padding."""
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (torch.randn(1, heads, tokens, width, generator=generator) for _ in range(3))
    zeros = torch.zeros(1, dtype=torch.int64)
    seen = visibility_from_mask(mask, causal=causal, queries=Axis(zeros, zeros + tokens, tokens))
    return AttentionCall(query * size, key, value, seen, width**-0.5, **others)


def in_type(call: AttentionCall, dtype: torch.dtype) -> AttentionCall:
    return dataclasses.replace(call, query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))


def assert_agrees(call: AttentionCall, blocks=SMALL, *, absolute: float = 2e-5, relative: float = 1e-4) -> Rows:
    expected = formula(call) if call.visibility.bias is None else own_output(call)
    output, rows = attend_in_blocks(call, _not_called, blocks)
    assert_rows_agree(rows, exact_rows(doubled(call), expected), absolute=absolute, relative=relative)
    torch.testing.assert_close(output.double(), expected, atol=absolute, rtol=relative)
    return rows


def exact_rows(call: AttentionCall, output: torch.Tensor) -> Rows:
    return reference.rows_of(call, output, known_quantities(ROW_QUANTITIES, call.facts))


def attend_in_blocks(call: AttentionCall, call_original, blocks) -> tuple[torch.Tensor, Rows]:
    """By the kernels with tiles of these sizes; what they do not make, by the reference engine."""
    made = FusedPass(engine.MAKES, lambda call: True, lambda c, original: engine.attend_in_blocks(c, original, blocks))
    return Engine("triton", made, head_sums).attend(call, call_original, frozenset(ROW_QUANTITIES))


def attend(call: AttentionCall, call_original) -> tuple[torch.Tensor, Rows]:
    made = FusedPass(engine.MAKES, engine.takes, engine.attend)
    return Engine("triton", made, head_sums).attend(call, call_original, frozenset(ROW_QUANTITIES))


_FUSED = FusedPass(engine.MAKES, engine.takes, engine.attend)


def _not_called() -> torch.Tensor:
    raise AssertionError("every row is measured: the kernel's output stands")


@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 2),
    heads=st.sampled_from([1, 2]),
    grouped=st.booleans(),
    tokens=st.integers(1, 40),
    width=st.sampled_from([16, 24, 33, 40]),
    causal=st.booleans(),
    size=st.sampled_from([0.1, 1.0, 4.0]),
    mask=st.sampled_from(["none", "holes", "bias"]),
    blocks=st.sampled_from(FITTED),
)
@cases(50, quick=12)
def test_the_kernels_agree_with_float64(blocks, **facts):
    call = call_of(**facts)
    exact = exact_rows(doubled(call), own_output(call))
    output, rows = attend_in_blocks(call, lambda: own_output(call).float(), blocks)
    absolute = 2e-5 * max(1.0, facts["size"])  # as every engine is held to
    assert_rows_agree(rows, exact, absolute=absolute, relative=1e-4)
    real = call.visibility.keys.real[:, None, :, None]
    torch.testing.assert_close(output.double() * real, own_output(call) * real, atol=absolute, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype):
    call = in_type(whole_call(tokens=40, heads=4, causal=True, token_ids=torch.arange(40)[None] % 7), dtype)
    output, rows = attend_in_blocks(call, _not_called, SMALL)
    exact = exact_rows(doubled(call), formula(call))
    # weights go to the product with values in the model's type, all else stays in float32
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(rows["context_norm"].double(), exact["context_norm"], atol=epsilon, rtol=epsilon)
    torch.testing.assert_close(output.double(), formula(call), atol=2 * epsilon, rtol=2 * epsilon)
    rows = rows.with_quantities({"context_norm": exact["context_norm"]})
    assert_rows_agree(rows, exact, absolute=2e-5, relative=1e-4)
    assert output.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_a_call_in_tiles_of_the_real_size_agrees(causal):
    call = whole_call(tokens=150, heads=1, width=24, causal=causal, token_ids=torch.arange(150)[None] % 11)
    output, rows = attend(call, _not_called)
    assert_rows_agree(rows, exact_rows(doubled(call), formula(call)), absolute=2e-5, relative=1e-4)
    torch.testing.assert_close(output.double(), formula(call), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_sliding_window_agrees():
    place = torch.arange(70)
    assert_agrees(whole_call(tokens=70, mask=(place[:, None] - place).abs() < 9))


@pytest.mark.slow
def test_a_prefix_agrees():
    place = torch.arange(50)
    assert_agrees(whole_call(tokens=50, mask=(place[None, :] <= place[:, None]) | (place < 20)))


def test_a_soft_cap_agrees():
    assert_agrees(whole_call(tokens=40, size=6.0, softcap=5.0), absolute=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("logit", [-200.0, 0.5, 200.0])
def test_sinks_agree(logit):
    """Far below every score a sink is nothing, far above it takes all."""
    assert_agrees(whole_call(tokens=40, size=3.0, causal=True, sinks=torch.tensor([logit, 1.0])), absolute=5e-5)


@pytest.mark.slow
def test_updates_of_heads_agree():
    write = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).tril()
    rows = assert_agrees(whole_call(tokens=24, write=write))
    assert "output_norm" in rows and "value_norm" in rows


def test_values_of_another_width_agree():
    call = whole_call(tokens=24)
    assert_agrees(dataclasses.replace(call, value=torch.cat([call.value, call.value + 1, call.value - 1], -1)), PARTS)


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_very_large_scores_stay_finite_and_exact(size):
    call = whole_call(tokens=24, size=size)
    output, rows = attend_in_blocks(call, _not_called, SMALL)
    assert all(
        t.isfinite().all()
        for t in (rows["entropy"], rows["score_max"], rows["score_variance"], rows["received"], output)
    )
    assert rows["max_weight"].max() <= 1
    exact = exact_rows(doubled(call), formula(call))
    # float32 scores carry an error of their own: what is robust against it is compared
    torch.testing.assert_close(rows["score_max"].double(), exact["score_max"], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(rows["score_mean"].double(), exact["score_mean"], rtol=1e-4, atol=size * 1e-5)
    torch.testing.assert_close(rows["score_variance"].double(), exact["score_variance"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(rows["received"].sum(-1), torch.full((1, 2), 24.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_rows_with_non_finite_scores_are_left_out_and_counted(poison):
    call = call_of(5, batch=1, heads=2, grouped=False, tokens=24, width=16, causal=False, size=1.0)
    first = int(call.visibility.keys.start[0])
    call.query[0, 1, first] = poison
    marker = torch.full_like(call.value, 7.0)
    output, rows = attend_in_blocks(call, lambda: marker, SMALL)
    assert not rows.measured[0, 1, first]
    assert rows.measured.sum() == 2 * int(call.visibility.keys.length[0]) - 1
    assert output is marker
    assert all(values.isfinite().all() for values in rows.quantities.values())
    of_row = [name for name in rows.quantities if ROW_QUANTITIES[name].axis == "query"]
    assert all(rows[name][0, 1, first] == 0 for name in of_row)
    for sums in (rows["received"], rows["offset_bins"]):
        torch.testing.assert_close(sums.sum(-1), rows.measured.sum(-1).float(), atol=1e-5, rtol=1e-5)


def test_rows_that_see_nothing_are_left_out():
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[[3, 18]] = False
    call = whole_call(tokens=20, mask=mask)
    output, rows = attend_in_blocks(call, lambda: call.value, SMALL)
    assert output is call.value
    assert torch.equal(rows.measured, mask.any(-1).expand(1, 2, 20))
    assert_rows_agree(rows, exact_rows(doubled(call), formula(call)), absolute=2e-5, relative=1e-4)


@pytest.mark.slow
def test_what_stands_at_padding_does_not_matter():
    facts: dict[str, Any] = dict(batch=3, heads=2, grouped=False, tokens=24, width=16, causal=False, size=1.0)
    clean, soiled = call_of(7, **facts), call_of(7, **facts)
    padding = ~clean.visibility.keys.real
    assert padding.any()
    for tensor in (soiled.query, soiled.key, soiled.value):
        tensor.transpose(1, 2)[padding] = torch.nan
    (output, rows), (other_output, others) = (attend_in_blocks(call, _not_called, SMALL) for call in (clean, soiled))
    assert_same(rows, others)
    assert torch.equal(output, other_output)
    assert (output.transpose(1, 2)[padding] == 0).all()


def test_tiles_that_no_row_sees_are_not_visited():
    """A weight of zero times NaN is NaN: what was read would show."""
    call = whole_call(tokens=64, causal=True)
    call.value[:, :, 48:] = torch.nan
    output, _ = attend_in_blocks(call, _not_called, SMALL)
    assert output[:, :, :48].isfinite().all()
    assert output[:, :, 48:].isnan().all()


@pytest.mark.parametrize("first", [0, 63])
def test_a_narrow_pattern_far_away_keeps_its_spread(first):
    """Within a tile and across the edge of two."""
    tokens = 300
    call = whole_call(tokens=tokens, heads=1)
    key = torch.full_like(call.key, -30.0)
    key[0, 0, first : first + 2] = 0.0
    call = dataclasses.replace(call, query=torch.ones_like(call.query), key=key, scale=1.0)
    blocks = engine.Blocks(64, 64, chunk=16, part=16, warps=4, stages=1, tile=64, tile_warps=4, tile_stages=1, short=0)
    _, rows = attend_in_blocks(call, _not_called, blocks)
    torch.testing.assert_close(rows["offset_std"], torch.full_like(rows["offset_std"], 0.5), atol=1e-5, rtol=1e-5)


def test_a_single_token_sees_itself():
    rows = assert_agrees(whole_call(tokens=1, token_ids=torch.zeros(1, 1, dtype=torch.int64)))
    assert rows["offset_bins"].sum(-1).tolist() == [[1.0, 1.0]]
    assert rows["offset_bins"][..., LARGEST_DOUBLING_BIN].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("blocks", [SMALL, WHOLE])
@pytest.mark.parametrize(
    "facts",
    [
        dict(tokens=40, causal=True, mask="none"),
        dict(tokens=18, causal=False, mask="holes"),
        dict(tokens=23, causal=False, mask="bias"),
        dict(tokens=9, causal=False, mask="none"),
    ],
    ids=str,
)
def test_chosen_rows_and_mixtures_of_heads_agree_with_float64(facts, blocks):
    """Of sequences with fewer rows than are chosen, too, and of some sequences of a call."""
    call = call_of(11, batch=3, heads=4, grouped=True, width=24, size=3.0, **facts)
    exact = exact_rows(doubled(call), own_output(call))
    _, rows = attend_in_blocks(call, lambda: own_output(call).float(), blocks)
    assert_chosen_rows_agree(rows, call, doubled(call), exact.measured, absolute=6e-5)


def test_a_learned_sink_is_the_last_key_of_chosen_rows():
    call = whole_call(tokens=40, heads=3, size=3.0, causal=True, softcap=4.0, sinks=torch.tensor([-200.0, 1.0, 200.0]))
    _, rows = attend_in_blocks(call, _not_called, SMALL)
    assert_chosen_rows_agree(rows, call, doubled(call), rows.measured, absolute=6e-5)
    made = rows.chosen_rows(call, None, 5)
    assert made is not None
    patterns = made.patterns
    assert patterns.shape == (1, 3, 5, 41)
    torch.testing.assert_close(patterns.sum(-1), torch.ones(1, 3, 5))
    assert (patterns[0, 2, :, -1] == 1).all()


HEAD_NAMES = tuple(sorted({*HEAD_QUANTITIES, *(name for name, row in ROW_QUANTITIES.items() if row.merge)}))


def assert_sums_agree(call: AttentionCall, blocks=SMALL) -> None:
    """Head sums and profiles of the kernels' rows are those of float64 rows in plain torch."""
    classes = torch.arange(call.query.shape[2]).expand(call.query.shape[::2]) % len(TOKEN_CLASSES)
    _, rows = attend_in_blocks(call, _not_called, blocks)
    got = engine.head_sums(HeadObservation(rows, call.visibility, classes), HEAD_NAMES, profiles=True)
    exact = exact_rows(doubled(call), formula(call))
    expected = head_sums(HeadObservation(exact, call.visibility, classes), HEAD_NAMES, profiles=True)
    for name, values, others in zip(HEAD_NAMES, got.values, expected.values, strict=True):
        torch.testing.assert_close(
            values, others, atol=2e-4, rtol=1e-4, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert got.profiles is not None and expected.profiles is not None
    off = (got.profiles.double().sum(0) - expected.profiles.sum(0)).abs()
    assert off.max() < 1e-3


@pytest.mark.parametrize("rows_of_part", [None, 32])
@pytest.mark.parametrize(
    ("tokens", "causal", "blocks"), [(1, False, SMALL), (2, True, WHOLE), (40, False, WHOLE), (70, True, SMALL)]
)
def test_head_sums_agree(tokens, causal, blocks, rows_of_part, monkeypatch):
    """Of a head whole, and in parts."""
    if rows_of_part is not None:
        monkeypatch.setattr(summing, "_parts", lambda _heads, n: (-(-n // rows_of_part), rows_of_part))
    write = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).tril()
    assert_sums_agree(
        whole_call(tokens=tokens, causal=causal, write=write, token_ids=torch.arange(tokens)[None] % 7), blocks
    )


@pytest.mark.parametrize("rows_of_part", [None, 16])
def test_head_sums_of_padded_sequences_agree(rows_of_part, monkeypatch):
    if rows_of_part is not None:
        monkeypatch.setattr(summing, "_parts", lambda _heads, n: (-(-n // rows_of_part), rows_of_part))
    for seed in (1, 2):
        facts: dict[str, Any] = dict(batch=3, heads=2, grouped=True, tokens=24, width=16, causal=seed > 1, size=1.0)
        assert_sums_agree(call_of(seed, **facts))


@pytest.mark.parametrize("blocks", [SMALL, WHOLE])
def test_what_is_not_contiguous_is_read_as_it_is(blocks):
    ids, sinks = torch.arange(40)[None] % 7, torch.tensor([0.5, 1.0])
    call = whole_call(tokens=40, causal=True, token_ids=ids, sinks=sinks)
    wide_ids, wide_sinks = ids.repeat_interleave(2, 1), sinks.repeat_interleave(2)
    spread = dataclasses.replace(call, token_ids=wide_ids[:, ::2], sinks=wide_sinks[::2])
    (output, rows), (other, others) = (attend_in_blocks(c, _not_called, blocks) for c in (call, spread))
    assert torch.equal(output, other)
    assert_same(rows, others)


def test_head_sums_with_a_learned_sink_agree():
    assert_sums_agree(whole_call(tokens=24, causal=True, sinks=torch.tensor([0.5, 1.0])))


def test_every_row_is_in_one_part():
    for heads, tokens in ((1536, 128), (384, 512), (48, 4096), (64, 8192), (1, 1), (2, 130), (1, 16_384), (3, 4095)):
        parts, rows = summing._parts(heads, tokens)
        assert (parts - 1) * rows < tokens <= parts * rows, (heads, tokens)
        assert rows % summing._ROWS_AT_ONCE == 0


def test_a_pass_with_rows_that_are_not_measured_is_made_again(monkeypatch):
    """Without waiting for the device, the engine's output stands where the model's own should: then nothing of it is kept."""
    from attlas.extract import measurement
    from attlas.extract.capture.runtime.receiver import CallReceiver

    def marked(receiver: Any, _device: torch.device) -> torch.Tensor | None:
        if not receiver._waits and receiver._unmeasured is None:
            receiver._unmeasured = torch.zeros(1, dtype=torch.int32)
        return receiver._unmeasured

    waited = []

    def recorded(*arguments: Any, waits: bool, **options: Any) -> Any:
        waited.append(waits)
        return instrumented(*arguments, waits=waits, **options)

    instrumented = measurement.instrumented_pass
    monkeypatch.setattr(measurement, "instrumented_pass", recorded)
    monkeypatch.setattr(CallReceiver, "_mark_of_unmeasured", marked)
    monkeypatch.setattr(measurement, "choose", lambda name, device: Engine("triton", _FUSED, head_sums))
    model, inputs = tiny("bert", num_hidden_layers=1), {"input_ids": torch.randint(2, 60, (2, 8))}
    assert all(row["nonfinite_rows"] == 0 for row in _rows_of_heads(model, inputs))
    assert waited == [False]
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[0, 0] = torch.inf  # scores of a head are infinite or NaN
    waited.clear()
    assert any(row["nonfinite_rows"] > 0 for row in _rows_of_heads(model, inputs))
    assert waited == [False, True]
    waited.clear()
    _rows_of_heads(model, inputs)
    assert waited == [True]  # it is known


def _rows_of_heads(model: Any, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    from attlas.extract import measurement

    return measurement.measure(model, **inputs, tables=["heads"])["heads"].to_pylist()


def assert_same(rows: Rows, others: Rows) -> None:
    assert torch.equal(rows.measured, others.measured)
    assert rows.quantities.keys() == others.quantities.keys()
    for name, values in rows.quantities.items():
        assert torch.equal(values, others[name]), name


@pytest.mark.slow
def test_the_same_call_gives_the_same_bytes():
    call = whole_call(tokens=40, token_ids=torch.arange(40)[None] % 5)
    (output, rows), (again, others) = (attend_in_blocks(call, _not_called, SMALL) for _ in range(2))
    assert torch.equal(output, again)
    assert_same(rows, others)


def test_what_the_kernels_do_not_take_goes_to_the_reference_engine():
    call = whole_call(tokens=3)
    output, rows = attend(doubled(call), lambda: call.value)
    assert output is call.value
    assert rows["entropy"].dtype == torch.float64
    wide = whole_call(tokens=3, width=300)
    assert attend(wide, lambda: wide.value)[0] is wide.value


class _Hopper:
    """Stands for the driver of a GPU that is not there."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_calls(dtypes: list[str], widths: list[int]) -> list[dict[str, Any]]:
    """Make calls whose kernels are compiled as they would be for an H100, with all that is known there, and not run."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, warmup=True, **kwargs))

    driver.set_active(_Hopper())  # pyright: ignore[reportArgumentType]
    JITFunction.run = compile_only
    found = []
    for name, width in itertools.product(dtypes, widths):
        for tokens in (256, 96):  # the second fits into one tile
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            call = whole_call(tokens=tokens, width=width, causal=True, token_ids=ids)
            _, rows = attend(in_type(call, getattr(torch, name)), call.value.clone)
            engine.head_sums(HeadObservation(rows, call.visibility, ids), HEAD_NAMES, profiles=True)
            rows.chosen_rows(call, None, 16)
        facts = {"dtype": name, "width": width}
        found += [
            facts | {"name": k.metadata.name, "shared": k.metadata.shared, "stack": _stack(k.asm["cubin"])}
            for k in kernels
        ]
        kernels.clear()
    return found


def _stack(program: bytes) -> int:
    """Bytes a thread keeps in memory because its registers are full."""
    from triton import backends

    tool = next(Path(backends.__path__[0]).glob("nvidia/bin/cuobjdump"))
    file = Path(os.environ["TRITON_CACHE_DIR"]) / "program.cubin"
    file.write_bytes(program)
    told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", told)
    assert stack is not None, told
    return int(stack[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtypes", "widths"), [("bfloat16", "64"), pytest.param("bfloat16 float32", "64 128", marks=pytest.mark.exhaustive)]
)
def test_the_kernels_fit_an_h100(tmp_path, dtypes, widths):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", __name__, dtypes, widths]
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    names = {
        "along_rows",
        "along_columns",
        "whole_patterns",
        "sum_rows_and_keys",
        "finish_head",
        "patterns_of_rows",
        "mix_heads",
    }
    assert {kernel["name"] for kernel in found} == names
    for kernel in found:
        assert kernel["shared"] <= 227 * 1024, kernel
        assert kernel["stack"] <= 64, kernel


if __name__ == "__main__":
    print(json.dumps(compile_calls(sys.argv[1].split(), [int(width) for width in sys.argv[2].split()])))
