"""How many tokens fit into memory, and what to do when they did not."""

from __future__ import annotations

import ctypes
import gc
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from attlas.extract.capture.layout import Layout
from attlas.extract.errors import causes

_LONG_SEQUENCE = 2048  # tokens; above, one state of the residual stream takes tens of megabytes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's constants for mallopt
_USABLE_SHARE = 0.5  # of the free memory: the need is an estimate, and other processes need memory too
# memory per token at a layer's peak, measured on models of the BERT and Llama families
_STREAM_VECTORS = 12  # of the stream's width: states, queries, keys, values, contexts, temporaries
_WIDE_VECTORS = 3  # of the width of the widest product: two factors and their product
_BYTES_PER_HEAD = 1024  # row quantities of a head and their float64 sums
# torch has exception types for device allocators only
_OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def tokens_that_fit(model: nn.Module, layout: Layout, device: torch.device, *, longest: int) -> int | None:
    """The number of tokens of a measured forward pass that fit into free memory; None if free memory is unknown.

    A power of two, so that small differences in free memory give the same batches.
    """
    free = free_bytes(device)
    if free is None:
        return None
    tokens = int(free * _USABLE_SHARE) // bytes_per_token(model, layout, longest=longest)
    return 1 << max(tokens.bit_length() - 1, 0)


def bytes_per_token(model: nn.Module, layout: Layout, *, longest: int) -> int:
    """Estimate the peak memory per token of a measured forward pass, in which only one layer's states exist at a time."""
    weights = [
        weight
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.dim() == 2
    ]
    widest = max((max(weight.shape) for weight in weights), default=0)
    # measurements are made in float32 or wider
    element = max((weight.element_size() for weight in weights), default=4)
    vectors = max(element, 4) * (_STREAM_VECTORS * (layout.width or widest) + _WIDE_VECTORS * widest)
    heads = _BYTES_PER_HEAD * max(attention.heads for attention in layout.attentions)
    mask = 2 * longest  # a boolean mask made by the model, and a copy
    return vectors + heads + mask


def keep_freed_memory(*, longest: int) -> None:
    """Make glibc keep freed memory in this process, for sequences of at most `longest` tokens.

    By default glibc returns large blocks to the system, which then clears every page again for the next layer's states: a
    tenth of the time of a forward pass on a CPU. The blocks of long sequences are still returned, because keeping them
    fragments the heap and the process grows with every layer. Other allocators are not affected.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30 if longest <= _LONG_SEQUENCE else 1 << 24)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None if the system does not report it."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_on_host()


def free_on_host(root: Path = Path("/")) -> int | None:
    """Memory this process can still allocate: what the machine has free, within the limits of its control groups."""
    available = _numbers(root / "proc/meminfo").get("MemAvailable")
    limits = [*_free_in_groups(root), *([] if available is None else [available * 1024])]
    return min(limits, default=None)


def _free_in_groups(root: Path) -> Iterator[int]:
    """The memory left under the limit of each control group, version 1 or 2, that contains this process."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, cache = root / "sys/fs/cgroup/memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # limits apply to all groups below; and a container sees its own group as the root, whatever path is listed
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            text = (group / limit).read_text().strip() if (group / limit).exists() else "max"
            if text != "max":
                # the page cache of files counts as used but is reclaimed on demand
                reclaimable = _numbers(group / "memory.stat").get(cache, 0)
                yield max(int(text) - int((group / usage).read_text()) + reclaimable, 0)


def _numbers(file: Path) -> dict[str, int]:
    """The numbers in a file with a name and a number per line; empty if the file does not exist."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or torch, on any device, means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY_MESSAGES)


def release_memory(error: BaseException, device: torch.device) -> None:
    """Release the memory of failed work: what its error's tracebacks keep, and the device's cache."""
    for cause in causes(error):
        traceback.clear_frames(cause.__traceback__)
        # a cleared frame still keeps its function, and in a closure of that the inputs of a module
        cause.__traceback__ = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
