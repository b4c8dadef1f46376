"""Atomic, durable file writes, and reads that expect missing, damaged or irregular files."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Literal

from attlas.extract.errors import Damaged, first_line


@contextmanager
def atomic_replacement(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that replaces it, durably, when the block ends.

    If the block or the file system fails, the temporary file is removed and `path` is unchanged; an OSError names `path`.
    """
    temporary = _temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _error_with_path(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make new names in a folder durable, if the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary_path(path: Path) -> Path:
    """A path beside the file that no other process or thread uses."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _error_with_path(error: OSError, path: Path) -> OSError:
    """The same error with the path that the user knows; libraries omit it or name the temporary file."""
    if error.errno is None:
        return OSError(f"{path} can't be written: {first_line(error)}")
    return OSError(error.errno, f"can't be written: {os.strerror(error.errno)}", str(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically and durably."""
    with atomic_replacement(path) as temporary:
        temporary.write_bytes(content)


def put_if_absent(path: Path, content: bytes) -> bool:
    """Create a file, durably, unless it exists; of several callers at once, exactly one succeeds and gets True.

    The file is linked into place, which is atomic on network file systems too. Without hard links it is created
    exclusively, and a killed process can leave it truncated.
    """
    temporary = _temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _error_with_path(error, path) from error
    try:
        _write_durably(temporary, content, "xb")
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise _error_with_path(error, path) from error
        return _create_exclusively(path, content)
    finally:
        with suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)
    return True


def _create_exclusively(path: Path, content: bytes) -> bool:
    try:
        _write_durably(path, content, "xb")
    except FileExistsError:
        return False
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _error_with_path(error, path) from error
    _sync_folder(path.parent)
    return True


def _write_durably(path: Path, content: bytes, mode: Literal["wb", "xb"]) -> None:
    with path.open(mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def discard(path: Path) -> None:
    """Remove a file, or a folder that is in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_file(path: Path, *, limit: int | None = None) -> bytes | None:
    """The content of a regular file, or None if it does not exist. Raises Damaged if it can't be read or has more bytes than `limit`."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise Damaged(f"{path.name} can't be read (it has {size:,} bytes, more than {limit:,})")
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Damaged(f"{path.name} can't be read ({error.strerror or error})") from error


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Raises OSError, without blocking, for a folder, a pipe or a device."""
    file = open(path, "rb", opener=_open_nonblocking)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(None, "it is not a regular file", str(path))
    return file


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
