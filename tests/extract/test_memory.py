"""Batches fit into memory; one that does not is repeated in halves, with the same numbers."""

import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from attlas.extract import memory
from attlas.extract.capture.layout import Attention, HookPoint, Site
from attlas.extract.collector import Collector
from attlas.extract.engines import Engine, choose
from attlas.extract.engines.needs import Needs
from attlas.extract.engines.sums import HeadSums
from attlas.extract.errors import Refusal
from attlas.extract.instrument import BATCH_TOKENS, Instrument
from attlas.extract.measurement import layout_of
from attlas.extract.memory import bytes_per_token, free_on_host, is_out_of_memory, release_memory, tokens_that_fit
from attlas.extract.model.measured_model import TOKEN_INPUTS, MeasuredModel
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shards, plan_run
from attlas.extract.shard import measure_sequences
from attlas.extract.tables import Recorder
from tests.extract.models import tiny

CPU = torch.device("cpu")
GIB = 1 << 30


def machine(root: Path, files: dict[str, str]) -> Path:
    """The root of a machine with 8 GiB available, with these files on it."""
    meminfo = f"MemTotal: {9 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\n"
    for name, text in (("proc/meminfo", meminfo), *files.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8 * GIB),
        ({"proc/self/cgroup": "0::/\n"}, 8 * GIB),
        ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "max\n", f"{V2}/a/memory.current": "5\n"}, 8 * GIB),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/memory.max": f"{3 * GIB}\n",
                f"{V2}/a/memory.current": f"{GIB}\n",
                f"{V2}/a/b/memory.max": f"{20 * GIB}\n",
                f"{V2}/a/b/memory.current": "0\n",
            },
            2 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/a\n",
                f"{V2}/a/memory.max": f"{3 * GIB}\n",
                f"{V2}/a/memory.current": f"{3 * GIB}\n",
                f"{V2}/a/memory.stat": f"anon 7\ninactive_file {GIB}\n",
            },
            GIB,
        ),
        (
            {
                "proc/self/cgroup": "8:pids:/\n4:cpu,memory:/outside/this/container\n0::/\n",
                f"{V1}/memory.limit_in_bytes": f"{4 * GIB}\n",
                f"{V1}/memory.usage_in_bytes": f"{3 * GIB}\n",
                f"{V1}/memory.stat": f"total_inactive_file {GIB // 2}\n",
            },
            3 * GIB // 2,
        ),
    ],
    ids=["machine", "no limit", "limit max", "limit above", "page cache", "version 1 in a container"],
)
def test_free_memory_is_limited_by_the_machine_and_every_control_group(tmp_path, files, free):
    assert free_on_host(machine(tmp_path, files)) == free


def test_unknown_free_memory_sets_no_limit(tmp_path, monkeypatch):
    assert free_on_host(tmp_path) is None
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    model = tiny("bert")
    assert tokens_that_fit(model, layout_of(model), CPU, longest=8) is None


def test_this_machine_reports_its_free_memory():
    assert 0 < (free_on_host() or 0) < 1 << 60


def test_twice_the_memory_fits_twice_the_tokens_and_slightly_more_fits_the_same(monkeypatch):
    model = tiny("bert")
    layout = layout_of(model)

    def tokens(free: float) -> int | None:
        monkeypatch.setattr(memory, "free_bytes", lambda device: int(free))
        return tokens_that_fit(model, layout, CPU, longest=8)

    each = bytes_per_token(model, layout, longest=8)
    assert [tokens(2 * 1024 * each * f) for f in (0.99, 1, 1.1, 2)] == [512, 1024, 1024, 2048]
    assert tokens(0) == 1


def test_a_token_needs_more_with_wider_products_more_heads_and_longer_sequences_but_not_with_more_layers():
    bert, roberta, gpt2 = (tiny(family) for family in ("bert", "roberta", "gpt2"))  # gpt2's products are wider
    layout = layout_of(bert)
    of_bert = bytes_per_token(bert, layout, longest=8)
    assert bytes_per_token(gpt2, layout_of(gpt2), longest=8) > of_bert
    assert bytes_per_token(bert, layout, longest=80) > of_bert
    more_heads = replace(layout, attentions=tuple(replace(a, heads=8) for a in layout.attentions))
    assert bytes_per_token(bert, more_heads, longest=8) > of_bert
    assert len(layout.attentions) > len(layout_of(roberta).attentions)
    assert bytes_per_token(roberta, layout_of(roberta), longest=8) == of_bert


