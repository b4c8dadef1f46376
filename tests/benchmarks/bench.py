"""`python -m tests.benchmarks.bench [PATTERN …] [--repeats N]`: run the benchmarks, print a table, write data/bench.json."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from rich.console import Console

from tests.benchmarks import report
from tests.benchmarks.harness import Benchmark, Result

RESULTS = Path(__file__).parents[2] / "data" / "bench.json"


def benchmarks() -> tuple[Benchmark, ...]:
    """All benchmarks in the order in which they run; those with short passes are repeated more often."""
    from tests.benchmarks import answers, run, workers
    from tests.benchmarks.forward import compare_forward
    from tests.benchmarks.memory import compare_peak_memory
    from tests.benchmarks.usual import minilm_usual
    from tests.benchmarks.workloads import Workload, bert_base, gpt2, longformer, minilm, minilm_padded, mpnet

    def forward(workload: Callable[[], Workload]) -> Callable[[int], Result]:
        return lambda repeats: compare_forward(workload(), repeats)

    return (
        Benchmark("forward/minilm-128", forward(lambda: minilm(32, 128)), 15),
        Benchmark("forward/minilm-512", forward(lambda: minilm(8, 512)), 15),
        Benchmark("forward/minilm-padded", forward(lambda: minilm_padded(32, 128)), 15),
        Benchmark("forward/bert-base-128", forward(lambda: bert_base(16, 128)), 7),
        Benchmark("forward/bert-base-512", forward(lambda: bert_base(4, 512)), 7),
        Benchmark("forward/bert-base-2048", forward(lambda: bert_base(1, 2048)), 7),
        Benchmark("forward/gpt2-1024", forward(lambda: gpt2(2, 1024)), 7),
        Benchmark("by-hand/mpnet-512", forward(lambda: mpnet(2, 512)), 5),
        Benchmark("replay/longformer-2048", forward(lambda: longformer(1, 2048)), 3),
        Benchmark("run/minilm-128", run.minilm_run, 4),
        Benchmark("run/minilm-512-core", lambda repeats: run.minilm_run(repeats, run=run.CORE_512), 3),
        Benchmark("run/minilm-512-all", lambda repeats: run.minilm_run(repeats, run=run.ALL_512), 3),
        Benchmark("workers/minilm-512", workers.two_processes, 3),
        Benchmark("usual/minilm-512", lambda repeats: minilm_usual(minilm(8, 512), repeats, at_once=8), 7),
        Benchmark("usual-by-one/minilm-512", lambda repeats: minilm_usual(minilm(8, 512), repeats, at_once=1), 7),
        Benchmark("memory/bert-base-8192", lambda _: compare_peak_memory(8192, 12), 1),
        Benchmark("memory/one-layer-32768", lambda _: compare_peak_memory(32768, 1), 1, by_name_only=True),
        Benchmark("planning/minilm-512", run.minilm_planning, 2),
        Benchmark("bytes-per-token/minilm-512", run.minilm_dataset_bytes, 1),
        Benchmark("bytes-per-row/heads", run.minilm_heads_bytes, 1),
        Benchmark("bytes-read/one-head-256", lambda _: answers.one_head_bytes(256), 1),
        Benchmark("bytes-read/one-head-4096", lambda _: answers.one_head_bytes(4096), 1),
        *(
            Benchmark(f"answers/{name}-{size}", partial(measure, rows), repeats, by_name_only=size == "100m")
            for size, rows, repeats in (("10m", 10**7, 3), ("100m", 10**8, 1))
            for name, measure in (
                ("means", answers.means),
                ("means-of-source", answers.means_of_source),
                ("compare", answers.paired_comparison),
                ("report", answers.report_page),
            )
        ),
    )


def select(everything: Sequence[Benchmark], patterns: Sequence[str]) -> list[Benchmark]:
    """The benchmarks that match a pattern, or all; `by_name_only` ones need their full name. Raises ValueError if nothing matches."""
    for pattern in patterns:
        if not any(fnmatchcase(b.name, pattern) for b in everything):
            names = ", ".join(b.name for b in everything)
            raise ValueError(f"a pattern matches a benchmark's name; {pattern!r} matches none of {names}")
    return [
        b
        for b in everything
        if b.name in patterns or (not b.by_name_only and any(fnmatchcase(b.name, p) for p in patterns or ["*"]))
    ]


def main() -> None:
    start = report.Clock.now()
    selected, repeats = _parse_arguments()
    import torch

    from attlas.extract.memory import keep_freed_memory

    keep_freed_memory(longest=2048)  # as in a run; for both sides, whichever benchmark comes first
    console = Console(width=None if os.isatty(1) else 140, highlight=False)
    console.print(report.machine())
    threads = torch.get_num_threads()
    results: dict[str, Result] = {}
    for benchmark in selected:
        began = report.Clock.now()
        result = results[benchmark.name] = benchmark.measure(repeats or benchmark.repeats)
        assert torch.get_num_threads() == threads, f"{benchmark.name} changed the number of threads"
        report.write(RESULTS, {benchmark.name: result})
        console.print(f"{benchmark.name}: {result.ratio:.3f}, {began.until(report.Clock.now())}", style="dim")
    console.print()
    report.show(results, console)
    total = start.until(report.Clock.now())
    console.print(f"\n{report.LEGEND}\n\nwritten to {RESULTS}, {total}")
    console.print(total.warning, style="bold red")


def _parse_arguments() -> tuple[list[Benchmark], int | None]:
    """The benchmarks and the number of repeats from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a name or a pattern, such as 'forward/*'; default: all"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="repeats of each benchmark; default: its own number")
    arguments = parser.parse_args()
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error(f"--repeats is at least 1; got {arguments.repeats}")
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")  # read when tqdm and the hub are imported
    try:
        return select(benchmarks(), arguments.names), arguments.repeats
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
