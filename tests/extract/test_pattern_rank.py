"""`pattern_effective_rank`: the singular values of whole patterns, exact over hundreds of tokens, and asked for by name alone."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from attlas.analysis.verify import verify
from attlas.extract import measure
from attlas.extract.engines import choose
from attlas.extract.engines.sampled import effective_rank
from attlas.extract.options import RunOptions
from attlas.extract.store import Store
from tests.extract.models import eager_patterns, tiny
from tests.extract.runs import complete_run
from tests.extract.test_engines import ALL_CALLS, call_of, own_output, own_scores
from tests.extract.test_statistics import tiny_swin
from tests.patterns import PATTERNS, closed_form
from tests.properties import cases

NAME = "pattern_effective_rank"


def by_scipy(p: np.ndarray) -> float:
    squares = np.square(scipy.linalg.svdvals(p.astype(np.float64)))
    return math.exp(stats.entropy(squares / squares.sum()))


@pytest.mark.parametrize("letter", "UIPF")
@pytest.mark.parametrize("n", [1, 2, 31, 512])
def test_the_rank_of_known_patterns_in_float32_has_no_rounding_to_speak_of(letter: str, n: int) -> None:
    pattern = torch.from_numpy(PATTERNS[letter](n)[0]).float()
    assert float(effective_rank(pattern)) == pytest.approx(closed_form(NAME, letter, n), rel=1e-7)


def test_the_rank_is_that_of_the_singular_values_whichever_side_is_longer() -> None:
    pattern = torch.randn(9, 30, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = pytest.approx(by_scipy(pattern.numpy()), rel=1e-7)
    assert float(effective_rank(pattern)) == expected and float(effective_rank(pattern.T)) == expected
    assert float(effective_rank(torch.zeros(3, 4))) == 0


def test_the_ranks_of_a_long_sequence_equal_scipys(demo, demo_texts) -> None:
    inputs = demo.tokenizer(" ".join(demo_texts[:3]), truncation=True, max_length=400, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 400
    rows = measure(demo.model, tables=("heads",), statistics=NAME, **inputs)["heads"].to_pylist()
    patterns = eager_patterns(demo.model, **inputs)
    for row in rows[::5]:
        expected = by_scipy(patterns[row["layer"]][0, row["head"]].numpy())
        assert row[NAME] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@given(facts=st.fixed_dictionaries(ALL_CALLS))
@cases(400, quick=60)
def test_the_rank_keeps_its_bounds_and_is_that_of_the_formula(engine, facts) -> None:
    call = call_of(**facts)
    _, rows = choose(engine).attend(call, lambda: own_output(call).float(), {"pattern_rank"})
    assert set(rows.quantities) == {"pattern_rank"} and rows["pattern_rank"].isfinite().all()
    weights = own_scores(call)
    if call.sinks is not None:
        weights = torch.cat((weights, call.sinks.double()[None, :, None, None].expand(*weights.shape[:3], 1)), -1)
    p = weights.softmax(-1).nan_to_num(0)[..., : call.key.shape[2]] * rows.measured[..., None]
    for (sequence, head), rank in np.ndenumerate(rows["pattern_rank"].numpy()):
        keys = call.visibility.keys.real[sequence]
        if rows.measured[sequence, head].any():
            assert 1 - 1e-6 <= rank <= int(keys.sum()) * (1 + 1e-6)
            expected = by_scipy(p[sequence, head][:, keys].numpy())
            assert rank == pytest.approx(expected, rel=2e-4 * max(1, facts["size"]))
        else:
            assert rank == 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_neither_padding_nor_others_in_the_batch_change_the_rank(side: str) -> None:
    model, ids = tiny("llama"), torch.randint(2, 60, (2, 13), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    if side == "left":
        mask = mask.flip(1)
    given = {"input_ids": ids, "attention_mask": mask}
    if side == "left":
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    together = pl.DataFrame(measure(model, tables=("heads",), statistics=NAME, **given)["heads"])
    alone = measure(model, tables=("heads",), statistics=NAME, input_ids=ids[1:][:, mask[1].bool()])["heads"]
    for one, other in zip(together.filter(sequence_id=1).to_dicts(), alone.to_pylist(), strict=True):
        assert one[NAME] == pytest.approx(other[NAME], rel=1e-5)
        assert 1 <= one[NAME] <= 8 and one["query_rows"] == 8


def test_windows_of_a_sequence_have_no_common_rank() -> None:
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    heads = pl.DataFrame(measure(tiny_swin(), tables=("heads",), statistics=NAME, pixel_values=pixels)["heads"])
    # the second layer has one window
    assert heads.filter(layer=0)[NAME].null_count() == 2 and heads.filter(layer=1)[NAME].null_count() == 0


def test_a_run_has_the_ranks_of_the_sample_if_they_are_named(demo, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A pattern has as many directions as its rows differ in. " * 12)
    options = {"model": "demo", "corpus": str(text), "max_length": 24, "shard_sequences": 4, "sample": 1}
    complete_run(RunOptions(out=tmp_path / "out", statistics=NAME, device="cpu", **options))
    rows = pl.read_parquet(tmp_path / "out" / "heads" / "*.parquet")
    in_sample = pl.col("sequence_id") % 4 == 0
    assert rows.filter(in_sample)[NAME].null_count() == 0 and rows.filter(~in_sample)[NAME].is_null().all()
    assert rows.filter(~in_sample).height > 0
    assert rows[NAME].min() >= 1 and rows[NAME].max() <= 24
    manifest = Store.at(tmp_path / "out").manifest
    assert manifest is not None and manifest["run"]["statistics"] == [f"heads.{NAME}"]
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("logit", [0.5, 90.0, 200.0, 1e4])
def test_a_learned_sink_that_takes_nearly_all_leaves_a_pattern_with_a_rank(engine: str, logit: float) -> None:
    """Float32 has no weight below e^-104: the pattern times any factor has the same rank."""
    call = call_of(0, batch=1, heads=2, grouped=False, tokens=9, width=4, causal=False, size=3.0)
    _, rows = choose(engine).attend(
        replace(call, sinks=torch.tensor([logit, -1.0])), lambda: own_output(call).float(), {"pattern_rank"}
    )
    keys = call.visibility.keys.real[0]
    scores = own_scores(call)[0][..., keys].numpy()
    for head, sink in enumerate((logit, -1.0)):
        of_rows = scores[head][rows.measured[0, head].numpy()]
        logs = of_rows - np.logaddexp(special.logsumexp(of_rows, axis=1), sink)[:, None]
        assert float(rows["pattern_rank"][0, head]) == pytest.approx(by_scipy(np.exp(logs - logs.max())), rel=1e-4)


def test_a_batch_without_a_sequence_of_the_sample_has_no_ranks() -> None:
    call = call_of(0, batch=2, heads=2, grouped=False, tokens=5, width=4, causal=False, size=1.0)
    for sample in ([False, False], [False, True]):
        asked = replace(call, sample=torch.tensor(sample))
        _, rows = choose("cpu").attend(asked, lambda: own_output(call).float(), {"pattern_rank", "gini"})
        assert rows["pattern_rank"].shape == (2, 2)
        assert rows["pattern_rank"].isnan().all(1).tolist() == [not each for each in sample]
