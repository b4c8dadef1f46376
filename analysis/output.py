"""Output of query results: written completely or reported as an error. A file appears complete or not at all."""

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

_CHUNK_BYTES = 1 << 24
_STANDARD_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR_PATH = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")


class OutputError(Exception):
    """A result that could not be written completely."""

    def __init__(self, place: object, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"an answer is written whole; {place} did not take all of it ({reason}); make room, or choose another place"
        )


def write_whole(chunks: Iterable[bytes | memoryview], stream: IO[Any]) -> None:
    """Write all chunks to a stream. Raises OutputError if it takes less, BrokenPipeError if the reader has gone away.

    A text stream is written through its binary buffer, or as UTF-8 text if it has none.
    """
    with _named_as_output():
        stream.flush()
    for chunk in chunks:  # whose making may fail for reasons of its own
        with _named_as_output():
            _write(memoryview(chunk), stream)
    with _named_as_output():
        stream.flush()


@contextmanager
def _named_as_output() -> Iterator[None]:
    try:
        yield
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
        piece = chunk[:_CHUNK_BYTES]  # one call writes at most 2 GiB, and less to a pipe
        written = target.write(piece) if descriptor is None else _write_descriptor(descriptor, piece)
        if not written:
            raise OSError(errno.EIO, "nothing more is taken")
        chunk = chunk[written:]


def _descriptor(stream: IO[Any]) -> int | None:
    """The file descriptor of a stream, if it has one: writing to it directly reveals short writes."""
    try:
        return stream.fileno()
    except (OSError, AttributeError):  # a stream in memory
        return None


def _write_descriptor(descriptor: int, piece: memoryview) -> int:
    while True:
        try:
            return os.write(descriptor, piece)
        except BlockingIOError:  # a pipe that another program made non-blocking
            select.select([], [descriptor], [])


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


@contextmanager
def answer_file(path: Path, *, option: str = "--output") -> Iterator[IO[bytes]]:
    """A temporary file that replaces `path` when the block ends; until then, an existing file stays as it is. `option` named it.

    Devices, pipes and open files (/dev/stdout) are written directly. Raises Refusal if the path can't be written, before
    anything is computed, and OutputError if writing fails.
    """
    descriptor, target, temporary = _open_target(path, option)
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
            temporary.unlink(missing_ok=True)  # already gone if it replaced the target


def _open_target(path: Path, option: str) -> tuple[int, Path, Path | None]:
    """(descriptor, target, temporary): a descriptor to write to, the file to be written, and the temporary file, if any."""
    try:
        open_descriptor = _open_descriptor(path)
        if open_descriptor is not None:
            return os.dup(open_descriptor), path, None
        target = path.resolve()
        existing = target.stat() if target.exists() else None
        if existing is not None and not stat.S_ISREG(existing.st_mode):
            return os.open(target, os.O_WRONLY), target, None
        if existing is not None and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "it is read-only")
        temporary = target.with_name(f".attlas-{secrets.token_hex(6)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        if existing is not None:
            os.fchmod(descriptor, stat.S_IMODE(existing.st_mode))
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise Refusal(f"{option} is a file that can be written; {path}: {why}; check the path") from error
    return descriptor, target, temporary


def _open_descriptor(path: Path) -> int | None:
    """The descriptor of an open file of this process, if the path names one."""
    name = os.path.abspath(path)  # noqa: PTH100 - resolving would follow /dev/stdout to the file behind it
    match = _DESCRIPTOR_PATH.fullmatch(name)
    return int(match.group(1)) if match else _STANDARD_STREAMS.get(name)
