"""Open files as streams of bytes, decompressed if necessary.

Python's readers for bz2 and lzma silently stop at trailing garbage, and those for gzip and LZ4 accept a file of zero bytes
as empty content. Here both are errors.
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

from attlas.extract.corpus.stored import StoredFile
from attlas.extract.files import open_regular

# errors of reading a file, which may also have disappeared since it was listed
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
_CHUNK_BYTES = 1 << 16
_ZSTD_WINDOW_LOG = 31  # `zstd --long=31`, the maximum; memory is allocated only as the content needs it


class DamagedStream(OSError):
    """Invalid compressed data."""


def open_bytes(path: Path | StoredFile) -> BinaryIO:
    """Open a file for reading, decompressed according to its extension. Raises OSError for what is not a file (any more)."""
    if isinstance(path, Path):
        open_regular(path).close()  # a pipe that took the file's place would never end
    match path.suffix.lower():
        case ".gz" | ".gzip":
            _check_not_empty(path)
            return cast(BinaryIO, gzip.open(path if isinstance(path, Path) else path.open()))
        case ".bz2":
            return _open_members(path, bz2.BZ2Decompressor)
        case ".xz":
            return _open_members(path, lzma.LZMADecompressor)
        case ".zst" | ".zstd":
            return _open_members(path, _zstd_decompressor)
        case ".lz4":
            _check_not_empty(path)
            source = str(path) if isinstance(path, Path) else pa.PythonFile(path.open(), mode="r")
            return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(source, compression="lz4")))
    return _open(path)


def _open(path: Path | StoredFile) -> BinaryIO:
    return path.open("rb") if isinstance(path, Path) else path.open()


def _check_not_empty(path: Path | StoredFile) -> None:
    if (path.stat().st_size if isinstance(path, Path) else path.size) == 0:
        raise EOFError("a compressed file begins with a header; this one has zero bytes")


def _zstd_decompressor() -> Any:
    from backports import zstd  # part of Python since 3.14

    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})


def _open_members(path: Path | StoredFile, new_decompressor: Callable[[], Any]) -> BinaryIO:
    return io.BufferedReader(_Members(_open(path), new_decompressor))


class _Members(io.RawIOBase):
    """The content of consecutive compressed members (streams, frames), with zero padding between and after them."""

    def __init__(self, file: BinaryIO, new_decompressor: Callable[[], Any]) -> None:
        self._file, self._new_decompressor = file, new_decompressor
        self._input = file.read(_CHUNK_BYTES)
        self._member: Any = new_decompressor()

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
                self._start_next_member()
        return 0

    def _next_content(self, limit: int) -> bytes:
        if self._member.eof:
            return b""
        if self._member.needs_input and not self._input:
            self._input = self._file.read(_CHUNK_BYTES)
            if not self._input:
                raise EOFError("the compressed content ends before its end marker")
        data, self._input = self._input, b""
        try:
            return self._member.decompress(data, limit)
        except (OSError, EOFError, lzma.LZMAError, MemoryError):
            raise
        except Exception as error:  # ZstdError, whose module may not be imported
            raise DamagedStream(str(error)) from error

    def _start_next_member(self) -> None:
        self._input = self._member.unused_data.lstrip(b"\0")
        while not self._input:
            chunk = self._file.read(_CHUNK_BYTES)
            if not chunk:
                self._member = None
                return
            self._input = chunk.lstrip(b"\0")
        self._member = self._new_decompressor()
