"""`python3 -m tests.gpu.bench [--only PATTERN …] [--seconds N] [--copies N] [--sweep]`: the benchmark on a GPU.

Prints a table and writes it with all numbers to --out. A benchmark that fails is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.gpu import machine, report

Numbers = dict[str, Any]
ERROR, SKIPPED = "error", "skipped"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, with the floor and the aim of its ratio, or of its memory in MiB."""

    name: str
    measure: Callable[[], Numbers]
    floor: float | None = None
    aim: float | None = None


def benchmarks(*, copies: int) -> tuple[Benchmark, ...]:
    """All benchmarks, in the order in which they run: those that explain the others first."""
    from tests.gpu.corpus_run import compare_run
    from tests.gpu.workloads import bert_base, llama_1b, minilm

    def forward(workload: Callable[[int], Any], tokens: int) -> Callable[[], Numbers]:
        return lambda: compare_forward(workload(tokens))

    call = dict(batch=4, heads=12, tokens=4096, width=64)
    return (
        Benchmark("attention/4096x64", lambda: compare_attention(**call), 0.3, 0.8),
        Benchmark("forward/minilm-128", forward(minilm, 128), 0.6, 0.9),
        Benchmark("forward/bert-base-512", forward(bert_base, 512), 0.6, 0.9),
        Benchmark("forward/llama-1b-2048", forward(llama_1b, 2048), 0.7, 0.9),
        Benchmark("forward/minilm-512", forward(minilm, 512), 0.6, 0.9),
        Benchmark("forward/bert-base-128", forward(bert_base, 128), 0.6, 0.9),
        Benchmark("forward/bert-base-4096", forward(bert_base, 4096), 0.6, 0.9),
        Benchmark("forward/llama-1b-8192", forward(llama_1b, 8192), 0.7, 0.9),
        Benchmark("memory/llama-1b-8192", lambda: compare_memory(llama_1b(8192)), 512, 128),
        Benchmark("usual/bert-base-512", lambda: compare_usual(bert_base(512)), 5, 15),
        Benchmark(f"run/minilm-demo-x{copies}", lambda: compare_run(copies=copies), 0.5, 0.8),
        Benchmark("attention/4096x64-causal", lambda: compare_attention(**call, causal=True)),
        Benchmark("attention/512x32", lambda: compare_attention(batch=32, heads=12, tokens=512, width=32)),
        Benchmark("attention/128x32", lambda: compare_attention(batch=128, heads=12, tokens=128, width=32)),
    )


def compare_forward(work: Any) -> Numbers:
    """A measured pass against the plain one, with profiles of both."""
    from attlas.extract.layouts import layout_of
    from tests.gpu.timing import profile, python_profile, rate, time_alternately
    from tests.gpu.workloads import measured_pass, plain_pass

    ours, plain = measured_pass(work), plain_pass(work)
    start = time.perf_counter()
    ours()  # compiles kernels
    machine.synchronize()
    first = time.perf_counter() - start
    numbers = rate(time_alternately({"ours": ours, "plain": plain}), work.tokens)
    return numbers | {
        "first_s": first,
        "residual_refusal": layout_of(work.model).residual_refusal,
        "tokens": work.tokens,
        "profile": profile(ours),
        "plain_profile": profile(plain),
        "python": python_profile(ours),
    }


def compare_attention(**shape: Any) -> Numbers:
    """One attention call with all core row quantities against FlashAttention's, and the time of each kernel."""
    from tests.gpu.timing import kernel_time, profile
    from tests.gpu.workloads import attention

    work = attention(**shape)
    _, rows = work.attend()
    work.head_sums(rows)
    plain, ours = kernel_time(work.plain), kernel_time(work.attend)
    return {
        "plain_ms": plain,
        "ours_ms": ours,
        "ratio": plain / ours,
        "head_sums_ms": kernel_time(lambda: work.head_sums(rows)),
        "profile": profile(work.attend),
        "plain_profile": profile(work.plain),
    }


