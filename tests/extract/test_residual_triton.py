"""The kernels of the residual stream: their numbers in Triton's interpreter, their resources in its compiler; no GPU needed.

Run as a program this module compiles: the interpreter, chosen when a kernel is defined, is chosen for a whole process.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from attlas.extract.capture.layout import Layout, Site
from attlas.extract.capture.runtime.batch import Batch, Tokens
from attlas.extract.capture.runtime.stream import Stream
from attlas.extract.engines import choose
from attlas.extract.engines.needs import Needs
from attlas.extract.engines.observations import NormObservation, ResidualObservation
from attlas.extract.engines.stream_profiles import SiteSums
from attlas.extract.engines.visibility import Axis, whole_axis
from attlas.extract.errors import CaptureError
from attlas.extract.measurement import layout_of, observe
from attlas.extract.tables import TABLES
from tests import oracles
from tests.extract.models import tiny

pytest.importorskip("triton")
from attlas.extract.engines.triton import layers as layer_kernels
from attlas.extract.engines.triton import residual as kernels
from tests.extract.test_triton import ROOT, _Hopper, _stack

# NumPy, in which the interpreter computes, says so when infinities and NaN are made
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

RESIDUAL = TABLES["residual"]
CPU = torch.device("cpu")
EPSILON = 1e-5


def site_tensors(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, *, reads: str = "after", heads: int = 0
) -> kernels.SiteTensors:
    """A site with random states of this shape, whose norm reads x', x, a tensor of its own, or is not there."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    x, f, other, wrote = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    after = (x + 3 * f).to(dtype)
    read = {"after": after, "before": x, "other": other}.get(reads)
    contexts = None
    if heads:
        batch, tokens, _ = shape
        contexts = torch.randn(batch, tokens, heads, 5, generator=generator).to(dtype).transpose(1, 2)
    wrote = None if read is None else wrote + 1
    return kernels.SiteTensors(after, x, update=3 * f, read=read, wrote=wrote, contexts=contexts)


def measured(tensors: kernels.SiteTensors, axis: Axis, *, kind: str = "layer", factor: float = 1.0) -> dict[str, Any]:
    """The columns by the kernels, and the sums of the identity."""
    state = tensors.before if tensors.after is None else tensors.after
    assert state is not None
    results = kernels.SiteResults(axis, state.shape[-1], CPU, sites=1)
    assert results.measure(tensors, factor=factor, kind=kind, epsilon=EPSILON)
    columns = results.columns()[0]
    named = dict(zip(kernels.COLUMNS, columns[: kernels.IDENTITY.start], strict=True))
    return named | {"identity": columns[kernels.IDENTITY]}


def in_torch(tensors: kernels.SiteTensors, axis: Axis, *, kind: str = "layer", factor: float = 1.0) -> dict[str, Any]:
    """The columns by the functions of the table."""
    after, before, beside, update, read, wrote, gain, contexts = (None if t is None else t.double() for t in tensors)
    if before is not None and beside is not None:
        before = before + beside
    if update is not None:
        update = update * factor if gain is None else update * factor * gain
    if after is None:
        assert before is not None and update is not None
        after = before + update
    norm = None if read is None or wrote is None else NormObservation(read, wrote, kind, EPSILON)  # pyright: ignore
    o = ResidualObservation(axis.real, after, before, update, norm, contexts)
    return {c.name: None if c.compute is None else c.compute(o) for c in RESIDUAL.facts if c.core}


def assert_same_as_torch(tensors: kernels.SiteTensors, axis: Axis, **options: Any) -> dict[str, Any]:
    made, expected = measured(tensors, axis, **options), in_torch(tensors, axis, **options)
    for name, values in expected.items():
        values = torch.full((len(axis.start),), torch.nan) if values is None else values
        torch.testing.assert_close(
            made[name],
            values.double(),
            equal_nan=True,
            rtol=2e-5,
            atol=2e-5,
            msg=lambda told, name=name: f"{name}: {told}",
        )
    return made


