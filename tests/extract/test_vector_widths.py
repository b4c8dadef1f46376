"""The cpu engine on processors with narrower vectors than this one's: the same tests, compiled for those."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROCESSORS = {
    4: {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
    8: {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"},
}
WIDTH = "from attlas.extract.engines.simd import LANES, ROWS; print(LANES, ROWS <= LANES)"


def run(lanes: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **PROCESSORS[lanes]}, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("lanes", PROCESSORS)
def test_vectors_of_any_width_agree_with_float64(lanes: int) -> None:
    assert run(lanes, "-c", WIDTH).stdout.split() == [str(lanes), "True"]
    ended = run(
        lanes, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-k", "float64", "tests/extract/test_engines.py"
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
