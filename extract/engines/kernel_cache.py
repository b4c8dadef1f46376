"""Cache of compiled kernels: a file per kernel, loaded only if it is intact, owned by this user, and of the current sources.

numba caches pickles and machine code, which can run anything. It therefore never sees this cache: a file is checked against
its SHA-256 and unpacked to a private folder, and what numba writes there is stored as one file. A file that does not match
is ignored, and replaced once the kernel has been compiled again. If no folder can be used, a warning says that nothing is
cached.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
from numba.core import config as numba_config
from numba.core.registry import cpu_target

from attlas.extract.files import discard, open_regular, write_atomically

_config: Any = numba_config  # its attributes are created at run time
_DIGEST = hashlib.sha256().digest_size
_temporary: tempfile.TemporaryDirectory[str] | None = None  # if the user's cache can't be written
_compiling = threading.RLock()  # numba's cache folder is a global setting


def load_or_compile(name: str, compile_: Callable[[bool], Any]) -> Any:
    """The kernel of this name, from the cache or compiled with `compile_(keeps)`; `keeps`: whether numba can use its cache."""
    with _compiling:
        try:
            folder = tempfile.TemporaryDirectory(prefix="attlas-")
        except OSError:  # nothing can be written anywhere
            return compile_(False)
        with folder as private, _numba_keeps_in(private):
            archive = _load(name)
            if archive is not None:
                zipfile.ZipFile(io.BytesIO(archive)).extractall(private)
            dispatcher = compile_(True)
            if dispatcher.stats.cache_misses:
                _store(name, _pack(Path(private)))
            return dispatcher


def is_kept(name: str) -> bool:
    """Whether the kernel of this name is in the cache of this machine, compiled from the current sources."""
    return _load(name) is not None


@contextmanager
def _numba_keeps_in(folder: str) -> Iterator[None]:
    before = _config.CACHE_DIR
    _config.CACHE_DIR = folder
    try:
        yield
    finally:
        _config.CACHE_DIR = before


def _load(name: str) -> bytes | None:
    folder = cache_folder()
    if folder is None or not _is_private(folder):
        return None
    try:
        with open_regular(folder / f"{name}.kernel") as file:
            if not _is_ours(os.fstat(file.fileno())):
                return None
            content = file.read()
    except OSError:
        return None
    digest, packed = content[:_DIGEST], content[_DIGEST:]
    return packed if digest == _digest(name, packed) else None


def has_room() -> bool:
    """Whether there is a folder for compiled code: the user's cache, or, with a warning, a temporary one of this process."""
    global _temporary
    try:
        if os.access(_writable_folder(), os.W_OK):
            return True
        reason: object = "the folder can't be written"
    except OSError as error:
        reason = error
    _warn_that_nothing_is_kept(reason)
    try:
        _temporary = tempfile.TemporaryDirectory(prefix="attlas-kernels-")
    except OSError:
        return False
    return True


def environment() -> dict[str, str]:
    """Environment variables that make another process use the cache of this one."""
    return {} if _temporary is None else {"NUMBA_CACHE_DIR": _temporary.name}


def _writable_folder() -> Path:
    """The cache folder, created if necessary. Raises OSError if that fails or others can write to it."""
    folder = cache_folder()
    if folder is None:
        raise PermissionError("there is no home")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_private(folder):
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def _store(name: str, packed: bytes) -> None:
    """Store a compiled kernel, replacing an existing file. Warns if that is not possible."""
    try:
        folder = _writable_folder()
        path = folder / f"{name}.kernel"
        if path.is_dir():
            discard(path)
        write_atomically(path, _digest(name, packed) + packed)
    except OSError as error:
        _warn_that_nothing_is_kept(error)


def _warn_that_nothing_is_kept(reason: object) -> None:
    warnings.warn(
        f"compiled kernels can't be kept: {reason}; every process compiles them again; "
        "set NUMBA_CACHE_DIR to a folder that can be written",
        stacklevel=3,
    )


def _pack(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder).as_posix())
    return content.getvalue()


def _digest(name: str, packed: bytes) -> bytes:
    """A digest that depends on the name and the sources, so that a renamed or copied file does not match."""
    return hashlib.sha256(f"{_key()} {name} ".encode() + packed).digest()


def _is_private(folder: Path) -> bool:
    """Whether it is a folder, not a link, that belongs to this user and that no one else can write to."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return folder.is_dir() and not folder.is_symlink() and _is_ours(status) and not status.st_mode & 0o022


def _is_ours(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def cache_folder() -> Path | None:
    """The cache folder for the current sources on this machine; None if there is no home folder."""
    home = environment().get("NUMBA_CACHE_DIR") or os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(home or Path.home() / ".cache") / "attlas" / _key()
    except RuntimeError:  # the user has no home folder
        return None


@cache
def _key() -> str:
    """Digest of everything that compiled code depends on, including the location of the sources, which numba checks."""
    extract = Path(__file__).parent.parent
    context: Any = cpu_target.target_context
    target = context.codegen().magic_tuple()
    versions = (numba.__version__, version("llvmlite"), platform.python_implementation(), platform.python_version())
    digest = hashlib.sha256(repr((str(extract), target, versions)).encode())
    for source in sorted(extract.glob("engines/*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