@pytest.mark.parametrize(
    "act",
    [lambda: torch.empty(1 << 55, dtype=torch.uint8), lambda: np.empty(1 << 55, np.uint8), lambda: bytearray(1 << 55)],
    ids=["torch", "numpy", "python"],
)
def test_out_of_memory_is_recognized(act):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        act()
    assert is_out_of_memory(caught.value)


def test_other_errors_are_not_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(OSError("no space left on device"))


def with_attend(engine: Engine, attend: Callable[..., Any]) -> Engine:
    """The engine with another way to make attention calls."""

    class Other(Engine):
        def attend(self, *arguments: Any) -> Any:
            return attend(*arguments)

    return Other(**{field.name: getattr(engine, field.name) for field in fields(engine)})


def narrow(engine: Engine, most: int, error: type[Exception] = torch.OutOfMemoryError) -> tuple[Engine, list[int]]:
    """An engine that runs out of memory in the second layer of more than `most` sequences, and the sizes that failed."""
    before, failed = [0], list[int]()

    def attend(call, call_original, wanted):
        sequences = call.query.shape[0]
        if sequences > most and before[0] == sequences:
            before[0] = 0
            failed.append(sequences)
            raise error("not enough memory")
        before[0] = sequences
        return engine.attend(call, call_original, wanted)

    return with_attend(engine, attend), failed


def sequences(lengths: list[int]) -> pa.Table:
    numbers = np.arange(len(lengths))
    words = np.random.default_rng(0).integers(1000, 9000, (len(lengths), max(lengths)))
    ids = [row[:length].tolist() for row, length in zip(words, lengths, strict=True)]
    return pa.table({"sequence_id": numbers, "document_id": numbers, "token_ids": ids})


def measure(instrument: Instrument, rows: pa.Table, *, batch_tokens: int = 4096, **options):
    return measure_sequences(instrument, rows, shard=0, batch_tokens=batch_tokens, **options)


@pytest.fixture
def instrument(demo) -> Instrument:
    measured_model = MeasuredModel(demo.model, TOKEN_INPUTS, layout_of(demo.model))
    return Instrument(demo, measured_model, choose("reference"), 512, np.zeros(30522, np.int8))


@pytest.mark.sample(1)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_halves_give_the_same_numbers_as_smaller_batches(instrument, error):
    """The first layer of a failed batch, observed before the failure, is not counted."""
    rows = sequences([24] * 8)
    engine, failed = narrow(instrument.engine, 2, error)
    halved, facts = measure(replace(instrument, engine=engine), rows)
    smaller, same_facts = measure(instrument, rows, batch_tokens=2 * 24)
    assert failed == [8, 4, 4]
    assert halved == smaller
    assert facts == same_facts


def test_halves_change_numbers_by_no_more_than_the_models_rounding(instrument):
    """Lengths differ, so halves have less padding, and torch rounds float32 products of other shapes differently."""
    rows = sequences([5, 30, 17, 9, 22, 13, 28])
    engine, failed = narrow(instrument.engine, 3)
    halved, facts = measure(replace(instrument, engine=engine), rows)
    whole, same_facts = measure(instrument, rows)
    assert failed
    assert facts == same_facts  # they describe the batches as planned
    for name in ("heads", "residual"):
        for ours, theirs in zip(halved[name].columns, whole[name].columns, strict=True):
            assert ours.is_null().equals(theirs.is_null())
            if pa.types.is_floating(ours.type):
                np.testing.assert_allclose(ours.fill_null(0), theirs.fill_null(0), rtol=1e-4, atol=1e-5)
            else:
                assert ours == theirs


def test_progress_does_not_count_failed_batches(instrument):
    engine, _ = narrow(instrument.engine, 2)
    reports: list[tuple[int, int]] = []
    rows = sequences([24] * 8)
    measure(
        replace(instrument, engine=engine),
        rows,
        progress=lambda tokens, documents: reports.append((tokens, documents)),
    )
    assert [tokens for tokens, _ in reports] == [48] * 4
    assert sum(documents for _, documents in reports) == len(set(rows["document_id"].to_pylist()))


