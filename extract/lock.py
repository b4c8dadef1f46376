"""One writer at a time in a dataset's folder.

The lock is the kernel's (`flock`), on a file: it goes with the process that holds it, however that ends, so that no lock
is ever stale. Child processes that were started with `exec` don't inherit it.

On a network file system the kernel passes the lock on where it can (NFS since Linux 2.6.12, with its lock manager running,
and CIFS). Where a file system has no locks, nothing keeps two identical runs apart but the user; a folder is still taken by
one run alone, since that rests on creating a file and not on the lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from pathlib import Path
from weakref import WeakValueDictionary

from extract.errors import Refusal
from extract.files import discard

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_TRIES, _PAUSE_S = 10, 0.02  # somebody who only looks whether the folder is busy is gone at once
_held: WeakValueDictionary[str, Lock] = WeakValueDictionary()
_taking = threading.Lock()


class Lock:
    """A lock that this process holds, until it is released or forgotten. It belongs to the thread that took it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self.owner = threading.current_thread()

    @property
    def is_taken(self) -> bool:
        return self._descriptor is not None

    @property
    def is_ours(self) -> bool:
        """Whether this thread may go on with it: it took the lock itself, or the thread that did is gone."""
        return self.is_taken and (self.owner is threading.current_thread() or not self.owner.is_alive())

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def take_lock(path: Path, *, folder: Path) -> Lock:
    """Lock `folder` by the file `path`, or refuse it where another process or thread holds the lock.

    A thread that holds the lock already gets the same one again.
    """
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_S)
        with _taking:
            held = _held.get(_key(path))
            if held is not None and held.is_ours:
                held.owner = threading.current_thread()
                return held
            if held is not None and held.is_taken:
                break
            descriptor = _opened(path)
            if _is_locked(descriptor, exclusively=True) and _is_still_there(descriptor, path):
                _sign(descriptor)
                lock = _held[_key(path)] = Lock(descriptor)
                return lock
            os.close(descriptor)
    raise _busy(path, folder)


def refuse_busy(path: Path, *, folder: Path) -> None:
    """Refuse a folder whose lock another process or thread holds; nothing is created."""
    with _taking:
        held = _held.get(_key(path))
        if held is not None and held.is_ours:
            return
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:  # there is none
            return
        try:
            is_free = _is_locked(descriptor, exclusively=False)
        finally:
            os.close(descriptor)
    if not is_free:
        raise _busy(path, folder)


def release_lock(path: Path) -> None:
    """Release the lock if this thread holds it."""
    held = _held.get(_key(path))
    if held is not None and held.is_ours:
        held.release()


def _key(path: Path) -> str:
    return os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118 - realpath survives loops of links


def _opened(path: Path) -> int:
    """The lock's file, made anew where something else is in its place."""
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


def _busy(path: Path, folder: Path) -> Refusal:
    holder = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        holder = file.read(20).strip()
    if holder == str(os.getpid()).encode():
        who = "another thread of this process"
    else:
        who = f"another process (pid {holder.decode()})" if holder.isdigit() else "another process"
    return Refusal(
        f"a folder is written by one run at a time; {folder} is being measured by {who} now; "
        "wait until it has ended, or give --out another folder"
    )
