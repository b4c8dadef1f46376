"""Compiled code between runs: a file for each kernel, loaded only if it is whole, of this user, and of these sources.

numba keeps its code as pickles and machine code, which run whatever they say. So it never sees the cache itself: what is
kept is checked against its SHA-256 and unpacked into a private folder, and what numba leaves there is kept as a whole. A
file that does not fit is as none: the kernel is compiled again and takes its place. Where no folder can be used, nothing
is kept, and a warning says so.
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

_config: Any = numba_config  # its attributes are made at run time
_DIGEST = hashlib.sha256().digest_size
_temporary: tempfile.TemporaryDirectory[str] | None = None  # where the user's cache can't be written
_compiling = threading.RLock()  # numba's folder is one setting for all threads


def compiled(name: str, compile_: Callable[[bool], Any]) -> Any:
    """The kernel of this name, from the cache or compiled; `compile_(keeps)` says whether numba has a folder to keep it in."""
    with _compiling:
        try:
            folder = tempfile.TemporaryDirectory(prefix="attlas-")
        except OSError:  # nothing can be written anywhere
            return compile_(False)
        with folder as private, _numba_keeps_in(private):
            kept = _kept(name)
            if kept is not None:
                zipfile.ZipFile(io.BytesIO(kept)).extractall(private)
            dispatcher = compile_(True)
            if dispatcher.stats.cache_misses:
                _keep(name, _packed(Path(private)))
            return dispatcher


def is_kept(name: str) -> bool:
    """Whether the kernel of this name was compiled on this machine before, from these very sources."""
    return _kept(name) is not None


@contextmanager
def _numba_keeps_in(folder: str) -> Iterator[None]:
    before = _config.CACHE_DIR
    _config.CACHE_DIR = folder
    try:
        yield
    finally:
        _config.CACHE_DIR = before


def _kept(name: str) -> bytes | None:
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
    """Whether there is a folder for compiled code: the user's cache, or else one of this process alone, with a warning."""
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
    """What tells another process to keep its compiled code where this one looks for it."""
    return {} if _temporary is None else {"NUMBA_CACHE_DIR": _temporary.name}


def _writable_folder() -> Path:
    """The cache's folder, made where there is none. Raises OSError where it can't be, or is not this user's alone."""
    folder = cache_folder()
    if folder is None:
        raise PermissionError("there is no home")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_private(folder):
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def _keep(name: str, packed: bytes) -> None:
    """Put what was compiled in the place of what there is. A warning says why nothing can be kept, and goes on."""
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
        f"every process compiles the engine anew, since what is compiled can't be kept: {reason}; "
        "set NUMBA_CACHE_DIR to a folder that can be written",
        stacklevel=3,
    )


def _packed(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder).as_posix())
    return content.getvalue()


def _digest(name: str, packed: bytes) -> bytes:
    """Bound to the name and to what it was compiled from: a file that was renamed or copied does not fit."""
    return hashlib.sha256(f"{_key()} {name} ".encode() + packed).digest()


def _is_private(folder: Path) -> bool:
    """Whether it is a folder of this user's, no link, that nobody else may write into."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return folder.is_dir() and not folder.is_symlink() and _is_ours(status) and not status.st_mode & 0o022


def _is_ours(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def cache_folder() -> Path | None:
    """Where code of these sources, for this machine, is kept; None where there is no home."""
    home = environment().get("NUMBA_CACHE_DIR") or os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(home or Path.home() / ".cache") / "attlas" / _key()
    except RuntimeError:  # a user without a home
        return None


@cache
def _key() -> str:
    """Digest of everything that compiled code depends on, and of where its sources lie, which numba looks at."""
    extract = Path(__file__).parent.parent
    context: Any = cpu_target.target_context
    target = context.codegen().magic_tuple()
    versions = (numba.__version__, version("llvmlite"), platform.python_implementation(), platform.python_version())
    digest = hashlib.sha256(repr((str(extract), target, versions)).encode())
    for source in sorted(extract.glob("engines/*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
