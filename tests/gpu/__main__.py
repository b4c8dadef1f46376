"""`make gpu`: the tests that need a GPU, then the benchmark; leaves gpu.json and gpu.txt in a folder.

Exit status: 0; 1 if a test or a benchmark failed; 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.gpu import machine, report
from tests.gpu.outcomes import read_outcomes

# whole runs first: they take longest
TESTS = ("tests/gpu/test_run.py", "tests/gpu/test_measure.py", "tests/gpu/test_engine.py")
_SHARE_OF_TESTS = 0.55
_LEFT_AT_THE_END = 10  # seconds to end the last benchmark and write the files
_MOST_WORKERS = 15
_SECONDS_BETWEEN_REPORTS = 10


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    reason = machine.why_no_gpu()
    if reason is not None:
        print(f"make gpu needs a GPU; {reason}; nothing was tested or measured", file=sys.stderr)
        return 2
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine.facts()}
    print(report.machine_line(results["machine"]), flush=True)
    if options.only != "bench":
        results["tests"] = run_tests(seconds=options.seconds * (_SHARE_OF_TESTS if options.only is None else 1))
    _write(options.out, results)
    if options.only != "tests":
        left = options.seconds - (time.perf_counter() - start) - _LEFT_AT_THE_END
        results |= run_benchmark(options.out, seconds=left, copies=options.copies)
    results["seconds"] = time.perf_counter() - start
    text = _write(options.out, results)
    print(f"\n{text}\n\n{results['seconds']:.0f} s; written to {options.out}/gpu.json and gpu.txt")
    return int(_has_failed(results))


def run_tests(*, seconds: float) -> dict[str, Any]:
    """The outcomes of the tests, as far as they ran in that time."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "outcomes.jsonl", Path(folder) / "log"
        began = time.perf_counter()
        with log.open("w") as written:
            # as many workers as cores, each computing on one
            environment = {"ATTLAS_GPU_OUTCOMES": str(file), "OMP_NUM_THREADS": "1"}
            note = _run_within(
                seconds,
                _pytest(),
                environment,
                progress=lambda passed: print(f"  tests: {_counts(read_outcomes(file))}, {passed:.0f} s", flush=True),
                stdout=written,
                stderr=written,
            )
        tests = read_outcomes(file)
        results = {"counts": _counts(tests), "seconds": time.perf_counter() - began, "note": note, "tests": tests}
        print("\n".join(report.test_lines(results)), flush=True)
        if note or not tests:
            results["log"] = log.read_text(errors="replace")[-8000:]
            print(results["log"][-3000:], flush=True)
        return results


def _counts(tests: Sequence[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(test["outcome"] for test in tests))


def _pytest() -> list[str]:
    # other versions of libraries warn of other things; outcomes.py is named because a worker has no conftest of its own
    command = [sys.executable, "-m", "pytest", *TESTS, "-m", "gpu", "-o", "filterwarnings=", "-p", "tests.gpu.outcomes"]
    command += ["-o", "cache_dir=/tmp/attlas-gpu-pytest", "--tb=short"]
    cores = os.cpu_count() or 1
    workers = min(_MOST_WORKERS, cores if machine.IS_REHEARSAL else cores - 2)
    return (
        [*command, "-n", str(workers), "--maxschedchunk=1"]
        if workers > 1 and find_spec("xdist") is not None
        else command
    )


def _environment() -> dict[str, str]:
    on_gpu = {} if machine.IS_REHEARSAL else {"ATTLAS_GPU": "1"}
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true"}
    paths = [str(machine.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **on_gpu, **quiet, "PYTHONPATH": os.pathsep.join(paths)}


def _run_within(
    seconds: float,
    command: Sequence[str],
    environment: dict[str, str],
    *,
    progress: Callable[[float], None] = lambda _: None,
    **files: Any,
) -> str:
    """Run a command; what there is to say of it if it did not end by itself with status 0 or 1.

    progress(seconds): called every few seconds.
    """
    process = subprocess.Popen(
        command, cwd=machine.ROOT, env=_environment() | environment, start_new_session=True, **files
    )
    start = reported = time.perf_counter()
    while (status := process.poll()) is None:
        time.sleep(0.2)
        now = time.perf_counter()
        if now - start > max(1.0, seconds):
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
            process.wait()
            return f"; stopped after {seconds:.0f} s, the others did not run"
        if now - reported > _SECONDS_BETWEEN_REPORTS:
            progress(now - start)
            reported = now
    return "" if status in (0, 1) else f"; it ended with status {status}"


def run_benchmark(out: Path, *, seconds: float, copies: int) -> dict[str, Any]:
    """The benchmark's results, from a process of its own."""
    file = out / "gpu-bench.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu.bench", "--quiet"]
    command += ["--out", str(out), "--seconds", f"{max(0.0, seconds):.0f}", "--copies", str(copies)]
    with tempfile.TemporaryFile("w+", errors="replace") as log:  # torch's profiler writes much to it
        note = _run_within(seconds + 30, command, {}, stderr=log)
        log.seek(0)
        said = log.read()[-4000:]
    (out / "gpu-bench.txt").unlink(missing_ok=True)
    results = json.loads(file.read_text("utf-8")) if file.exists() else {}
    file.unlink(missing_ok=True)
    of_process = {"benchmark_note": note.lstrip("; "), "benchmark_log": said} if note else {}
    return {"benchmarks": results.get("benchmarks", {})} | of_process


def _write(folder: Path, results: dict[str, Any]) -> str:
    text = report.table(results)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (folder / "gpu.txt").write_text(text + "\n", "utf-8")
    return text


def _has_failed(results: dict[str, Any]) -> bool:
    counts = results.get("tests", {}).get("counts", {})
    return (
        bool(results.get("tests", {}).get("note"))
        or any(counts.get(outcome) for outcome in ("failed", "error"))
        or "benchmark_note" in results
        or any("error" in numbers for numbers in results.get("benchmarks", {}).values())
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu")
    parser.add_argument("--seconds", type=float, default=210, help="for everything; default 210")
    parser.add_argument("--copies", type=int, default=10, help="of the demo corpus, for the whole run; default 10")
    parser.add_argument("--only", choices=("tests", "bench"), help="leave out the other")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "data" / "gpu", help="folder for both files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
