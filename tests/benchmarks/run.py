"""run/* and bytes-per-row/*: `attlas run` from tokenisation to Parquet and manifest.

Loading the model and starting Prefect are excluded: their cost does not depend on the corpus.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import torch
from torch import nn

from attlas.extract import pipeline
from attlas.extract.job import Job, RunOptions
from attlas.extract.model.encoder import Encoder
from attlas.extract.store import open_dataset, parts_of
from tests.benchmarks.harness import Result, time_alternately
from tests.benchmarks.workloads import demo

ROOT = Path(__file__).parents[2]
OPTIONS = RunOptions(model="demo", corpus="demo", out=Path(), max_length=128, device="cpu", dtype="float32")
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class FirstRun:
    """An untimed first run, for warm-up: its dataset, and the inputs that the model was given."""

    folder: Path
    dataset: Path
    batches: list[Inputs]
    tokens: int


def compare_run(first: FirstRun, options: RunOptions, encoder: Encoder, repeats: int) -> Result:
    """Compare whole runs, each in a new folder, with plain passes over the batches of the first run."""
    numbers = itertools.count()

    def ours() -> None:
        run_once(replace(options, out=first.folder / f"run-{next(numbers)}"), encoder)

    def theirs() -> None:
        with torch.inference_mode():
            for inputs in first.batches:
                encoder.model(**inputs)

    return time_alternately(ours, theirs, repeats=repeats).rates(first.tokens, "tokens/s")


def run_once(options: RunOptions, encoder: Encoder) -> Path:
    """Plan, measure and finish a run with a loaded model; returns the dataset's folder."""
    return _measure(_job(options, encoder))


def _job(options: RunOptions, encoder: Encoder) -> Job:
    with patch.object(pipeline, "load_encoder", lambda *_, **__: encoder):
        return pipeline.prepare(options)


def _measure(job: Job) -> Path:
    pipeline.measure_shards(job, job.remaining)
    pipeline.finish(job)
    return Path(str(job.options.out))


def first_run(options: RunOptions, encoder: Encoder, folder: Path) -> FirstRun:
    # examines the model, in passes that are not batches of the run
    job = _job(replace(options, out=folder / "first"), encoder)
    with record_inputs(encoder.model) as batches:
        dataset = _measure(job)
    _, manifest = open_dataset(dataset)
    return FirstRun(folder, dataset, batches, manifest["corpus"]["tokens"])


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
    """A temporary folder for runs, deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "data")


@cache
def _first() -> FirstRun:
    return first_run(OPTIONS, demo(), Path(_scratch().name))


def minilm_run(repeats: int) -> Result:
    return compare_run(_first(), OPTIONS, demo(), repeats)


def minilm_heads_bytes(repeats: int) -> Result:
    return heads_bytes(_first().dataset)
