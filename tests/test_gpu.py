"""`make gpu` without a GPU: it says so; and its table, profile and comparison say what they are given."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.gpu import bench, report
from tests.gpu.bench import Benchmark, run_all, select
from tests.gpu.kit import write_kit
from tests.gpu.outcomes import read_outcomes
from tests.gpu.tables import assert_tables_agree
from tests.gpu.timing import covered, rate, summarise

ROOT = Path(__file__).parent.parent
MACHINE = {
    "card": "NVIDIA H100 80GB HBM3",
    "memory_gib": 79.2,
    "driver": "580.1",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    "python": "3.12.3",
}
PROFILE = {"gpu_busy_ms": 3.5, "launches": 900, "waits": {"cudaStreamSynchronize": 7}}
FORWARD = {
    "ratio": 0.75,
    "plain_ms": 3.0,
    "ours_ms": 4.0,
    "profile": PROFILE,
    "plain_profile": PROFILE | {"waits": {"cudaStreamSynchronize": 1}, "launches": 200},
    "floor": 0.6,
    "aim": 0.9,
}


@pytest.mark.parametrize("module", ["tests.gpu", "tests.gpu.bench"])
def test_a_machine_without_a_gpu_is_told_so_in_a_line(module: str, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ended = subprocess.run(
        [sys.executable, "-m", module, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "needs a GPU; torch" in line
    assert not (tmp_path / "out").exists()


def rehearse(*command: str, out: Path, file: str) -> dict[str, Any]:
    """What a command of `make gpu` writes to a file on the CPU, in small, with Triton's interpreter and the packages of a bare machine."""
    environment = {k: v for k, v in os.environ.items() if k != "ATTLAS_GPU"}
    environment |= {"ATTLAS_GPU_DEVICE": "cpu", "PYTHONPATH": f"{ROOT / 'tests' / 'gpu' / 'bare'}{os.pathsep}{ROOT}"}
    environment["ATTLAS_GPU_KIT"] = str(write_kit(out / "kit"))
    arguments = ("--seconds", "1800", "--copies", "1", "--out", str(out))
    ended = subprocess.run(
        [sys.executable, "-m", *command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return json.loads((out / file).read_text())


@pytest.mark.slow
def test_every_benchmark_runs_where_it_is_rehearsed(tmp_path: Path) -> None:
    found = rehearse("tests.gpu.bench", out=tmp_path, file="gpu-bench.json")["benchmarks"]
    assert found.keys() == {benchmark.name for benchmark in bench.benchmarks(copies=1)}
    for name, numbers in found.items():
        assert bench.ERROR not in numbers and bench.SKIPPED not in numbers, (name, numbers)


@pytest.mark.exhaustive
def test_every_test_of_a_gpu_passes_where_it_is_rehearsed(tmp_path: Path) -> None:
    found = rehearse("tests.gpu", "--only", "tests", out=tmp_path, file="gpu.json")["tests"]
    assert not found["note"]
    assert found["counts"].keys() == {"passed"} and found["counts"]["passed"] > 100


def test_make_gpu_installs_nothing() -> None:
    shown = subprocess.run(
        ["make", "-n", "gpu", "OUT=/tmp/x", "GPU_PYTHON=python3"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (command,) = (line for line in shown.stdout.splitlines() if not line.startswith("make["))
    assert command.endswith("python3 -m tests.gpu --out /tmp/x ") and "PYTHONPATH=." in command


def test_the_table_has_a_line_for_each_benchmark_whatever_became_of_it() -> None:
    failed = {"name": "test_x", "outcome": "failed", "seconds": 1.0, "message": "entropy is 1, not 2"}
    tests = {"counts": {"passed": 9, "failed": 1}, "seconds": 60.0, "note": "", "tests": [failed]}
    memory = {"plain_mib": 100.0, "ours_mib": 164.4, "above_mib": 64.4, "floor": 512, "aim": 128}
    run = {"ratio": 0.5, "plain_ms": 1.0, "ours_ms": 2.0, "seconds": {"plan": 1.25}}
    others = {"memory/m": memory, "run/r": run, "forward/b": {"error": "OutOfMemoryError at x.py:3: no"}}
    benchmarks = {"forward/a": FORWARD, **others, "usual/u": {"skipped": "the 150 s were used up"}}
    text = report.table({"machine": MACHINE, "tests": tests, "benchmarks": benchmarks})
    lines = text.splitlines()
    assert lines[0].startswith("NVIDIA H100 80GB HBM3 (79.2 GiB), driver 580.1, torch 2.11.0, triton 3.6.0")
    assert lines[1:3] == ["tests: 9 passed, 1 failed, 60 s", "  failed: test_x: entropy is 1, not 2"]
    assert " ".join(lines[-5].split()) == "forward/a 0.750 0.6 0.9 3.000 4.000 3.500 3.500 900 (200), +6"
    assert "+64 MiB" in lines[-4] and "plan 1.2 s" in lines[-3]
    assert lines[-2].endswith("error: OutOfMemoryError at x.py:3: no") and lines[-1].endswith("were used up")


def test_a_benchmark_that_fails_or_comes_too_late_does_not_stop_the_others() -> None:
    def failing() -> dict[str, float]:
        raise ValueError("first line\nlast line")

    chosen = [Benchmark("a", failing), Benchmark("b", lambda: dict(FORWARD)), Benchmark("c", lambda: dict(FORWARD))]
    results = {"c": {"ratio": 1.0}}
    kept = []
    run_all(chosen, seconds=60, results=results, keep=lambda: kept.append({*results}))
    assert results["a"]["error"].startswith("ValueError at test_gpu.py:")
    assert results["a"]["error"].endswith(": last line")
    assert results["b"]["ratio"] == 0.75 and results["c"] == {"ratio": 1.0}
    assert kept == [{"a", "c"}, {"a", "b", "c"}]
    late: dict = {}
    run_all(chosen, seconds=-1, results=late, keep=lambda: None)
    assert all("skipped" in numbers for numbers in late.values())


def test_benchmarks_are_chosen_by_pattern() -> None:
    everything = bench.benchmarks(copies=10)
    assert [b.name for b in select(everything, ["run/*"])] == ["run/minilm-demo-x10"]
    assert select(everything, []) == list(everything)
    with pytest.raises(ValueError, match=r"'x' matches none of attention/4096x64, forward/"):
        select(everything, ["x"])


def test_a_ratio_is_that_of_tokens_per_second() -> None:
    numbers = rate({"ours": [4.0, 5.0, 4.0], "plain": [2.0, 2.0, 3.0]}, 8000)
    assert numbers["ratio"] == 0.5 and numbers["tokens_per_s"] == 2_000_000


def test_a_profile_counts_launches_waits_and_busy_time() -> None:
    events = [
        {"cat": "kernel", "name": "k", "ts": 0, "dur": 1000},
        {"cat": "kernel", "name": "k", "ts": 500, "dur": 1000},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 3000, "dur": 500},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 5},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 5, "dur": 5},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 10, "dur": 2000},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 100},
    ]
    shown = summarise(events)
    assert shown["gpu_busy_ms"] == 2.0 and shown["launches"] == 2 and shown["waited_ms"] == 2.0
    assert shown["waits"] == {"cudaStreamSynchronize": 1} and shown["copies"] == {"Memcpy DtoH": 1}
    assert shown["kernels"][0] == {"name": "k", "ms": 2.0, "launches": 2}
    assert covered([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4


def test_tables_that_differ_are_named() -> None:
    heads = pa.table({"head": [0, 1], "entropy_nats": pa.array([1.0, 2.0], pa.float32())})
    other = heads.set_column(1, "entropy_nats", pa.array(np.array([1.0, 2.1], np.float32)))
    assert_tables_agree({"heads": heads}, {"heads": heads})
    with pytest.raises(AssertionError, match=r"heads.entropy_nats: 2.1, not 2, in row 1"):
        assert_tables_agree({"heads": other}, {"heads": heads})
    with pytest.raises(AssertionError, match=r"heads.head: differs"):
        assert_tables_agree({"heads": heads.set_column(0, "head", [[1, 1]])}, {"heads": heads})


def test_outcomes_are_written_as_tests_end(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'one is not two'\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.gpu.outcomes", "-p", "no:cacheprovider", "-c"]
    subprocess.run(
        [*command, "/dev/null", str(tmp_path)],
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "ATTLAS_GPU_OUTCOMES": str(tmp_path / "outcomes")},
        capture_output=True,
    )
    good, bad = read_outcomes(tmp_path / "outcomes")
    assert (good["outcome"], bad["outcome"]) == ("passed", "failed")
    assert "one is not two" in json.dumps(bad["message"])
