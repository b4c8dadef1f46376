"""The cache of compiled code: where none can be written, code is compiled all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CODE = """
import numba, numpy as np
from attlas.extract.engines.compiled import array, is_prepared, kernel, prepare

@kernel(array(numba.float32, 1))
def double(x):
    for n in numba.prange(len(x)):
        x[n] *= 2

x = np.arange(3, dtype=np.float32)
assert not is_prepared()
prepare()
double(x)
print(x.tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", [{"NUMBA_CACHE_DIR": "/proc/nothing"}, {"XDG_CACHE_HOME": "/dev/null"}, {"HOME": "/proc/nothing"}]
)
def test_without_a_cache_code_is_compiled_and_a_warning_says_what_to_set(place: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # numba keeps nothing of what has no file
    script.write_text(CODE)
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    ended = subprocess.run(
        [sys.executable, script], env={**kept, "PYTHONPATH": str(ROOT), **place}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, "[0.0, 2.0, 4.0]\n"), ended.stderr
    assert ended.stderr.count("set NUMBA_CACHE_DIR to a folder that can") == 1


THREADS = """
import numba, torch
from attlas.extract.engines.compiled import array, kernel, prepare

@kernel(array(numba.float32, 1))
def double(x):
    for n in numba.prange(len(x)):
        x[n] *= 2

torch.set_num_threads(1)
before = torch.get_num_threads()
prepare()
print(before, torch.get_num_threads())
"""


def test_compiling_leaves_torchs_number_of_threads(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(THREADS)
    set_ = {"PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "3", "XDG_CACHE_HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, script], env={**os.environ, **set_}, capture_output=True, text=True)
    assert ended.stdout == "1 1\n", ended.stderr


STATES = """
import sys, warnings, numpy as np, torch
from attlas.extract.engines.observations import NormObservation
from attlas.extract.engines.residual_cpu import read_state
from attlas.extract.engines.visibility import Axis

warnings.simplefilter("ignore")
generator = torch.Generator().manual_seed(0)
state, start, length = torch.randn(2, 100, 384, generator=generator), torch.tensor([0, 0]), torch.tensor([100, 31])
output = torch.empty_like(state)
norm = NormObservation(state, output, "layer", 1e-12)
columns = read_state(Axis(start, length, 100), state, norm=norm, output=output)
sys.stdout.buffer.write(output.numpy().tobytes() + b"".join(c.tobytes() for c in columns.norm.values()))
"""


@pytest.mark.exhaustive
def test_the_process_that_finds_no_compiled_code_computes_the_same_bytes_as_others(tmp_path: Path) -> None:
    """What numba has just compiled is another optimisation of the same loop than what it keeps."""

    def computed(**places: str) -> bytes:
        kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
        environment = {**kept, "PYTHONPATH": str(ROOT), **places}
        return subprocess.run(
            [sys.executable, "-c", STATES], env=environment, stdout=subprocess.PIPE, check=True
        ).stdout

    first, second = (computed(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert len(first) > 300_000 and first == second
    assert computed(NUMBA_CACHE_DIR="/proc/nothing") == first, "where nothing can be kept"