def compare_memory(work: Any) -> Numbers:
    """Peak memory of one sequence's measured pass above the plain one's."""
    from dataclasses import replace

    from tests.gpu.timing import peak_mib
    from tests.gpu.workloads import measured_pass, plain_pass

    one = replace(work, ids=work.ids[:1])
    ours, plain = measured_pass(one), plain_pass(one)
    for act in (ours, plain):
        act()
    peaks = {"plain_mib": peak_mib(plain), "ours_mib": peak_mib(ours)}
    return peaks | {"above_mib": peaks["ours_mib"] - peaks["plain_mib"]}


def compare_usual(work: Any) -> Numbers:
    """A measured pass against the usual way with as many sequences at once as is fastest."""
    from tests.gpu.timing import rate, time_alternately
    from tests.gpu.usual_on_gpu import usual_pass
    from tests.gpu.workloads import measured_pass

    ours = measured_pass(work)
    ways = {n: usual_pass(work, at_once=n) for n in (4, 16)}
    tried = time_alternately({str(n): way for n, way in ways.items()}, warm_up=1, repeats=2)
    best = min(ways, key=lambda n: min(tried[str(n)]))
    numbers = rate(time_alternately({"ours": ours, "plain": ways[best]}, warm_up=1, repeats=5), work.tokens)
    return numbers | {"usual_sequences_at_once": best}


def sweep() -> Numbers:
    """Milliseconds of the attention call with each candidate of the engine's tile sizes."""
    from attlas.extract.engines import triton as engine
    from tests.gpu.timing import kernel_time
    from tests.gpu.workloads import attention

    found: Numbers = {}
    shapes = {
        "4096x64": dict(batch=4, heads=12, tokens=4096, width=64),
        "8192x64 causal, grouped": dict(batch=2, heads=32, key_heads=8, tokens=8192, width=64, causal=True),
        "512x64": dict(batch=32, heads=12, tokens=512, width=64),
        "128x32": dict(batch=128, heads=12, tokens=128, width=32),
    }
    for name, shape in shapes.items():
        call = attention(**shape).call
        for blocks in _candidates(engine, call):
            try:
                found[f"{name} {blocks}"] = kernel_time(
                    lambda call=call, blocks=blocks: engine.attend_in_blocks(call, lambda: call.query, blocks)
                )
            except Exception as error:  # too many registers, too much shared memory
                found[f"{name} {blocks}"] = _last_line(error)
    return found


def _candidates(engine: Any, call: Any) -> Sequence[Any]:
    """Tile sizes to try: the engine's `candidates(call)`, or neighbours of its own choice."""
    if hasattr(engine, "candidates"):
        return engine.candidates(call)
    size, width = call.query.element_size(), max(32, call.query.shape[-1])
    own = engine._BLOCKS[size, width]
    changes: list[dict[str, int]] = [
        {},
        {"warps": 4},
        {"stages": 2},
        {"stages": 4},
        {"rows": 64, "warps": 4},
        {"keys": 32},
        {"keys": 128},
        {"tile_warps": 8},
        {"tile_stages": 2},
        {"tile": 32},
    ]
    known = [change for change in changes if change.keys() <= {*own._fields}]
    return list(dict.fromkeys(own._replace(**change) for change in known))


def run_all(
    chosen: Sequence[Benchmark], *, seconds: float, results: dict[str, Numbers], keep: Callable[[], object]
) -> float:
    """Add the numbers of each benchmark that is not in the results yet, or its error; returns the seconds that are left.

    Ends early if an error has left the device unusable, so that the others can go on in a new process.
    """
    start = time.perf_counter()
    for benchmark in chosen:
        if benchmark.name in results:
            continue
        began = time.perf_counter()
        if began - start > seconds:
            results[benchmark.name] = {SKIPPED: f"the {seconds:.0f} s were used up"}
            continue
        numbers = _measure(benchmark)
        bounds = {"floor": benchmark.floor, "aim": benchmark.aim, "took_s": time.perf_counter() - began}
        results[benchmark.name] = numbers | bounds
        print(f"  {report.line(benchmark.name, results[benchmark.name])}", flush=True)
        keep()
        if not _device_works():
            break
    return seconds - (time.perf_counter() - start)


