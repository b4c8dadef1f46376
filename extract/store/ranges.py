"""A file over an object that fetches only the ranges that are read."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any


class RangeReader(io.RawIOBase):
    """A read-only, seekable file of `size` bytes; `fetch(start, length)` returns a range of them."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._fetch = fetch
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        buffer[:length] = self._fetch(self._at, length)
        self._at += length
        return length
