"""The benchmarks measure what they say: who runs when, what is compared, what is written; never how quick it is."""

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from attlas.extract.capture.intercept.sdpa import intercept_sdpa
from attlas.extract.measurement import measure
from attlas.flows.config import Run
from tests.benchmarks import memory, report, run, usual, usual_way, workloads
from tests.benchmarks.bench import benchmarks, select
from tests.benchmarks.forward import compare_forward
from tests.benchmarks.harness import Benchmark, Result, Seconds, alternate, time_call
from tests.extract.models import tiny

NAMES = (
    *(f"forward/minilm-{kind}" for kind in ("128", "512", "padded")),
    *(f"forward/bert-base-{tokens}" for tokens in (128, 512, 2048)),
    "forward/gpt2-1024",
    "by-hand/mpnet-512",
    "replay/longformer-2048",
    "run/minilm-128",
    *(f"run/minilm-512-{statistics}" for statistics in ("core", "all")),
    "workers/minilm-512",
    "planning/minilm-512",
    "bytes-per-token/minilm-512",
    "usual/minilm-512",
    "usual-by-one/minilm-512",
    "memory/bert-base-8192",
    "bytes-per-row/heads",
    "bytes-read/one-head-256",
    "bytes-read/one-head-4096",
    "answers/means-10m",
    "answers/means-of-source-10m",
    "answers/compare-10m",
    "answers/report-10m",
)