def _measure(benchmark: Benchmark) -> Numbers:
    try:
        return benchmark.measure()
    except Exception as error:
        return {ERROR: _last_line(error), "traceback": traceback.format_exc()}


def _last_line(error: BaseException) -> str:
    """The error's last line, and where it was raised: in our own code, if any of it is on the way."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if machine.ROOT in Path(f.filename).parents and ".venv" not in f.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__} at {place}: {lines[-1][:200]}"


def _device_works() -> bool:
    """Release what the last benchmark has left; an illegal access makes every later call of its process fail."""
    import torch

    gc.collect()
    try:
        machine.synchronize()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def select(everything: Sequence[Benchmark], patterns: Sequence[str]) -> list[Benchmark]:
    """The benchmarks that match a pattern, or all. Raises ValueError if a pattern matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(b.name, pattern) for b in everything):
            names = ", ".join(b.name for b in everything)
            raise ValueError(f"a pattern matches a benchmark's name; {pattern!r} matches none of {names}")
    return [b for b in everything if any(fnmatchcase(b.name, p) for p in patterns or ["*"])]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    if machine.IS_REHEARSAL:
        os.environ["TRITON_INTERPRET"] = "1"
    reason = machine.why_no_gpu()
    if reason is not None:
        print(f"the benchmark needs a GPU; {reason}; nothing was measured", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine.facts()}

    def keep() -> str:
        text = report.table(results)
        (options.out / "gpu-bench.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        (options.out / "gpu-bench.txt").write_text(text + "\n", "utf-8")
        return text

    if not options.quiet:
        print(report.machine_line(results["machine"]), flush=True)
    if options.sweep:
        results["sweep"] = sweep()
    else:
        _run_benchmarks(options, results, keep)
    text = keep()
    if not options.quiet:
        print(f"\n{text}")
    return int(any(ERROR in numbers for numbers in results.get("benchmarks", {}).values()))


def _run_benchmarks(options: argparse.Namespace, results: dict[str, Any], keep: Callable[[], object]) -> None:
    """Run the chosen benchmarks; if the device fails under one, those after it in a new process, which takes this one's place."""
    chosen = select(benchmarks(copies=options.copies), options.only)
    results["benchmarks"] = {}
    if options.resume:
        results["benchmarks"] |= json.loads((options.out / "gpu-bench.json").read_text("utf-8"))["benchmarks"]
    left = run_all(chosen, seconds=options.seconds, results=results["benchmarks"], keep=keep)
    if any(benchmark.name not in results["benchmarks"] for benchmark in chosen):
        given = ["--out", str(options.out), "--copies", str(options.copies), "--seconds", f"{left:.0f}", "--resume"]
        given += ["--quiet"] * options.quiet + (["--only", *options.only] if options.only else [])
        os.execv(sys.executable, [sys.executable, "-m", "tests.gpu.bench", *given])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu.bench")
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="names, such as 'forward/*'")
    parser.add_argument("--seconds", type=float, default=150, help="start no benchmark after so many; default 150")
    parser.add_argument("--copies", type=int, default=10, help="of the demo corpus, for the whole run; default 10")
    parser.add_argument("--sweep", action="store_true", help="time the attention call with several tile sizes instead")
    parser.add_argument("--quiet", action="store_true", help="print a line for each benchmark, and no table")
    parser.add_argument("--resume", action="store_true", help="go on with the benchmarks that the JSON in --out lacks")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "data" / "gpu", help="folder for JSON and table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
