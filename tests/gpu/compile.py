"""`python -m tests.gpu.compile [PATTERN …]`: compile the kernels of the engine tests' calls for an H100, without one.

Run it with the versions of torch and Triton that the machine with the GPU has: what fails here costs no time there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

os.environ["ATTLAS_GPU_DEVICE"] = "cpu"  # where the tensors are; no kernel runs
os.environ.pop("TRITON_INTERPRET", None)

from attlas.extract.engines.observations import HeadObservation
from tests.gpu.calls import NEEDS, Case, call_of, classes_of, engine_under_test, known


def cases() -> Iterator[tuple[str, Case]]:
    from tests.gpu.test_engine import BRAIN, FEATURES, FULL, HALF, WIDTHS

    for length, tokens in (("long", 192), ("short", 96)):
        for dtype, width in WIDTHS:
            yield f"{length}/{dtype}/{width}", Case(tokens, dtype=dtype, width=width)
        for dtype in (FULL, BRAIN):
            for name, feature in FEATURES.items():
                yield f"{length}/{dtype}/{name}", Case(tokens, dtype=dtype, **feature)
    yield f"{HALF}/everything", Case(192, dtype=HALF, **FEATURES["everything"])
    yield f"{BRAIN}/odd", Case(197, dtype=BRAIN)


def main(patterns: list[str]) -> int:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from tests.extract.test_triton import _Hopper

    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append((self.__name__, run(self, *args, warmup=True, **kwargs)))

    driver.set_active(_Hopper())
    JITFunction.run = compile_only
    failed = 0
    for name, case in cases():
        if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        start = time.perf_counter()
        kernels.clear()
        try:
            _make(case)
            shared = ", ".join(f"{kernel} {compiled.metadata.shared:,}" for kernel, compiled in kernels)
        except Exception as error:
            failed += 1
            shared = f"FAILED: {type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"
        print(f"{name:30} {time.perf_counter() - start:5.1f} s  shared bytes: {shared}", flush=True)
    return int(failed > 0)


def _make(case: Case) -> None:
    call, engine = call_of(case), engine_under_test()
    _, rows = engine.attend(call, call.query.clone, known(call))
    observed = HeadObservation(rows, call.visibility, classes_of(call))
    engine.head_sums(observed, NEEDS.head_names, profiles=NEEDS.profiles)
    rows.chosen_rows(call, None, most=16)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
