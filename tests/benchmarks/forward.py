"""forward/*: a measured forward pass against the plain one, tokens per second."""

from __future__ import annotations

from tests.benchmarks.harness import Result, interleaved
from tests.benchmarks.workloads import Workload, measured_pass, plain_pass


def measured_against_plain(work: Workload, repeats: int) -> Result:
    ours, theirs = measured_pass(work), plain_pass(work)
    for _ in range(2):  # compiled and warm before anything counts
        ours()
        theirs()
    return interleaved(ours, theirs, repeats=repeats).rates(work.tokens, "tokens/s")
