"""run/* and bytes-per-row/*: what `attlas run` does from tokenisation to Parquet and manifest.

The model is in memory already and there is no Prefect: both cost the same however large the corpus is.
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
from tests.benchmarks.harness import Result, interleaved
from tests.benchmarks.workloads import demo

ROOT = Path(__file__).parents[2]
OPTIONS = RunOptions(model="demo", corpus="demo", out=Path(), max_length=128, device="cpu", dtype="float32")
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class FirstRun:
    """A run that nobody timed: it warmed everything up, its dataset is there, and what the model was given is kept."""

    folder: Path
    dataset: Path
    batches: list[Inputs]
    tokens: int


def run_against_plain(first: FirstRun, options: RunOptions, encoder: Encoder, repeats: int) -> Result:
    """Whole runs, each in a folder of its own, against plain passes over the very batches that the first one made."""
    numbers = itertools.count()

    def ours() -> None:
        measured_run(replace(options, out=first.folder / f"run-{next(numbers)}"), encoder)

    def theirs() -> None:
        with torch.inference_mode():
            for inputs in first.batches:
                encoder.model(**inputs)

    return interleaved(ours, theirs, repeats=repeats).rates(first.tokens, "tokens/s")


def measured_run(options: RunOptions, encoder: Encoder) -> Path:
    """Plan, measure, finish; gives the dataset's folder. The model is not loaded again."""
    return _measured(_job(options, encoder))


def _job(options: RunOptions, encoder: Encoder) -> Job:
    with patch.object(pipeline, "load_encoder", lambda *_, **__: encoder):
        return pipeline.prepare(options)


def _measured(job: Job) -> Path:
    pipeline.measure_shards(job, job.remaining)
    pipeline.finish(job)
    return Path(str(job.options.out))


def first_run(options: RunOptions, encoder: Encoder, folder: Path) -> FirstRun:
    job = _job(
        replace(options, out=folder / "first"), encoder
    )  # examines the model, in passes that are no batches of the run
    with recording(encoder.model) as batches:
        dataset = _measured(job)
    _, manifest = open_dataset(dataset)
    return FirstRun(folder, dataset, batches, manifest["corpus"]["tokens"])


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Inputs]]:
    """What the model is given inside this context, call by call."""
    calls: list[Inputs] = []
    # inputs come by name alone: a run makes them so
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def heads_bytes(dataset: Path) -> Result:
    """Bytes on disk per row of `heads`, against the same parts as pyarrow writes them when told nothing."""
    _, manifest = open_dataset(dataset)
    parts = list(parts_of(manifest, "heads"))
    rows = sum(part.rows for part in parts)
    plain = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        for part in parts:
            pq.write_table(pq.read_table(dataset / part.path), path)
            plain += path.stat().st_size
    return Result(sum(part.bytes for part in parts) / rows, plain / rows, "bytes/row", note=f"{rows:,} rows")


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder where runs write by default, gone when the process ends."""
    return tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "data")


@cache
def _first() -> FirstRun:
    return first_run(OPTIONS, demo(), Path(_scratch().name))


def minilm_run(repeats: int) -> Result:
    return run_against_plain(_first(), OPTIONS, demo(), repeats)


def minilm_heads_bytes(repeats: int) -> Result:
    return heads_bytes(_first().dataset)
