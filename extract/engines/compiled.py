"""Compilation of kernels: at the first call, for one set of types, once per machine, to run on torch's threads."""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, types
from numba.core import config as numba_config

from attlas.extract.engines import kernel_cache

config: Any = numba_config  # its attributes are created at run time
# sums may be reordered and contracted, but infinities and NaN keep their meaning: they mark rows to leave out
FAST = {"reassoc", "contract", "arcp", "nsz"}
_KERNELS: dict[str, Callable[[], Any]] = {}
_compiles_here = False  # True in a process that only compiles


def array(kind: Any, dimensions: int) -> Any:
    """The type of arrays of any layout, so that one compilation serves them all."""
    return types.Array(kind, dimensions, "A")


def places(names: Sequence[str]) -> Any:
    """The index of each name as an attribute, which is a constant in compiled code."""
    return namedtuple("Places", names)(*range(len(names)))


def kernel(*arguments: Any, fast: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that compiles a function for arguments of these types at its first call, with `prange` over torch's threads."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        name = f"{function.__module__}.{function.__qualname__}"
        options = {"parallel": True, "nogil": True, "error_model": "numpy", "fastmath": FAST if fast else False}

        @cache
        def compiled_kernel() -> Callable[..., None]:
            if not kernel_cache.is_kept(name):
                _compile_elsewhere()
            return kernel_cache.load_or_compile(
                name, lambda keeps: njit(types.void(*arguments), cache=keeps, **options)(function)
            )

        compiled_kernel.__module__ = function.__module__
        _KERNELS[name] = compiled_kernel

        @wraps(function)
        def run(*values: Any) -> None:
            _share_threads()
            compiled_kernel()(*values)

        return run

    return decorate


def prepare() -> None:
    """Compile every kernel of the imported modules, or load it from the cache."""
    _share_threads()  # first, because loading a kernel starts numba's threads, one per core
    for compiled_kernel in _KERNELS.values():
        compiled_kernel()


def compile_modules(modules: Sequence[str]) -> None:
    """Compile every kernel of these modules in this process, into the cache."""
    global _compiles_here
    _compiles_here = True
    for module in modules:
        importlib.import_module(module)
    prepare()


def _compile_elsewhere() -> None:
    """Compile the kernels that are not cached, in a separate process; if that fails, they are compiled in this one.

    A process that has just compiled a parallel loop runs a copy that was optimised separately from the cached one, so that
    float sums differ in their last digits. To give the same bytes in the first run on a machine as in all others, kernels
    are always loaded from the cache.
    """
    missing = [name for name in _KERNELS if not kernel_cache.is_kept(name)]
    modules = sorted({_KERNELS[name].__module__ for name in missing} - {"__main__"})
    if _compiles_here or not modules or not sys.executable or not kernel_cache.has_room():
        return
    code = f"import sys; from {__name__} import compile_modules; compile_modules(sys.argv[1:])"
    environment = {
        **os.environ,
        **kernel_cache.environment(),
        "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
    }
    subprocess.run(
        [sys.executable, "-c", code, *modules], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )


def is_prepared() -> bool:
    """Whether all kernels are in the cache of this machine, compiled from the current sources."""
    return all(map(kernel_cache.is_kept, _KERNELS))


def _share_threads() -> None:
    """Make numba use as many threads as torch."""
    _share_once()
    before = torch.get_num_threads()
    numba.set_num_threads(min(before, config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != before:  # starting numba sets the number for the common pool
        torch.set_num_threads(before)


@cache
def _share_once() -> None:
    """Make torch and numba share one thread pool.

    Both use OpenMP, but numba's threading layer has its own copy of the GNU library, which would give two pools on the same
    cores that spin while the other works. If torch's copy is loaded globally first, numba's layer uses that one.
    """
    for library in Path(torch.__file__).parent.glob("lib/libgomp*"):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]


@njit(fastmath=FAST, error_model="numpy", inline="always")
def ln(x: Any) -> Any:
    """ln x for normal x > 0 without a call, so that loops stay vectors: ln(1 + f)/f to 4e-9 (minimax, degree 9)."""
    bits = np.float32(x).view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> np.int32(23)  # of x / √½, so that the rest lies in [√½, √2]
    f = np.int32(bits - (exponent << np.int32(23))).view(np.float32) - np.float32(1)
    p = np.float32(-0.07830822729305664)
    p = p * f + np.float32(0.13019154820122392)
    p = p * f + np.float32(-0.1321226157880113)
    p = p * f + np.float32(0.1416072072715744)
    p = p * f + np.float32(-0.16610342187081698)
    p = p * f + np.float32(0.20003206697395945)
    p = p * f + np.float32(-0.25001570964480613)
    p = p * f + np.float32(0.33333302396311615)
    p = p * f + np.float32(-0.4999998832421422)
    p = p * f + np.float32(1.0)
    return p * f + np.float32(exponent) * np.float32(0.6931471805599453)


@njit(fastmath=FAST, error_model="numpy", inline="always")
def exp(x: Any) -> Any:
    """eˣ of float32 between −87 and 88, without a call: 2ᵗ on [−½, ½] to 1e-7 (minimax, degree 5)."""
    x = np.float32(x) * np.float32(1.4426950408889634)
    whole = np.floor(x + np.float32(0.5))
    t = x - whole
    p = np.float32(0.0013264725683280788)
    p = p * t + np.float32(0.009671513825825843)
    p = p * t + np.float32(0.055507337576382314)
    p = p * t + np.float32(0.24022242067372143)
    p = p * t + np.float32(0.6931469775856788)
    p = p * t + np.float32(1.0)
    bits = (np.int32(whole) + np.int32(127)) << np.int32(23)
    return p * np.int32(bits).view(np.float32)
