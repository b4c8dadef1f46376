"""workers/*: two processes of one thread each, on two cores, against one of them alone.

Each process is a share of one run, as a job of a batch system is. Loading the model is not timed; the processes begin together.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from attlas.extract.options import RunOptions
from tests.benchmarks.harness import Result, alternate
from tests.benchmarks.run import CORE_512, scratch_folder

RUN = CORE_512.model_copy(update={"limit": 40, "shard_sequences": 16})
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Measured:
    """What one process did. Seconds of the machine's own clock, which all its processes share."""

    began: float
    ended: float
    tokens: int


def two_processes(repeats: int) -> Result:
    """Tokens per second of two processes, and of one."""
    numbers = itertools.count()
    tokens: list[int] = []

    def seconds(processes: int) -> float:
        options = RUN.model_copy(update={"out": scratch_folder() / f"workers-{next(numbers)}"}).options()
        measured = measure_together(options, processes)
        tokens.append(sum(m.tokens for m in measured))
        return max(m.ended for m in measured) - min(m.began for m in measured)

    timed = alternate(partial(seconds, 2), partial(seconds, 1), repeats=repeats)
    assert len(set(tokens)) == 1, "every run measures the same corpus"
    return timed.rates(tokens[0], "tokens/s")


def measure_together(options: RunOptions, processes: int) -> list[Measured]:
    """Measure the shares of a new run, one in each process."""
    from attlas.extract.run import plan_run

    planned = plan_run(options)
    if planned.lock is not None:
        planned.lock.release()
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    start, done = context.Barrier(processes), context.Queue()
    started = [
        context.Process(target=_measure_share, args=(options, f"{n + 1}/{processes}", start, done))
        for n in range(processes)
    ]
    for process in started:
        process.start()
    measured = [done.get(timeout=_PATIENCE_S) for _ in started]
    for process in started:
        process.join()
    return measured


def _measure_share(options: RunOptions, named: str, start: Any, done: Any) -> None:
    import torch

    from attlas.extract.run import measure_shard, open_worker
    from attlas.extract.share import Share

    torch.set_num_threads(1)
    worker = open_worker(options)
    shards = Share.named(named).of_shards(worker.plan.to_measure)
    start.wait(_PATIENCE_S)
    began = time.monotonic()
    for shard in shards:
        measure_shard(worker, shard)
    tokens = sum(sum(worker.rows_of(shard)[0]["tokens"].to_pylist()) for shard in shards)
    done.put(Measured(began, time.monotonic(), tokens))