def assert_same_as_oracle(tensors: kernels.SiteTensors, axis: Axis, *, kind: str) -> None:
    made = measured(tensors, axis, kind=kind)
    for b, (start, length) in enumerate(zip(axis.start.tolist(), axis.length.tolist(), strict=True)):

        def of_sequence(t: torch.Tensor | None, b=b, real=slice(start, start + length)) -> Any:
            return None if t is None else t[b][..., real, :].double().numpy()

        after, before, _, update, read, wrote, _, contexts = (of_sequence(t) for t in tensors)
        expected = oracles.residual_columns(
            before, update, after, norm_input=read, norm_output=wrote, norm_kind=kind, eps=EPSILON, contexts=contexts
        )
        for name in kernels.COLUMNS:
            value = math.nan if expected[name] is None else expected[name]
            assert float(made[name][b]) == pytest.approx(value, rel=2e-5, abs=2e-5, nan_ok=True), (b, name)


def padded(*spans: tuple[int, int], tokens: int) -> Axis:
    """An axis from the first place and the length of each sequence."""
    start, length = torch.tensor(spans).T
    return Axis(start, length, tokens)


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("reads", ["after", "before", "other", "none"])
@pytest.mark.parametrize("width", [7, 33, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_columns_equal_the_oracle(dtype, width, reads, kind):
    tensors = site_tensors((3, 20, width), dtype, reads=reads, heads=3)
    assert_same_as_oracle(tensors, padded((0, 20), (13, 7), (0, 1), tokens=20), kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("width", [2048, 2050])
def test_wide_states_equal_the_oracle(width):
    assert_same_as_oracle(site_tensors((1, 3, width), torch.bfloat16), whole_axis(1, 3, CPU), kind="layer")


def test_a_stream_that_is_only_read_has_no_columns_of_an_update():
    after = site_tensors((1, 4, 9)).after
    made = assert_same_as_torch(kernels.SiteTensors(after), whole_axis(1, 4, CPU))
    assert made["update_norm"].isnan().all() and made["stream_norm"].isfinite().all()


def test_a_parallel_update_with_a_scale_and_a_sum_that_is_not_computed():
    tensors = site_tensors((2, 5, 9), torch.bfloat16, reads="before")
    gain = torch.linspace(0.5, 2, 9)
    assert_same_as_torch(
        tensors._replace(after=None, beside=tensors.wrote, gain=gain), whole_axis(2, 5, CPU), factor=0.5
    )


def test_a_mean_far_from_zero_does_not_cancel():
    tensors = site_tensors((1, 3, 300))
    assert tensors.after is not None
    far = tensors.after + 1000
    assert_same_as_torch(tensors._replace(after=far, read=far), whole_axis(1, 3, CPU))


def test_states_in_other_memory_layouts():
    tensors = site_tensors((2, 5, 9), heads=2)
    expected = measured(tensors, whole_axis(2, 5, CPU))
    strided = [None if t is None else t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    mixed = [tensors.after, *strided[1:]]
    for others in (strided, mixed):
        made = measured(kernels.SiteTensors(*others), whole_axis(2, 5, CPU))
        assert all(torch.equal(made[name], expected[name]) for name in kernels.COLUMNS)


def test_zero_vectors_are_left_out():
    tensors = site_tensors((1, 4, 9), heads=2)
    assert tensors.before is not None and tensors.after is not None and tensors.contexts is not None
    tensors.before[0, 1] = tensors.after[0, 2] = tensors.contexts[0, 0, 3] = 0
    made = assert_same_as_torch(tensors, whole_axis(1, 4, CPU))
    assert made["update_ratio"].isfinite().all() and made["anisotropy"].isnan().all()


def test_one_token_has_no_pairs():
    made = assert_same_as_torch(site_tensors((1, 1, 9)), whole_axis(1, 1, CPU))
    assert made["anisotropy"].isnan().all()


def test_the_lowest_dimension_counts_on_ties():
    after = torch.zeros(3, 20, 300)
    after[0, 3, [299, 40, 17]] = torch.tensor([5.0, -5.0, 4.0])
    after[1, 2, 290], after[1, 18, 34] = 7.0, -7.0
    made = measured(kernels.SiteTensors(after), whole_axis(3, 20, CPU))
    assert made["outlier_dim"].tolist() == [40, 34, 0]
    assert made["max_abs"].tolist() == [5, 7, 0]


def test_the_lowest_dimension_counts_on_ties_between_blocks():
    after = torch.zeros(2, 100, 300)
    after[0, 90, 40], after[0, 5, 200], after[0, 50, 41] = 5.0, 5.0, -5.0
    after[1, 99, 0], after[1, 3, 299] = 1.0, 2.0
    made = measured(kernels.SiteTensors(after), whole_axis(2, 100, CPU))
    assert made["outlier_dim"].tolist() == [40, 299]


@pytest.mark.slow
def test_sequences_of_many_blocks_equal_the_oracle():
    tensors = site_tensors((2, 1100, 40), reads="before", heads=2)
    assert_same_as_oracle(tensors, padded((45, 1055), (0, 1100), tokens=1100), kind="rms")


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_fourth_powers_do_not_overflow(size):
    after = site_tensors((1, 4, 300)).after
    assert after is not None
    after = after * size
    after[0, 1, :50] = after[0, 2, 64:] = 0  # the first dimensions tell how large a state is
    made = measured(kernels.SiteTensors(after), whole_axis(1, 4, CPU))
    expected = in_torch(kernels.SiteTensors(after), whole_axis(1, 4, CPU))
    torch.testing.assert_close(made["kurtosis"], expected["kurtosis"], rtol=2e-5, atol=0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_tokens_are_left_out_of_means(poison):
    tensors = site_tensors((1, 4, 9))
    assert tensors.after is not None
    tensors.after[0, 2, 5] = poison
    made = assert_same_as_torch(tensors, whole_axis(1, 4, CPU))
    assert made["kurtosis"].isfinite().all() and not made["max_abs"].isfinite().any()
    assert not made["identity"].isfinite().all()


def test_what_stands_at_padding_does_not_matter():
    tensors, axis = site_tensors((2, 20, 9), heads=2), padded((3, 15), (0, 4), tokens=20)
    clean = measured(tensors, axis)
    for state in (tensors.after, tensors.before, tensors.update, tensors.wrote, tensors.contexts):
        assert state is not None
        (state.transpose(1, 2) if state.dim() == 4 else state)[~axis.real] = math.nan
    soiled = measured(tensors, axis)
    assert all(torch.equal(clean[name], soiled[name]) for name in clean)


def test_sites_beyond_the_memory_are_reduced_early(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "MAX_BYTES", 1)
    sites = [site_tensors((1, 2, width), reads="none") for width in (6, 6)]
    results = kernels.SiteResults(whole_axis(1, 2, CPU), 6, CPU, sites=2)
    for tensors in sites:
        assert results.measure(tensors)
    assert torch.equal(*results.columns().nan_to_num(-1))
    assert not results.measure(sites[0]._replace(before=sites[0].before.double())), "left to torch"  # pyright: ignore


# --- whole layers


def of_layer(before: torch.Tensor, after: torch.Tensor, axis: Axis) -> dict[str, torch.Tensor]:
    """The columns of `layers` by the kernel."""
    results = layer_kernels.LayerResults(axis, before.shape[-1], CPU, layers=1)
    assert results.measure(before, after)
    return {name: values[0] for name, values in results.columns().items()}


def assert_layer_equals_formulas(before: torch.Tensor, after: torch.Tensor, axis: Axis) -> dict[str, torch.Tensor]:
    """1 − cos, arccos cos ÷ π and ‖x'‖ / ‖x‖ in float64, averaged over the real tokens that have them."""
    made = of_layer(before, after, axis)
    x, y = before.double().numpy(), after.double().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
        u, v = x / lengths[0][..., None], y / lengths[1][..., None]
        half = np.arctan2(np.linalg.norm(u - v, axis=-1), np.linalg.norm(u + v, axis=-1))
        gain = lengths[1] / lengths[0]
    of_tokens = {"block_influence": 1 - np.cos(2 * half), "block_angle": 2 * half / np.pi, "block_gain": gain}
    for name, values in of_tokens.items():
        real = axis.real.numpy() & np.isfinite(values)
        with np.errstate(invalid="ignore"):
            expected = np.where(real, values, 0).sum(-1) / real.sum(-1)
        np.testing.assert_allclose(made[name], expected, rtol=2e-5, atol=1e-7, err_msg=name)
    return made


@pytest.mark.parametrize("width", [7, 33, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_columns_of_layers_equal_their_formulas(dtype, width):
    tensors = site_tensors((3, 20, width), dtype)
    assert tensors.before is not None and tensors.after is not None
    assert_layer_equals_formulas(tensors.before, tensors.after, padded((0, 20), (13, 7), (0, 1), tokens=20))


def test_a_layer_that_hardly_turns_the_stream_keeps_its_digits():
    """A cosine in float32 would be 1."""
    before = site_tensors((1, 6, 40)).before
    assert before is not None
    after = before * 2
    after[..., 0] += 1e-4
    made = assert_layer_equals_formulas(before, after, whole_axis(1, 6, CPU))
    assert 0 < made["block_influence"].item() < 1e-8


def test_layers_leave_out_padding_and_states_without_a_direction():
    tensors, axis = site_tensors((2, 20, 9)), padded((3, 15), (0, 4), tokens=20)
    before, after = tensors.before, tensors.after
    assert before is not None and after is not None
    before[0, 5] = after[1, 2] = 0
    clean = assert_layer_equals_formulas(before, after, axis)
    before[~axis.real] = after[~axis.real] = math.nan
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (before, after))
    soiled = of_layer(*strided, axis)
    assert all(torch.equal(clean[name], soiled[name]) for name in clean)
    double = layer_kernels.LayerResults(axis, 9, CPU, layers=1)
    assert not double.measure(before.double(), after.double()), "left to torch"


# --- whole passes


class Kept:
    """An observer that keeps the columns of sites."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.sites: dict[Site, torch.Tensor] = {}
        self.counts: dict[Site, list[float]] = {}

    def heads(self, *_: Any) -> None: ...

    def residual(self, site: Site, sums: SiteSums) -> None:
        self.sites[site] = sums.values
        if sums.counts is not None:
            self.counts[site] = sums.counts.sum(0).tolist()

    def layer(self, site: Site, sums: SiteSums) -> None:
        self.sites[site] = sums.values

    def state(self, *_: Any) -> None: ...

    def settle(self) -> None: ...


def observed(model, layout: Layout, stream: str, *, needs: Needs | None = None) -> dict[Site, torch.Tensor]:
    """The columns of every site by one of the streams, of two sequences, one of them padded."""
    return kept_by(model, layout, stream, needs=needs).sites


def kept_by(model, layout: Layout, stream: str, *, needs: Needs | None = None) -> Kept:
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    axis = padded((0, 9), (0, 6), tokens=9)
    kept: Any = Kept(needs or RESIDUAL.needs(RESIDUAL.facts))
    observe(
        model,
        layout,
        {"input_ids": ids, "attention_mask": mask},
        batch=Batch(2, {"input_ids": Tokens(axis, ids)}),
        engine=replace(choose("reference"), stream=stream),  # pyright: ignore[reportArgumentType]
        collector=kept,
    )
    return kept


def parallel_model():
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return transformers.GPTNeoXModel(config).eval()


def assert_same_sites(made: dict[Site, torch.Tensor], expected: dict[Site, torch.Tensor]) -> None:
    assert made.keys() == expected.keys()
    for site, columns in expected.items():
        torch.testing.assert_close(made[site], columns, equal_nan=True, rtol=1e-4, atol=2e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gpt_neox"])
def test_every_site_of_a_model_is_measured_by_the_kernels(family, dtype, monkeypatch: pytest.MonkeyPatch):
    model = (parallel_model() if family == "gpt_neox" else tiny(family)).to(dtype)
    layout = layout_of(model)
    expected = observed(model, layout, "torch")
    monkeypatch.setattr(Stream, "_sums", lambda *_: pytest.fail("a site was measured in torch"))
    made = observed(model, layout, "triton")
    assert len(made) == len(layout.sites)
    assert_same_sites(made, expected)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_layers_and_counts_of_norms_are_those_of_plain_torch(family, monkeypatch: pytest.MonkeyPatch):
    model = tiny(family)
    layout = layout_of(model)
    columns = [*TABLES["layers"].facts, *(c for c in RESIDUAL.facts if c.core)]
    needs = replace(TABLES["layers"].needs(columns[:3]) | RESIDUAL.needs(columns[3:]), stream_profiles=True)
    expected = kept_by(model, layout, "torch", needs=needs)
    monkeypatch.setattr(Stream, "_layer_values", lambda *_: pytest.fail("a layer was measured in torch"))
    made = kept_by(model, layout, "triton", needs=needs)
    assert_same_sites(made.sites, expected.sites)
    assert made.counts == expected.counts
    assert len(made.counts) == len(layout.sites) and all(sum(c) == 9 + 6 for c in made.counts.values())


@pytest.mark.slow
def test_the_same_pass_gives_the_same_bytes():
    model = tiny("llama")
    layout = layout_of(model)
    once, again = (observed(model, layout, "triton") for _ in range(2))
    for site, columns in once.items():
        assert torch.equal(columns.nan_to_num(-2), again[site].nan_to_num(-2))


def test_columns_that_the_kernels_do_not_make_are_computed_in_torch():
    model = tiny("distilbert")
    layout = layout_of(model)
    stream_l1 = lambda o: o.mean(o.after.abs().sum(-1))  # noqa: E731
    heads = lambda o: None if o.contexts is None else o.mean(o.contexts.amax((1, 3)))  # noqa: E731
    needs = Needs(residual={**RESIDUAL.needs(RESIDUAL.facts).residual, "stream_l1": stream_l1, "heads_max": heads})
    assert_same_sites(*(observed(model, layout, stream, needs=needs) for stream in ("triton", "torch")))
    left = replace(choose("reference"), stream="triton").residual_left_to_reference(needs.residual)
    assert set(left) == {"heads_max", "stream_l1", *(c.name for c in RESIDUAL.facts if not c.core)}


def test_double_precision_is_measured_in_torch():
    model = tiny("distilbert").double()
    layout = layout_of(model)
    made, expected = (observed(model, layout, stream) for stream in ("triton", "torch"))
    assert all(np.array_equal(made[site], columns, equal_nan=True) for site, columns in expected.items())


@pytest.mark.parametrize("stream", ["torch", "triton"])
def test_a_broken_identity_is_an_error_for_every_stream(stream):
    model = tiny("gpt2")
    layout = layout_of(model)
    model.h[1].mlp.c_proj.register_forward_hook(lambda module, read, wrote: wrote.mul(1.5))
    model.h[1].mlp.dropout.register_forward_hook(lambda module, read, wrote: wrote / 1.5 + 1.0)
    with pytest.raises(
        CaptureError, match=r"x' = x \+ F\(x\) must hold .* at mlp of layer 1 of the decoder it is off by"
    ):
        observed(model, layout, stream)


# --- resources on a GPU


def compile_sites(dtypes: list[str], widths: list[int]) -> list[dict[str, Any]]:
    """Compile the kernels as they would be for an H100, with all that is known there."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, warmup=True, **kwargs))

    driver.set_active(_Hopper())  # pyright: ignore[reportArgumentType]
    JITFunction.run = compile_only
    found = []
    for name in dtypes:
        for width in widths:
            for reads, head_width in (("after", 64), ("before", min(256, width))):
                tensors = site_tensors((2, 20, width), getattr(torch, name), reads=reads)
                contexts = torch.zeros(2, 20, 12, head_width, dtype=getattr(torch, name)).transpose(1, 2)
                results = kernels.SiteResults(whole_axis(2, 20, CPU), width, CPU, sites=1)
                results.measure(tensors._replace(contexts=contexts), kind="layer", epsilon=EPSILON)
            assert tensors.before is not None and tensors.after is not None
            layer_kernels.LayerResults(whole_axis(2, 20, CPU), width, CPU, layers=1).measure(
                tensors.before, tensors.after
            )
            facts = {"dtype": name, "width": width}
            found += [facts | {"shared": k.metadata.shared, "stack": _stack(k.asm["cubin"])} for k in compiled]
            compiled.clear()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtypes", "widths"),
    [("bfloat16", "384"), pytest.param("bfloat16 float16 float32", "1 384 4096", marks=pytest.mark.exhaustive)],
)
def test_the_kernels_fit_an_h100(tmp_path, dtypes, widths):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", __name__, dtypes, widths]
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert len(found) == 7 * len(dtypes.split()) * len(widths.split())
    for kernel in found:
        assert kernel["shared"] <= 16 * 1024, kernel
        assert kernel["stack"] <= 16, kernel


if __name__ == "__main__":
    print(json.dumps(compile_sites(sys.argv[1].split(), [int(width) for width in sys.argv[2].split()])))
