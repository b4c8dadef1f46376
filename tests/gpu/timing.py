"""Timing of passes on the device, and what the profiler shows of one."""

from __future__ import annotations

import cProfile
import gc
import json
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.gpu.machine import DEVICE, IS_REHEARSAL, synchronize

Pass = Callable[[], object]
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_RUNTIME = ("cuda_runtime", "cuda_driver")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_LONGEST_KERNELS, _LONGEST_FUNCTIONS = 12, 15


def milliseconds(act: Pass) -> float:
    """Wall-clock time from an idle device to an idle device."""
    synchronize()
    start = time.perf_counter()
    act()
    synchronize()
    return (time.perf_counter() - start) * 1000


def time_alternately(sides: Mapping[str, Pass], *, warm_up: int = 3, repeats: int = 7) -> dict[str, list[float]]:
    """Milliseconds of each side, which take turns; the one that goes first changes as well."""
    if IS_REHEARSAL:
        warm_up, repeats = 1, 1
    for _ in range(warm_up):
        for act in sides.values():
            act()
    gc.collect()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(milliseconds(sides[name]))
    return times


def rate(times: Mapping[str, Sequence[float]], tokens: int) -> dict[str, Any]:
    """Medians of both sides, and the plain pass's time ÷ ours, which is the ratio of their tokens/s."""
    ours, plain = median(times["ours"]), median(times["plain"])
    paired = [p / o for o, p in zip(times["ours"], times["plain"], strict=True)]
    return {
        "plain_ms": plain,
        "ours_ms": ours,
        "ratio": plain / ours,
        "ratio_range": [min(paired), max(paired)],
        "tokens_per_s": tokens / ours * 1000,
        "plain_tokens_per_s": tokens / plain * 1000,
    }


def kernel_time(act: Pass) -> float:
    """Median milliseconds of a short call, by the device's own clock."""
    if IS_REHEARSAL:
        return milliseconds(act)
    from triton.testing import do_bench

    median_ms: Any = do_bench(act, warmup=25, rep=100, return_mode="median")
    return median_ms


def profile(act: Pass) -> dict[str, Any]:
    """What one pass did on the device and asked of it: busy time, launches, waits, copies, the longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorder

    activities = [ProfilerActivity.CPU] + ([] if IS_REHEARSAL else [ProfilerActivity.CUDA])
    act()
    synchronize()
    with recorder(activities=activities) as recorded:
        start = time.perf_counter()
        act()
        synchronize()
        wall = (time.perf_counter() - start) * 1000
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("ph") == "X"]
    return {"wall_ms": wall} | summarise(events)


def summarise(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The profile of a trace's events, in the form of Chrome's traces; their times are microseconds."""
    on_gpu = [e for e in events if e.get("cat") in _ON_GPU]
    calls = Counter(e["name"] for e in events if e.get("cat") in _RUNTIME)
    waited = sum(e["dur"] for e in events if e.get("cat") in _RUNTIME and e["name"] in _WAITS)
    operators = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "cpu_op"]
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in on_gpu:
        times[event["name"]] += event["dur"]
        launches[event["name"]] += 1
    return {
        "gpu_busy_ms": covered([(e["ts"], e["ts"] + e["dur"]) for e in on_gpu]) / 1000,
        "launches": sum(count for name, count in calls.items() if "Launch" in name),
        "waits": {name: calls[name] for name in _WAITS if calls[name]},
        "waited_ms": waited / 1000,
        "host_operators_ms": covered(operators) / 1000,
        "copies": dict(Counter(e["name"] for e in on_gpu if e["cat"] == "gpu_memcpy")),
        "kernels": [
            {"name": name[:120], "ms": ms / 1000, "launches": launches[name]}
            for name, ms in times.most_common(_LONGEST_KERNELS)
        ],
    }


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def python_profile(act: Pass) -> list[dict[str, Any]]:
    """The Python functions that took the most time of their own in one pass; the profiler itself slows calls."""
    recorder = cProfile.Profile()
    recorder.runcall(act)
    synchronize()
    found = pstats.Stats(recorder).stats  # pyright: ignore[reportAttributeAccessIssue]
    longest = sorted(found.items(), key=lambda item: -item[1][2])[:_LONGEST_FUNCTIONS]
    return [
        {
            "function": f"{'/'.join(Path(file).parts[-2:])}:{line} {name}",
            "calls": calls,
            "own_ms": own * 1000,
            "all_ms": with_callees * 1000,
        }
        for (file, line, name), (_, calls, own, with_callees, _) in longest
    ]


def peak_mib(act: Pass) -> float:
    """Peak growth of the memory that torch allocates on the device."""
    if DEVICE == "cpu":
        act()
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    act()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
