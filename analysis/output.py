"""Where an answer goes: all of it, or an error. A file appears whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import select
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from attlas.extract.store import Refusal

_AT_ONCE = 1 << 24
_OPEN_FILES = {"/dev/stdout": 1, "/dev/stderr": 2}
_OPEN_FILE = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")


class OutputError(Exception):
    """An answer that could not be written whole."""

    def __init__(self, place: object, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"an answer is written whole; {place} did not take all of it ({reason}); make room, or choose another place"
        )


def write_whole(chunks: Iterable[bytes | memoryview], stream: IO[Any]) -> None:
    """Write all of the bytes; OutputError where the stream takes less, BrokenPipeError where nobody reads on.

    A text stream gets them through its binary buffer, or as UTF-8 text where it has none.
    """
    try:
        stream.flush()
        for chunk in chunks:
            _write(memoryview(chunk), stream)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError("the output", _reason(error)) from error


def _write(chunk: memoryview, stream: IO[Any]) -> None:
    descriptor = _descriptor(stream)
    target = getattr(stream, "buffer", stream)
    if descriptor is None and isinstance(target, io.TextIOBase):
        target.write(bytes(chunk).decode())
        return
    while chunk:
        piece = chunk[:_AT_ONCE]  # one call writes at most 2 GiB, and of a pipe less
        written = target.write(piece) if descriptor is None else _write_now(descriptor, piece)
        if not written:
            raise OSError(errno.EIO, "nothing more is taken")
        chunk = chunk[written:]


def _descriptor(stream: IO[Any]) -> int | None:
    """Of a stream of the system: past every buffer, a short write is seen."""
    try:
        return stream.fileno()
    except (OSError, AttributeError):  # a stream in memory
        return None


def _write_now(descriptor: int, piece: memoryview) -> int:
    while True:
        try:
            return os.write(descriptor, piece)
        except BlockingIOError:  # a pipe that another program made non-blocking
            select.select([], [descriptor], [])


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


@contextmanager
def answer_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write an answer to. It takes its name when all is written; what had the name until then is kept.

    Devices, pipes and open files (/dev/stdout) are written as they are. Raises Refusal for a path that can't be written,
    before anything is computed, and OutputError where it can't be finished.
    """
    descriptor, target, temporary = _opened(path)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            yield file
            if temporary is not None:
                os.fsync(file.fileno())
        if temporary is not None:
            temporary.replace(target)
    except BrokenPipeError:
        raise
    except OutputError as error:
        raise OutputError(path, error.reason) from error
    except OSError as error:
        raise OutputError(path, _reason(error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)  # gone already if it became the answer


def _opened(path: Path) -> tuple[int, Path, Path | None]:
    """A descriptor to write to; the file that it stands for, and the one that it is until it is whole."""
    try:
        opened = _open_file(path)
        if opened is not None:
            return os.dup(opened), path, None
        target = path.resolve()
        held = target.stat() if target.exists() else None
        if held is not None and not stat.S_ISREG(held.st_mode):
            return os.open(target, os.O_WRONLY), target, None
        if held is not None and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "it is read-only")
        temporary = target.with_name(f".attlas-{secrets.token_hex(6)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        if held is not None:
            os.fchmod(descriptor, stat.S_IMODE(held.st_mode))
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise Refusal(f"--output is a file that can be written; {path}: {why}; check the path") from error
    return descriptor, target, temporary


def _open_file(path: Path) -> int | None:
    """The number of a file that this process holds open, where the path names one."""
    name = os.path.abspath(path)  # noqa: PTH100 - resolving would follow /dev/stdout to the file behind it
    match = _OPEN_FILE.fullmatch(name)
    return int(match.group(1)) if match else _OPEN_FILES.get(name)
