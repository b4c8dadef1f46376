"""Buffers for the results of an engine, which are reused once they are no longer referenced.

The arrays of all layers have the same size. Allocated on the heap they would fragment it, so that the process would grow
with every layer, and the system would clear all their pages again.
"""

from __future__ import annotations

import math
import mmap
import sys
from typing import Any

import numpy as np

_BUFFERS: list[np.ndarray] = []


def _references(buffers: list[np.ndarray], place: int) -> int:
    return sys.getrefcount(buffers[place])


# references from the list and from the call itself, as this version of Python counts them
_FREE_REFERENCES = _references([np.empty(0)], 0)


def empty(shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """An uninitialised array, whose memory is reused when the array and all its views and tensors are gone."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    buffer = _free_buffer(size)
    if buffer is None:
        buffer = np.frombuffer(mmap.mmap(-1, max(size, mmap.PAGESIZE)), np.uint8)
        _BUFFERS.append(buffer)
    return buffer[:size].view(kind).reshape(shape)


def _free_buffer(size: int) -> np.ndarray | None:
    """The smallest free buffer that is large enough; if there is none, the largest free one is released."""
    free = [place for place in range(len(_BUFFERS)) if _references(_BUFFERS, place) == _FREE_REFERENCES]
    enough = [place for place in free if _BUFFERS[place].nbytes >= size]
    if enough:
        return _BUFFERS[min(enough, key=lambda place: _BUFFERS[place].nbytes)]
    if free:
        del _BUFFERS[max(free, key=lambda place: _BUFFERS[place].nbytes)]
    return None
