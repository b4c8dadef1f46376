"""What is printed and what is written."""

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
ratio is ours ÷ theirs, each the quickest of its runs; median and range are those of the ratios of neighbouring runs
forward/*  tokens/s of a measured forward pass, every column included, against the plain one (real tokens alone count)
by-hand/*  the same of a model that computes softmax by itself, replay/* of one whose attention is run again
run/*      tokens/s from tokenisation to Parquet and manifest, against plain passes over the same batches; the model's
           loading and Prefect's start are left out: they cost the same however large the corpus is
usual/*    tokens/s from a batch to Parquet, against eager patterns, hooks and the same statistics in torch, in a process of its
           own with torch's allocator as it is; usual-by-one gives its model one sequence at a time
memory/*   growth of the process at its peak, and its difference, against the plain pass
bytes/*    of a `heads` row on disk, against pyarrow's defaults"""


def machine() -> str:
    """The machine and what computes on it, in a line."""
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
    """A moment: seconds on the wall, seconds that all cores have worked, and those of them that this process had."""

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
    """Seconds, and the share of all cores that other processes had meanwhile."""

    seconds: float
    others: float

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s, {self.others:.0%} of the cores taken by others"

    @property
    def warning(self) -> str:
        # a core that is shared slows both sides, but not alike: pools of threads wait for their slowest one
        return "the machine was not quiet; believe no ratio and run it again" if self.others > 0.05 else ""


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
    """Median, least and largest of the paired ratios."""
    if not result.paired:
        return ""
    return f"{median(result.paired):.3f} ({min(result.paired):.3f}–{max(result.paired):.3f})"


def write(path: Path, results: Mapping[str, Result]) -> None:
    """Put these results in the place of earlier ones of the same name; others stay."""
    held = {entry["name"]: entry for entry in json.loads(path.read_text())} if path.exists() else {}
    held |= {
        name: {"name": name, "ratio": r.ratio, "ours": r.ours, "theirs": r.theirs, "unit": r.unit}
        for name, r in results.items()
    }
    path.write_text(json.dumps(list(held.values()), indent=1) + "\n")
