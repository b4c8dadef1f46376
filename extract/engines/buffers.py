"""Memory for what an engine makes, used again once nobody holds it.

A layer's arrays are as large as the one's before. Taken from the common heap they would leave holes among the model's own
states, so that the process grew with every layer, and every page of them would be cleared anew.
"""

from __future__ import annotations

import math
import mmap
import sys
from typing import Any

import numpy as np

_BUFFERS: list[np.ndarray] = []


def _references(held: list[np.ndarray], place: int) -> int:
    return sys.getrefcount(held[place])


_OF_A_FREE_ONE = _references([np.empty(0)], 0)  # the list's and the question's own, as this Python counts them


def empty(shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """An array with anything in it; its memory is used again when this array, its views and tensors are gone."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    buffer = _free_buffer(size)
    if buffer is None:
        buffer = np.frombuffer(mmap.mmap(-1, max(size, mmap.PAGESIZE)), np.uint8)
        _BUFFERS.append(buffer)
    return buffer[:size].view(kind).reshape(shape)


def _free_buffer(size: int) -> np.ndarray | None:
    """The smallest free buffer that is large enough; where there is none, a smaller one is given up."""
    free = [place for place in range(len(_BUFFERS)) if _references(_BUFFERS, place) == _OF_A_FREE_ONE]
    enough = [place for place in free if _BUFFERS[place].nbytes >= size]
    if enough:
        return _BUFFERS[min(enough, key=lambda place: _BUFFERS[place].nbytes)]
    if free:
        del _BUFFERS[max(free, key=lambda place: _BUFFERS[place].nbytes)]
    return None
