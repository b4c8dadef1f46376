"""Files that appear whole or not at all, and are read as if anything could have happened to them since."""

from __future__ import annotations

import errno
import hashlib
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
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, durably, once the block has ended.

    Where the block or the file system fails, the temporary file goes and `path` is as it was; an OSError names `path`.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _named(error, path) from error
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


def _temporary(path: Path) -> Path:
    """A name beside the file that no other process or thread takes."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _named(error: OSError, path: Path) -> OSError:
    """The same error, with the file that the user knows; libraries leave it out or name the temporary one."""
    if error.errno is None:
        return OSError(f"{path} can't be written: {first_line(error)}")
    return OSError(error.errno, f"can't be written: {os.strerror(error.errno)}", str(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing, durably."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def put_if_absent(path: Path, content: bytes) -> bool:
    """Create a whole file, durably, unless there is one of that name: of all who try at once, one succeeds.

    It is linked into place, which is atomic on a network file system too. Where there are no hard links it is created
    exclusively, and a kill in between can leave it cut off.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _named(error, path) from error
    try:
        _write_durably(temporary, content, "xb")
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise _named(error, path) from error
        return _create(path, content)
    finally:
        with suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)
    return True


def _create(path: Path, content: bytes) -> bool:
    try:
        _write_durably(path, content, "xb")
    except FileExistsError:
        return False
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _named(error, path) from error
    _sync_folder(path.parent)
    return True


def _write_durably(path: Path, content: bytes, mode: Literal["wb", "xb"]) -> None:
    with path.open(mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def discard(path: Path) -> None:
    """Remove a file, or a folder that lies in a file's place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_file(path: Path) -> bytes | None:
    """The bytes of a regular file, or None where there is nothing. Raises Damaged."""
    try:
        with open_regular(path) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Damaged(f"{path.name} can't be read ({error.strerror or error})") from error


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; a directory, a pipe or a device in its place is an OSError, and nothing is waited for."""
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(None, "it is no regular file", str(path))
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def file_sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