def test_a_single_sequence_that_does_not_fit_is_refused_with_advice(instrument):
    engine, _ = narrow(instrument.engine, 0)
    with pytest.raises(Refusal, match=r"one of 24 tokens does not, on cpu \(not enough memory\); use a smaller --max"):
        measure(replace(instrument, engine=engine), sequences([24, 24]))


def test_any_other_error_ends_the_shard(instrument):
    def broken(*arguments):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        measure(replace(instrument, engine=with_attend(instrument.engine, broken)), sequences([24, 24]))


class Kept(Recorder):
    """Notes what it is told to add."""

    def __init__(self) -> None:
        self.added: list[tuple[Any, list[int], float]] = []

    def keep_heads(self, layer, sums, calls):
        return {"sum": sums.values.sum()}

    def keep_site(self, site, columns):
        return {"sum": columns.sum()}

    def add(self, place, sequences, kept):
        self.added.append((place, sequences.tolist(), float(kept["sum"])))


def test_a_batch_counts_once_and_as_a_whole():
    attention = Attention("encoder", 0, heads=2)
    site = Site("mlp", 0, after=HookPoint("mlp", 0, "output"))
    ones = torch.ones(3, 2, 2, dtype=torch.float64)
    kept = Kept()
    collector = Collector([kept], Needs(), sequences=4)
    collector.begin([0, 1])
    collector.heads(attention, HeadSums(ones, ones), [])  # and then its pass fails
    collector.begin([3, 2])
    collector.heads(attention, HeadSums(ones, ones), [])
    collector.residual(site, torch.tensor([[7.0, 8.0]], dtype=torch.float64))
    assert kept.added == []
    collector.settle()
    assert kept.added == [(attention, [3, 2], 12), (site, [3, 2], 15)]
    collector.settle()
    assert len(kept.added) == 2


def options(tmp_path: Path, **changes) -> RunOptions:
    text = tmp_path / "text.txt"
    text.write_text("A run that stops one day continues on another.")
    return RunOptions(model="demo", corpus=str(text), out=tmp_path / "out", engine="reference", **changes)


def set_free_memory(monkeypatch, free: int) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)


@pytest.mark.parametrize(
    ("free", "batch_tokens"),
    [(0, 200), (100 << 20, 1024), (1 << 40, BATCH_TOKENS)],
    ids=["none", "few", "much"],
)
def test_a_batch_is_as_large_as_memory_allows_within_a_maximum_and_at_least_one_sequence(
    tmp_path, monkeypatch, free, batch_tokens
):
    set_free_memory(monkeypatch, free)
    assert plan_run(options(tmp_path, max_length=200)).identity.recipe["batch_tokens"] == batch_tokens


def test_a_resumed_run_keeps_its_batch_size_whatever_memory_is_free(tmp_path, monkeypatch):
    set_free_memory(monkeypatch, 100 << 20)
    first = plan_run(options(tmp_path)).identity
    assert first.recipe["batch_tokens"] < BATCH_TOKENS
    set_free_memory(monkeypatch, 1 << 40)
    resumed = plan_run(options(tmp_path))
    assert resumed.identity == first
    measure_shards(resumed.open_worker(), resumed.remaining)
    assert plan_run(options(tmp_path, batch_tokens=first.recipe["batch_tokens"])).remaining == []
    finish(tmp_path / "out")
    set_free_memory(monkeypatch, 0)
    assert plan_run(options(tmp_path)).is_complete
    with pytest.raises(Refusal, match=r"batch_tokens: there 1024, asked 512"):
        plan_run(options(tmp_path, batch_tokens=512))


def test_what_a_failed_pass_had_in_memory_is_released_while_its_error_is_still_there():
    """A module with hooks keeps its inputs in a closure, which the error's traceback leads to."""

    class Failing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("not enough memory, for the test")

    def run() -> weakref.ref[torch.Tensor]:
        x = torch.zeros(8)
        try:
            model(x)
        except torch.OutOfMemoryError as error:
            errors.append(error)
        return weakref.ref(x)

    model = torch.nn.Sequential(Failing())
    model[0].register_forward_hook(lambda *_: None)
    errors: list[BaseException] = []
    left = run()
    assert left() is not None
    release_memory(errors[0], torch.device("cpu"))
    assert left() is None