@pytest.fixture(autouse=True, scope="module")
def freeze_garbage() -> Iterator[None]:
    """Exempt existing objects from the garbage collection before every timed run."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def demo_once(demo, monkeypatch):
    """Make the workloads use the demo model of the other tests."""
    monkeypatch.setattr(workloads, "demo", lambda: demo)
    return demo


def test_sides_take_turns_and_neither_is_always_first():
    order = []

    def side(name: str) -> Callable[[], float]:
        return lambda: float(order.append(name) or len(order))

    seconds = alternate(side("ours"), side("theirs"), repeats=3)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert seconds == Seconds(ours=(1, 4, 5), theirs=(2, 3, 6)), "each turn's time is its side's"


def test_what_a_side_takes_is_the_time_around_it_alone():
    """Longer than what it does, shorter than all that is done for it."""
    inside = []

    def side() -> None:
        began = time.perf_counter()
        sum(range(1000))
        inside.append(time.perf_counter() - began)

    began = time.perf_counter()
    seconds = time_call(side)
    around = time.perf_counter() - began
    assert len(inside) == 1
    assert inside[0] <= seconds <= around


def test_a_rate_is_of_the_quickest_run_and_its_ratio_is_ours_over_theirs():
    result = Seconds(ours=(4.0, 2.0), theirs=(1.0, 3.0)).rates(12, "tokens/s")
    assert (result.ours, result.theirs, result.ratio) == (6.0, 12.0, 0.5)
    assert result.paired == (0.25, 1.5)


def test_every_name_of_the_table_is_there_and_the_longest_waits_to_be_named():
    everything = benchmarks()
    by_default = [b.name for b in select(everything, [])]
    assert sorted(by_default) == sorted(NAMES)
    assert [b.name for b in everything if b.by_name_only] == [
        "memory/one-layer-32768",
        "answers/means-100m",
        "answers/means-of-source-100m",
        "answers/compare-100m",
        "answers/report-100m",
    ]
    assert "memory/one-layer-32768" not in [b.name for b in select(everything, ["memory/*"])]
    assert [b.name for b in select(everything, ["memory/one-layer-32768"])] == ["memory/one-layer-32768"]


def test_a_pattern_that_matches_nothing_is_refused_with_the_names():
    one = Benchmark("forward/minilm-128", lambda repeats: Result(1, 1, "s"), 1)
    with pytest.raises(ValueError, match=r"'minilm' matches none of forward/minilm-128"):
        select([one], ["minilm"])


def test_results_of_other_names_stay_in_the_file(tmp_path: Path):
    path = tmp_path / "bench.json"
    report.write(path, {"a": Result(1, 2, "s"), "b": Result(3, 4, "s")})
    report.write(path, {"a": Result(6, 2, "MiB", paired=(1.0,), note="noted")})
    assert json.loads(path.read_text()) == [
        {"name": "a", "ratio": 3.0, "ours": 6, "theirs": 2, "unit": "MiB"},
        {"name": "b", "ratio": 0.75, "ours": 3, "theirs": 4, "unit": "s"},
    ]


def test_the_spread_is_that_of_the_paired_ratios():
    assert report.spread(Result(1, 1, "s", paired=(0.9, 1.1, 1.0))) == "1.000 (0.900–1.100)"
    assert report.spread(Result(1, 1, "s")) == ""


def test_a_machine_that_others_use_is_not_idle():
    cores = os.cpu_count() or 1
    start, end = report.Clock(wall=0, all=10, own=5), report.Clock(wall=10, all=10 + 6 * cores, own=5 + 4 * cores)
    assert str(start.until(end)) == "10 s, 20% of the cores taken by others"
    assert "not idle" in start.until(end).warning
    assert start.until(report.Clock(wall=10, all=15, own=10)).warning == ""
    assert report.Clock.now().until(report.Clock.now()).seconds > 0


def test_a_third_of_the_padded_batch_is_padding(demo_once):
    work = workloads.minilm_padded(32, 128)
    assert work.tokens / work.ids.numel() == pytest.approx(2 / 3, abs=0.01)
    separator = work.ids[torch.arange(32), work.length - 1]
    assert (separator == demo_once.tokenizer.sep_token_id).all()
    assert work.inputs["attention_mask"].sum() == work.tokens


def test_windows_are_full_and_different(demo_once):
    work = workloads.minilm(8, 64)
    assert (work.ids != demo_once.tokenizer.pad_token_id).all()
    assert len({tuple(row.tolist()) for row in work.ids}) == 8


def test_the_patterns_of_random_models_are_not_flat(demo_once):
    work = workloads.bert_base(1, 64, layers=1)
    heads = measure(work.model, input_ids=work.ids)["heads"]
    assert np.median(heads["entropy_normalized"]) < 0.9


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_forward_pass_is_measured_and_the_other_is_not(demo_once, family):
    work = workloads.Workload(tiny(family), torch.randint(1, 60, (2, 12)), torch.tensor([12, 9]))
    calls = []
    plain = workloads.plain_pass(work)
    with intercept_sdpa(lambda request: calls.append(request) or request.call_original()):
        plain()
    assert len(calls) == 3, "the plain pass takes torch's own attention"
    result = compare_forward(work, repeats=2)
    assert result.ratio > 0
    assert len(result.paired) == 2


def test_a_measured_batch_knows_ids_and_classes(demo_once):
    work = workloads.minilm(2, 16)
    tokens = work.batch.texts["input_ids"]
    assert tokens.ids is work.ids
    assert tokens.classes is not None
    assert tokens.classes.max() > 0


USUAL_KEYS = {
    "heads": ("layer", "head", "sequence_id"),
    "residual": ("layer", "site", "sequence_id"),
    "profiles": ("layer", "head", "profile", "bin"),
}
# columns that the usual side omits: BERT has one stack and no learned sink, text has no patches, every row is
# measured without padding, and a notebook has one shard
NOT_USUAL = {
    "heads": {"stack", "mass_sink", "distance_patches", "mass_patches", "query_rows", "masked_rows", "nonfinite_rows"},
    "residual": {"stack"},
    "profiles": {"stack", "shard"},
}


@pytest.fixture(scope="module")
def usual_and_ours(demo):
    """(usual, ours) of every table, with rows in the same order, for two sequences of 48 tokens."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workloads, "demo", lambda: demo)
        ids = workloads.minilm(2, 48).ids
        classes = torch.from_numpy(workloads._demo_classes()[ids].astype(np.int64))
    theirs = usual.usual_tables(usual.eager_copy(demo.model), ids, classes)
    ours = measure(demo.model, tokenizer=demo.tokenizer, input_ids=ids)
    return {
        name: tuple(_sort_rows(tables[name], keys) for tables in (theirs, ours)) for name, keys in USUAL_KEYS.items()
    }


def _sort_rows(table, keys):
    """Rows sorted by keys, with dictionaries as strings."""
    words = {f.name: table[f.name].cast("string") for f in table.schema if pa.types.is_dictionary(f.type)}
    plain = pa.table({name: words.get(name, table[name]) for name in table.column_names})
    return plain.sort_by([(key, "ascending") for key in keys])


@pytest.mark.parametrize("table", USUAL_KEYS)
def test_the_usual_way_gives_all_columns_and_rows(usual_and_ours, table):
    theirs, ours = usual_and_ours[table]
    assert set(theirs.column_names) == set(ours.column_names) - NOT_USUAL[table]
    for key in USUAL_KEYS[table]:
        assert theirs[key].to_pylist() == ours[key].to_pylist(), key


