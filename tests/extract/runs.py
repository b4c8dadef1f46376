"""Whole runs, for tests."""

from pathlib import Path

from attlas.extract.instrument import Instrument
from attlas.extract.options import RunOptions
from attlas.extract.run import PlannedRun, finish, measure_shards, plan_run


def complete_run(options: RunOptions, *, instrument: Instrument | None = None) -> PlannedRun:
    """Plan a run, measure its remaining shards and finish it. instrument: the model, if it is loaded already."""
    planned = plan_run(options, instrument=instrument)
    if not planned.is_complete:
        measure_shards(planned.open_worker(), planned.remaining)
    finish(options.out, card=options.card)
    return planned


def small_run(model: Path, folder: Path, text: str) -> RunOptions:
    """A run of a text into `folder/out`, in shards of two sequences of 12 tokens."""
    corpus = folder / "text.txt"
    corpus.write_text(text)
    return RunOptions(
        model=str(model), corpus=str(corpus), out=folder / "out", max_length=12, shard_sequences=2, engine="reference"
    )


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
