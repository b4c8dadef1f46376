"""What fits into memory: how many tokens make a batch, and what an error says that there were too many."""

from __future__ import annotations

import ctypes
import gc
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from extract.capture.layout import Layout

_LONG = 2048  # tokens; beyond, a state of the stream is tens of megabytes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers for its settings
_SHARE = 0.5  # of what is free: the need is an estimate, and others want memory too
# what a token holds at the peak of a layer, as measured on models of the BERT and Llama families
_STATES = 12  # vectors as wide as the stream: watched states, queries, keys, values, contexts, temporaries
_WIDE = 3  # vectors as wide as the widest product: two factors and what is made of them
_HEAD_BYTES = 1024  # a head's row quantities and the float64 sums made of them
# torch has types only for what its device allocators say
_COMPLAINTS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def tokens_that_fit(model: nn.Module, layout: Layout, device: torch.device, *, longest: int) -> int | None:
    """How many tokens of a measured forward pass fit into what is free; None where that is not known.

    A power of two, so that a little more or less memory makes the same batches.
    """
    free = free_bytes(device)
    if free is None:
        return None
    fitting = int(free * _SHARE) // bytes_per_token(model, layout, longest=longest)
    return 1 << max(fitting.bit_length() - 1, 0)


def bytes_per_token(model: nn.Module, layout: Layout, *, longest: int) -> int:
    """What a measured forward pass holds per token at its peak, roughly: in inference, layers do not add up."""
    weights = [
        weight
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.dim() == 2
    ]
    widest = max((max(weight.shape) for weight in weights), default=0)
    # float32 is the least in which anything is measured
    element = max((weight.element_size() for weight in weights), default=4)
    vectors = max(element, 4) * (_STATES * (layout.width or widest) + _WIDE * widest)
    heads = _HEAD_BYTES * max(attention.heads for attention in layout.attentions)
    mask = 2 * longest  # one that the model makes, in bools, and a copy
    return vectors + heads + mask


def keep_freed_memory(*, longest: int) -> None:
    """Let this process keep the memory that it frees, for sequences of at most so many tokens.

    By default glibc gives large blocks back to the system, which clears every page anew for the next layer's states: a
    tenth of a CPU's forward pass. The states of long sequences are given back all the same: kept side by side, they leave
    holes that make the process grow with every layer. Other allocators are left as they are.
    """
    settings = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if settings is not None:
        settings(_MMAP_THRESHOLD, 1 << 30 if longest <= _LONG else 1 << 24)
        settings(_TRIM_THRESHOLD, (1 << 31) - 1)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_on_host()


def free_on_host(root: Path = Path("/")) -> int | None:
    """Memory that this process may still take: what the machine has to give, within the limits of its control groups."""
    available = _numbers(root / "proc/meminfo").get("MemAvailable")
    known = [*_left_in_groups(root), *([] if available is None else [available * 1024])]
    return min(known, default=None)


def _left_in_groups(root: Path) -> Iterator[int]:
    """What is left below the limit of each control group, of version 1 or 2, that holds this process."""
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
        # a limit above holds below; and a container sees its own group as the root, though it may be told another path
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            text = (group / limit).read_text().strip() if (group / limit).exists() else "max"
            if text != "max":
                # pages of files that were read count as used, and are given up when memory is asked for
                given_up = _numbers(group / "memory.stat").get(cache, 0)
                yield max(int(text) - int((group / usage).read_text()) + given_up, 0)


def _numbers(file: Path) -> dict[str, int]:
    """The numbers of a file that has a name and a number on each line; none where there is no file."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory: Python's, NumPy's or torch's, of any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _COMPLAINTS)


def release_memory(error: BaseException, device: torch.device) -> None:
    """Free what failed work still holds: in the frames that its error remembers, and in the device's cache."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
