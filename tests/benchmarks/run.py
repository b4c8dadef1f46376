"""run/* and bytes-per-row/*: `attlas run` from tokenization to Parquet and manifest, in its own Prefect flow.

Loading the model, starting Prefect's server, and the start and end of the flow (together about a second) are not timed: their
cost does not depend on the corpus.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import nn

from attlas.extract.instrument import Instrument, open_instrument
from attlas.extract.run import plan_run
from attlas.extract.store import open_dataset, parts_of
from attlas.flows.config import Run
from tests.benchmarks.harness import Result, alternate, time_call

ROOT = Path(__file__).parents[2]
RUN = Run(model="demo", corpus="demo", out=Path("out"), max_length=128, device="cpu", dtype="float32")
CORE_512 = RUN.model_copy(update={"max_length": 512, "limit": 25})
ALL_512 = CORE_512.model_copy(update={"statistics": "all"})
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class FirstRun:
    """An untimed first run, for warm-up: its dataset, and the inputs of the model, batch by batch."""

    folder: Path
    dataset: Path
    instrument: Instrument
    batches: list[Inputs]
    tokens: int


def compare_run(first: FirstRun, run: Run, repeats: int) -> Result:
    """Compare whole runs, each in a new folder, with plain passes over the batches of the first run."""
    numbers = itertools.count()

    def ours() -> float:
        return write_dataset(run.model_copy(update={"out": first.folder / f"run-{next(numbers)}"}), first.instrument)

    def theirs() -> None:
        with torch.inference_mode():
            for inputs in first.batches:
                first.instrument.encoder.model(**inputs)

    with prefect_running():
        return alternate(ours, partial(time_call, theirs), repeats=repeats).rates(first.tokens, "tokens/s")


def write_dataset(run: Run, instrument: Instrument) -> float:
    """Do everything that the flow of `attlas run` does, except the report, with a loaded model; returns its seconds."""
    from prefect import flow

    from attlas.flows import measure
    from attlas.flows.runners import task_runner

    measure.instruments[run] = instrument
    timed = flow(
        lambda run: time_call(partial(measure.write_dataset, run)), name="benchmark", task_runner=task_runner()
    )
    try:
        return timed(run)
    finally:
        measure.release(run)


@contextmanager
def prefect_running() -> Iterator[None]:
    """A temporary Prefect server, set up as `attlas run` does."""
    from attlas.flows.environment import prepare_environment, set_quiet_defaults

    set_quiet_defaults()
    prepare_environment()
    from attlas.flows.server import prefect_connected, temporary_server

    with temporary_server() as server, prefect_connected(server):
        yield


def first_run(run: Run, folder: Path) -> FirstRun:
    run = run.model_copy(update={"out": folder / "first"})
    # examines the model, in passes that are not batches of the run
    instrument = open_instrument(run.options(), images=None, progress=lambda *_: None)
    with prefect_running(), record_inputs(instrument.encoder.model) as batches:
        write_dataset(run, instrument)
    _, manifest = open_dataset(run.out)
    return FirstRun(folder, run.out, instrument, batches, manifest["corpus"]["tokens"])


@contextmanager
def record_inputs(model: nn.Module) -> Iterator[list[Inputs]]:
    """The inputs of every call of the model in this context."""
    calls: list[Inputs] = []
    # a run passes all inputs by name
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def dataset_bytes(dataset: Path) -> Result:
    """Bytes of all parts per token, compared with those of the patterns in half precision, which the usual way would keep."""
    _, manifest = open_dataset(dataset)
    lengths = [length for part in parts_of(manifest, "sequences") for length in _lengths(dataset / part.path)]
    heads = sum(stack["layers"] * stack["heads"] for stack in manifest["model"]["stacks"])
    patterns = 2 * heads * sum(length**2 for length in lengths)
    stored = sum(part.bytes for table in manifest["tables"] for part in parts_of(manifest, table))
    tokens = sum(lengths)
    return Result(stored / tokens, patterns / tokens, "bytes/token", note=f"{tokens:,} tokens")


def _lengths(part: Path) -> list[int]:
    return pq.read_table(part, columns=["tokens"])["tokens"].to_pylist()


def compare_planning(first: FirstRun, run: Run, repeats: int) -> Result:
    """Tokens per second of planning, which the driver does alone, compared with whole runs on this machine."""
    numbers = itertools.count()

    def ours() -> float:
        options = run.model_copy(update={"out": first.folder / f"plan-{next(numbers)}"}).options()
        return time_call(partial(plan_run, options, instrument=first.instrument))

    def theirs() -> float:
        return write_dataset(run.model_copy(update={"out": first.folder / f"whole-{next(numbers)}"}), first.instrument)

    with prefect_running():
        return alternate(ours, theirs, repeats=repeats).rates(first.tokens, "tokens/s")


def heads_bytes(dataset: Path) -> Result:
    """Bytes on disk per row of `heads`, compared with the same parts written with pyarrow's defaults."""
    _, manifest = open_dataset(dataset)
    parts = list(parts_of(manifest, "heads"))
    rows = sum(part.rows for part in parts)
    default_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        for part in parts:
            pq.write_table(pq.read_table(dataset / part.path), path)
            default_bytes += path.stat().st_size
    return Result(sum(part.bytes for part in parts) / rows, default_bytes / rows, "bytes/row", note=f"{rows:,} rows")


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "data")


def scratch_folder() -> Path:
    """A temporary folder for runs, deleted when the process ends."""
    return Path(_scratch().name)


@cache
def _first(run: Run) -> FirstRun:
    return first_run(run, scratch_folder() / f"{run.max_length}-{run.statistics}")


def minilm_run(repeats: int, *, run: Run = RUN) -> Result:
    return compare_run(_first(run), run, repeats)


def minilm_dataset_bytes(repeats: int) -> Result:
    return dataset_bytes(_first(CORE_512).dataset)


def minilm_planning(repeats: int) -> Result:
    return compare_planning(_first(CORE_512), CORE_512, repeats)


def minilm_heads_bytes(repeats: int) -> Result:
    return heads_bytes(_first(RUN).dataset)
