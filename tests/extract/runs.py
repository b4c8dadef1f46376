"""Whole runs, for tests."""

from pathlib import Path

from attlas.extract.options import RunOptions
from attlas.extract.run import PlannedRun, finish, measure_shards, plan_run


def complete_run(options: RunOptions) -> PlannedRun:
    """Plan a run, measure its remaining shards and finish it."""
    planned = plan_run(options)
    if not planned.is_complete:
        measure_shards(planned.open_worker(), planned.remaining)
    finish(options.out, card=options.card)
    return planned


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