def test_what_the_usual_way_leaves_out_of_heads_says_nothing(usual_and_ours):
    _, ours = usual_and_ours["heads"]
    constants = {name: set(ours[name].to_pylist()) for name in NOT_USUAL["heads"]}
    assert constants == {
        "stack": {"encoder"},
        "mass_sink": {None},
        "distance_patches": {None},
        "mass_patches": {None},
        "query_rows": {48},
        "masked_rows": {0},
        "nonfinite_rows": {0},
    }


@pytest.mark.parametrize("table", ["heads", "residual"])
def test_the_usual_way_finds_the_same_numbers(usual_and_ours, table):
    theirs, ours = usual_and_ours[table]
    for name in set(theirs.column_names) - set(USUAL_KEYS[table]):
        assert_within_tolerance(theirs[name], ours[name], name)


def test_the_usual_way_finds_the_same_profiles(usual_and_ours):
    theirs, ours = usual_and_ours["profiles"]
    by_row = np.isin(ours["profile"].to_pylist(), ["entropy", "max_weight"])
    for name in ("sum", "count"):
        found, expected = theirs[name].to_numpy(), ours[name].to_numpy()
        assert_within_tolerance(found[~by_row], expected[~by_row], name)
        # a row at the edge between two bins may be rounded into either
        moved = np.cumsum(found[by_row] - expected[by_row])
        assert np.isin(moved, [-1, 0, 1]).all()
        assert moved[-1] == 0


def assert_within_tolerance(found, expected, name):
    """Check the tolerance of the data dictionary for float32: 1e-5 absolute or 1e-4 relative, whichever is larger."""
    found, expected = (np.asarray(values, np.float64) for values in (found, expected))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected), err_msg=name)
    off = np.abs(found - expected) > np.maximum(1e-5, 1e-4 * np.abs(expected))
    assert not off.any(), f"{name}: {found[off]} is not {expected[off]}"


def test_diagonals_are_summed_by_their_distance():
    p = torch.arange(9.0).view(1, 1, 3, 3)
    assert usual_way.diagonal_sums(p)[0, 0].tolist() == [6, 3 + 7, 0 + 4 + 8, 1 + 5, 2]


@pytest.mark.slow
def test_the_usual_way_is_timed_from_batch_to_parquet_in_a_process_of_its_own(demo_once, tmp_path: Path):
    ids = workloads.minilm(2, 16).ids
    with usual.usual_process(ids, tmp_path, at_once=1) as theirs:
        assert 0 < theirs() < 60
    assert {path.name for path in tmp_path.iterdir()} == {f"{table}.parquet" for table in USUAL_KEYS}
    assert pq.read_table(tmp_path / "heads.parquet").num_rows == 2 * 6 * 12


def test_both_ways_are_compared_in_one_result(demo_once, monkeypatch):
    @contextmanager
    def here(ids, folder, *, at_once):
        yield lambda: 1.0

    monkeypatch.setattr(usual, "usual_process", here)
    result = usual.compare_with_usual(demo_once, workloads.minilm(2, 16), repeats=2, at_once=2)
    assert result.theirs == 32
    assert result.ours > 0
    assert len(result.paired) == 2


def test_a_usual_side_that_ends_by_itself_is_an_error(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(usual, "ROOT", tmp_path)  # where there is no such module
    with (
        pytest.raises(RuntimeError, match="ended by itself, with status 1"),
        usual.usual_process(torch.ones(1, 1), tmp_path, at_once=1),
    ):
        pass


def test_plain_passes_see_the_batches_of_the_run(tmp_path: Path):
    options = Run(model="demo", corpus="demo", out=tmp_path, max_length=32, limit=1, device="cpu")
    first = run.first_run(options, tmp_path)
    assert sum(int(inputs["attention_mask"].sum()) for inputs in first.batches) == first.tokens
    result = run.compare_run(first, options, repeats=1)
    assert result.ratio > 0
    bytes_ = run.heads_bytes(first.dataset)
    parts = list((first.dataset / "heads").iterdir())
    rows = int(bytes_.note.split()[0].replace(",", ""))
    assert round(bytes_.ours * rows, 3) == sum(p.stat().st_size for p in parts)
    assert bytes_.theirs > 0


def test_growth_is_the_peak_of_allocated_memory():
    def allocate() -> None:
        np.ones(64 * memory.MIB, np.uint8)

    assert 60 * memory.MIB < memory.peak_growth(allocate) < 80 * memory.MIB
    assert memory.peak_growth(lambda: None) < 4 * memory.MIB
