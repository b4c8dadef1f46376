"""Files that appear whole or not at all, and are read as if anything could have happened to them since."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from extract.errors import Damaged, first_line
from extract.shapes import has_infinity, is_nested_beyond

# far more than anything written here, far less than what a recursive reader can bear
_LEVELS = 64
_SEAL = "seal"


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
    except OSError as error:
        raise _named(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


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


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, as_json(value))


def as_json(value: Any) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def read_json(path: Path) -> Any | None:
    """The file's value, or None where there is no such file. Raises Damaged."""
    content = read_file(path)
    if content is None:
        return None
    try:
        value = json.loads(content.decode(), parse_constant=_refuse_constant)
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} is JSON; this one is not ({first_line(error)})") from error
    if value is None:  # which says here that there is no file
        raise Damaged(f"{path.name} holds nothing but null")
    if is_nested_beyond(value, _LEVELS) or has_infinity(value):
        raise Damaged(f"{path.name} is not what was written (it is nested too deep, or a number in it is infinite)")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object with its own digest in it, so that a reader can tell whether anything in it was changed."""
    write_atomically(path, sealed(value))


def sealed(value: Mapping[str, Any]) -> bytes:
    return as_json({**value, _SEAL: _digest(value)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """An object as it was sealed, or None where there is no such file. Raises Damaged."""
    value = read_json(path)
    if value is None:
        return None
    seal = value.pop(_SEAL, None) if isinstance(value, dict) else None
    if seal != _digest(value):
        raise Damaged(f"{path.name} is not as it was written (its seal does not fit)")
    return value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
    return True


def _create(path: Path, content: bytes) -> bool:
    try:
        _write_durably(path, content, "xb")
    except FileExistsError:
        return False
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _named(error, path) from error
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
