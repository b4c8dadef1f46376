"""A kernel lock (`flock`) on a local file.

The kernel releases it when the process that holds it ends, in whatever way, so that no lock is ever stale. Child processes
that were started with `exec` don't inherit it.

Network file systems support the lock on NFS (since Linux 2.6.12, with a running lock manager) and CIFS. On a file system
without locks, two identical runs are not prevented from writing at the same time. Different runs still are, because claiming
a folder depends on creating a file and not on the lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

from attlas.extract.files import discard

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def flock(path: Path) -> Callable[[], None] | None:
    """Lock the file; returns the function that unlocks it, or None if another process or thread holds the lock."""
    descriptor = _open_lock_file(path)
    try:
        if _is_locked(descriptor, exclusively=True) and _is_still_there(descriptor, path):
            _sign(descriptor)
            return partial(os.close, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def flock_holder(path: Path) -> str | None:
    """A description of who holds the lock; None if it is free. Creates nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # there is none
        return None
    try:
        is_free = _is_locked(descriptor, exclusively=False)
    finally:
        os.close(descriptor)
    return None if is_free else _signed_by(path)


def _open_lock_file(path: Path) -> int:
    """Open the lock file; anything else in its place is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK
    with contextlib.suppress(OSError):
        descriptor = os.open(path, flags, 0o644)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    discard(path)
    return os.open(path, flags, 0o644)


def _is_locked(descriptor: int, *, exclusively: bool) -> bool:
    """Try to lock an open file; where the file system knows no locks, everyone has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True


def _is_still_there(descriptor: int, path: Path) -> bool:
    """Whether the file is still the one of that name: a run that ends removes it while others wait for it."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _sign(descriptor: int) -> None:
    """Leave the number of the process, for those who are refused."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())


def _signed_by(path: Path) -> str:
    holder = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        holder = file.read(20).strip()
    if holder == str(os.getpid()).encode():
        return "another thread of this process"
    return f"another process (pid {holder.decode()})" if holder.isdigit() else "another process"
