"""memory/*: how much more memory a measured forward pass takes at its peak than a plain one, each in its own process."""

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


def growth_against_plain(tokens: int, layers: int) -> Result:
    ours, theirs = (_in_a_process(side, tokens, layers) / MIB for side in ("measured", "plain"))
    return Result(ours, theirs, "MiB", note=f"{ours - theirs:+,.0f} MiB")


def peak_growth(act: Callable[[], object]) -> int:
    """Bytes by which this process grows, at its largest, while it acts. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory still held would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew from here
    before = _status_bytes("VmRSS")
    act()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def _in_a_process(side: str, tokens: int, layers: int) -> int:
    command = [sys.executable, "-m", __name__, side, str(tokens), str(layers)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(side: str, tokens: str, layers: str) -> None:
    """Print the growth of one pass, in bytes; compilation and first allocations come before it."""
    from attlas.extract.memory import keep_freed_memory
    from tests.benchmarks.workloads import Workload, bert_base, measured_pass, plain_pass

    if side == "measured":  # as in a run, and in nothing else
        keep_freed_memory(longest=int(tokens))
    way = {"measured": measured_pass, "plain": plain_pass}[side]
    work = bert_base(1, int(tokens), layers=int(layers))
    short = Workload(work.model, work.ids[:, :_WARM_TOKENS], work.length.clamp_max(_WARM_TOKENS))
    way(short)()
    print(json.dumps(peak_growth(way(work))))


if __name__ == "__main__":
    main(*sys.argv[1:])
