"""`python -m tests.benchmarks.bench [PATTERN …] [--repeats N]`: run the benchmarks, print a table, write data/bench.json."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console

from tests.benchmarks import report
from tests.benchmarks.harness import Benchmark, Result

RESULTS = Path(__file__).parents[2] / "data" / "bench.json"


def benchmarks() -> tuple[Benchmark, ...]:
    """All of them, in the order in which they run; those whose passes are short repeat more."""
    from tests.benchmarks import run
    from tests.benchmarks.forward import measured_against_plain
    from tests.benchmarks.memory import growth_against_plain
    from tests.benchmarks.usual import minilm_usual
    from tests.benchmarks.workloads import Workload, bert_base, gpt2, longformer, minilm, minilm_padded, mpnet

    def forward(workload: Callable[[], Workload]) -> Callable[[int], Result]:
        return lambda repeats: measured_against_plain(workload(), repeats)

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
        Benchmark("usual/minilm-512", lambda repeats: minilm_usual(minilm(8, 512), repeats, at_once=8), 7),
        Benchmark("usual-by-one/minilm-512", lambda repeats: minilm_usual(minilm(8, 512), repeats, at_once=1), 7),
        Benchmark("memory/bert-base-8192", lambda _: growth_against_plain(8192, 12), 1),
        Benchmark("memory/one-layer-32768", lambda _: growth_against_plain(32768, 1), 1, waits=True),
        Benchmark("bytes-per-row/heads", run.minilm_heads_bytes, 1),
    )


def chosen(everything: Sequence[Benchmark], patterns: Sequence[str]) -> list[Benchmark]:
    """Those that a pattern matches, or all; one that waits must be named in full. Raises ValueError for no match."""
    for pattern in patterns:
        if not any(fnmatchcase(b.name, pattern) for b in everything):
            names = ", ".join(b.name for b in everything)
            raise ValueError(f"a pattern matches a benchmark's name; {pattern!r} matches none of {names}")
    return [
        b
        for b in everything
        if b.name in patterns or (not b.waits and any(fnmatchcase(b.name, p) for p in patterns or ["*"]))
    ]


def main() -> None:
    started = report.Clock.now()
    picked, repeats = _asked_for()
    import torch

    from attlas.extract.memory import keep_freed_memory

    keep_freed_memory(
        longest=2048
    )  # a run does so for its whole process: both sides have it, whichever benchmark comes first
    console = Console(width=None if os.isatty(1) else 140, highlight=False)
    console.print(report.machine())
    threads = torch.get_num_threads()
    results: dict[str, Result] = {}
    for benchmark in picked:
        begun = report.Clock.now()
        result = results[benchmark.name] = benchmark.measure(repeats or benchmark.repeats)
        assert torch.get_num_threads() == threads, f"{benchmark.name} left its sides with different numbers of threads"
        report.write(RESULTS, {benchmark.name: result})
        console.print(f"{benchmark.name}: {result.ratio:.3f}, {begun.until(report.Clock.now())}", style="dim")
    console.print()
    report.show(results, console)
    whole = started.until(report.Clock.now())
    console.print(f"\n{report.LEGEND}\n\nwritten to {RESULTS}, {whole}")
    console.print(whole.warning, style="bold red")


def _asked_for() -> tuple[list[Benchmark], int | None]:
    """The benchmarks that the command line names, and the number of turns where it gives one."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a name or a pattern, such as 'forward/*'; default: all"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="turns of each; default: a number of its own")
    asked = parser.parse_args()
    if asked.repeats is not None and asked.repeats < 1:
        parser.error(f"--repeats is at least 1; got {asked.repeats}")
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")  # read when tqdm and the hub are imported
    try:
        return chosen(benchmarks(), asked.names), asked.repeats
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
