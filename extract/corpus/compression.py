"""Files as streams of bytes, whatever they are compressed with.

The readers of bz2 and lzma end in silence where something else follows a compressed member, and those of gzip and
LZ4 take a file of no bytes for one of no content: here both are damage.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

# what reading a file can raise; a file may have gone since it was listed
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
_CHUNK = 1 << 16  # bytes
_ZSTD_WINDOW_LOG = 31  # `zstd --long=31`, the longest there is; memory is only taken as far as the content goes


class DamagedStream(OSError):
    """Compressed bytes that are not what they should be."""


def open_bytes(path: Path) -> BinaryIO:
    """The file's content, decompressed as its extension says."""
    match path.suffix.lower():
        case ".gz" | ".gzip":
            _refuse_no_bytes(path)
            return cast(BinaryIO, gzip.open(path))
        case ".bz2":
            return _open_members(path, bz2.BZ2Decompressor)
        case ".xz":
            return _open_members(path, lzma.LZMADecompressor)
        case ".zst" | ".zstd":
            return _open_members(path, _zstd_decompressor)
        case ".lz4":
            _refuse_no_bytes(path)
            return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(str(path), compression="lz4")))
    return path.open("rb")


def _refuse_no_bytes(path: Path) -> None:
    if path.stat().st_size == 0:
        raise EOFError("compressed content begins with a header; this file has no bytes")


def _zstd_decompressor() -> Any:
    from backports import zstd  # Python's own from 3.14 on

    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})


def _open_members(path: Path, new: Callable[[], Any]) -> BinaryIO:
    return io.BufferedReader(_Members(path.open("rb"), new))


class _Members(io.RawIOBase):
    """The content of compressed members (streams, frames), one after the other; zeros between and behind them are padding."""

    def __init__(self, file: BinaryIO, new: Callable[[], Any]) -> None:
        self._file, self._new = file, new
        self._given = file.read(_CHUNK)
        self._member: Any = new()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while self._member is not None:
            content = self._next_content(len(buffer))
            buffer[: len(content)] = content
            if content:
                return len(content)
            if self._member.eof:
                self._begin_next_member()
        return 0

    def _next_content(self, most: int) -> bytes:
        if self._member.eof:
            return b""
        if self._member.needs_input and not self._given:
            self._given = self._file.read(_CHUNK)
            if not self._given:
                raise EOFError("the compressed content ends before its end mark")
        given, self._given = self._given, b""
        try:
            return self._member.decompress(given, most)
        except (OSError, EOFError, lzma.LZMAError, MemoryError):
            raise
        except Exception as error:  # ZstdError, whose module is not there for those who don't need it
            raise DamagedStream(str(error)) from error

    def _begin_next_member(self) -> None:
        self._given = self._member.unused_data.lstrip(b"\0")
        while not self._given:
            chunk = self._file.read(_CHUNK)
            if not chunk:
                self._member = None
                return
            self._given = chunk.lstrip(b"\0")
        self._member = self._new()
