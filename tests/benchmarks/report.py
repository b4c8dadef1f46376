"""The output of the benchmarks: a table, and data/bench.json."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from tests.benchmarks.harness import Result

LEGEND = """\
ratio is ours ÷ theirs, each the fastest of its runs; median and range are of the ratios of neighbouring runs
forward/*  tokens/s of a measured forward pass, with the core columns, against the plain one (padding does not count)
by-hand/*  the same for a model that computes softmax itself, replay/* for one whose attention is run again
run/*      tokens/s from tokenisation to Parquet and manifest, against plain passes over the same batches; without loading
           the model and starting Prefect, whose cost does not depend on the corpus; -core and -all: with these statistics
usual/*    tokens/s from a batch to Parquet, against eager patterns, hooks and the same statistics in torch, in a separate
           process with torch's default allocator; usual-by-one gives its model one sequence at a time
workers/*  tokens/s of two processes of one core each, against one of them; planning/* of planning, against a whole run
bytes-per-token/*  of all tables, against all patterns in half precision
memory/*   peak growth of the process, against the plain pass, and the difference
bytes/*    bytes of a `heads` row on disk, against pyarrow's defaults
bytes-read/*  of a `heads` part, by a reader of one head, against the whole part; in shards of 256 or 4,096 sequences
answers/*  seconds, less is better: analyses of 10 or 100 million rows of `heads`, 35 columns, against a bare scan and mean of
           the same columns by Polars (compare: against two); with the peak growth of the process"""


def machine() -> str:
    """One line on the machine, its load and the engine."""
    import torch

    from attlas.extract.engines import choose

    load = os.getloadavg()[0]
    return (
        f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"engine {choose('auto').name}, load {load:.1f} at the start"
    )


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@dataclass(frozen=True)
class Clock:
    """A moment: wall-clock seconds, CPU seconds of all cores, and those of this process."""

    wall: float
    all: float
    own: float

    @classmethod
    def now(cls) -> Clock:
        user, nice, system, _idle, _wait, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:9])
        ticks = user + nice + system + sum(interrupts)
        return cls(time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]))

    def until(self, later: Clock) -> Span:
        others = (later.all - self.all) - (later.own - self.own)
        wall = later.wall - self.wall
        return Span(wall, max(0.0, others) / (wall * (os.cpu_count() or 1)))


@dataclass(frozen=True)
class Span:
    """A duration, and the share of all cores that other processes used meanwhile."""

    seconds: float
    others: float

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s, {self.others:.0%} of the cores taken by others"

    @property
    def warning(self) -> str:
        # a shared core slows both sides, but not equally: thread pools wait for their slowest thread
        return "the machine was not idle: ratios are unreliable; run it again" if self.others > 0.05 else ""


def show(results: Mapping[str, Result], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for name in ("ratio", "ours", "theirs"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("unit", "median (range)", ""):
        table.add_column(name, no_wrap=True)
    for name, result in results.items():
        sizes = (f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in (result.ours, result.theirs))
        table.add_row(name, f"{result.ratio:.3f}", *sizes, result.unit, spread(result), result.note)
    console.print(table)


def spread(result: Result) -> str:
    """Median and range of the paired ratios."""
    if not result.paired:
        return ""
    return f"{median(result.paired):.3f} ({min(result.paired):.3f}–{max(result.paired):.3f})"


def write(path: Path, results: Mapping[str, Result]) -> None:
    """Write results to the file, replacing those of the same names and keeping others."""
    entries = {entry["name"]: entry for entry in json.loads(path.read_text())} if path.exists() else {}
    entries |= {
        name: {"name": name, "ratio": r.ratio, "ours": r.ours, "theirs": r.theirs, "unit": r.unit}
        for name, r in results.items()
    }
    path.write_text(json.dumps(list(entries.values()), indent=1) + "\n")
