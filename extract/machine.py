"""What this machine offers a model: cores, memory, GPUs, and the engine that would measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attlas.extract.engines import choose
from attlas.extract.errors import Refusal
from attlas.extract.memory import free_bytes, free_on_host


@dataclass(frozen=True)
class Machine:
    """Bytes are what is free now; `engine` is None, with the reason in `engine_problem`, if none can run."""

    cores: int
    memory: int | None
    gpus: tuple[tuple[str, int | None], ...]  # name and free bytes
    torch: str
    engine: str | None
    is_compiled: bool
    engine_problem: str = ""


def this_machine() -> Machine:
    """Look at this machine; compiles and loads nothing large."""
    has_gpu = torch.cuda.is_available()
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count() if has_gpu else 0)]
    gpus = tuple((torch.cuda.get_device_name(device), free_bytes(device)) for device in devices)
    engine, is_compiled, problem = None, False, ""
    try:
        chosen = choose("auto", device="cuda" if has_gpu else "cpu")
        engine, is_compiled = chosen.name, chosen.is_ready()
    except (Refusal, ImportError, OSError) as error:
        problem = str(error)
    return Machine(torch.get_num_threads(), free_on_host(), gpus, torch.__version__, engine, is_compiled, problem)
