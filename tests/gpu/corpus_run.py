"""A whole run over the demo corpus, repeated, and the plain passes over its batches."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from attlas.extract.instrument import Instrument, open_instrument
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shards, plan_run
from tests.gpu.machine import DEVICE, IS_REHEARSAL, demo_folder
from tests.gpu.timing import milliseconds
from tests.gpu.workloads import DTYPE


def compare_run(*, copies: int, documents: int | None = None) -> dict[str, Any]:
    """Tokens/s of a run from text to Parquet and manifest, without loading the model, ÷ those of plain passes."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus.jsonl", copies=copies, documents=documents)
        options = RunOptions(
            model=demo_folder(),
            corpus=str(corpus),
            out=Path(folder) / "warm-up",
            device=DEVICE,
            dtype=str(DTYPE).removeprefix("torch."),
            engine="auto" if not IS_REHEARSAL else "reference",
            max_length=32 if IS_REHEARSAL else 256,
            limit=2 if IS_REHEARSAL else 100,
        )
        instrument = open_instrument(options, images=None, progress=lambda *_: None)
        _timed_run(options, instrument)
        shutil.rmtree(options.out)
        return _compare(_with(options, out=Path(folder) / "out", limit=2 if IS_REHEARSAL else None), instrument)


def _compare(options: RunOptions, instrument: Instrument) -> dict[str, Any]:
    batches: list[Mapping[str, Any]] = []
    model = instrument.encoder.model
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs), with_kwargs=True)
    try:
        seconds = _timed_run(options, instrument)
    finally:
        handle.remove()
    tokens = json.loads((Path(options.out) / "manifest.json").read_text())["corpus"]["tokens"]

    def plain() -> None:
        with torch.inference_mode():
            for inputs in batches:
                model(**inputs)

    plain()
    plain_ms = median(milliseconds(plain) for _ in range(3))
    ours_ms = sum(seconds.values()) * 1000
    return {
        "plain_ms": plain_ms,
        "ours_ms": ours_ms,
        "ratio": plain_ms / ours_ms,
        "tokens_per_s": tokens / ours_ms * 1000,
        "plain_tokens_per_s": tokens / plain_ms * 1000,
        "tokens": tokens,
        "batches": len(batches),
        "seconds": seconds,
    }


def _timed_run(options: RunOptions, instrument: Instrument) -> dict[str, float]:
    """Seconds of the steps of a run with a loaded model."""
    seconds: dict[str, float] = {}
    planned = _timed(seconds, "plan", partial(plan_run, options, instrument=instrument))
    worker = planned.open_worker()
    _timed(seconds, "measure", partial(measure_shards, worker, planned.remaining))
    _timed(seconds, "finish", partial(finish, options.out))
    return seconds


def _timed(seconds: dict[str, float], name: str, act: Any) -> Any:
    start = time.perf_counter()
    result = act()
    seconds[name] = time.perf_counter() - start
    return result


def _with(options: RunOptions, **changes: Any) -> RunOptions:
    return RunOptions(**vars(options) | changes)


def write_corpus(path: Path, *, copies: int, documents: int | None = None) -> Path:
    """The demo corpus as JSONL, `copies` times, every time as separate documents."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)][:documents]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(lines * copies), "utf-8")
    return path
