"""memory/*: peak memory of a measured forward pass and of a plain one, each in its own process."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.harness import Result

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
_WARM_TOKENS = 256


def compare_peak_memory(tokens: int, layers: int) -> Result:
    ours, theirs = (_growth_in_subprocess(side, tokens, layers) / MIB for side in ("measured", "plain"))
    return Result(ours, theirs, "MiB", note=f"{ours - theirs:+,.0f} MiB")


def peak_growth(act: Callable[[], object]) -> int:
    """Peak growth of this process in bytes while `act` runs. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is kept would be reused without growth
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_bytes("VmRSS")
    act()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def _growth_in_subprocess(side: str, tokens: int, layers: int) -> int:
    command = [sys.executable, "-m", __name__, side, str(tokens), str(layers)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(side: str, tokens: str, layers: str) -> None:
    """Print the growth of one pass in bytes, after a warm-up for compilation and first allocations."""
    from attlas.extract.memory import keep_freed_memory
    from tests.benchmarks.workloads import Workload, bert_base, measured_pass, plain_pass

    if side == "measured":  # as in a run
        keep_freed_memory(longest=int(tokens))
    way = {"measured": measured_pass, "plain": plain_pass}[side]
    work = bert_base(1, int(tokens), layers=int(layers))
    short = Workload(work.model, work.ids[:, :_WARM_TOKENS], work.length.clamp_max(_WARM_TOKENS))
    way(short)()
    print(json.dumps(peak_growth(way(work))))


if __name__ == "__main__":
    main(*sys.argv[1:])
