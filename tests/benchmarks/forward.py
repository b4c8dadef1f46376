"""forward/*: tokens per second of a measured forward pass and of the plain one."""

from __future__ import annotations

from tests.benchmarks.harness import Result, time_alternately
from tests.benchmarks.workloads import Workload, measured_pass, plain_pass


def compare_forward(work: Workload, repeats: int) -> Result:
    ours, theirs = measured_pass(work), plain_pass(work)
    for _ in range(2):  # warm-up: compile and allocate
        ours()
        theirs()
    return time_alternately(ours, theirs, repeats=repeats).rates(work.tokens, "tokens/s")
