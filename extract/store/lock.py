"""One writer per dataset: the locks that this process holds, and the thread that owns each.

The storage excludes other processes, with a kernel lock on a file or an object that can only be created once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from weakref import WeakValueDictionary

from attlas.extract.errors import Busy
from attlas.extract.store.interface import Storage

_TRIES, _PAUSE_S = 10, 0.02  # somebody who only looks whether the folder is busy is gone at once
_held: WeakValueDictionary[str, Lock] = WeakValueDictionary()
_taking = threading.Lock()


class Lock:
    """A lock that this process holds, until it is released or forgotten. It belongs to the thread that took it."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release
        self.owner = threading.current_thread()

    @property
    def is_taken(self) -> bool:
        return self._release is not None

    @property
    def is_ours(self) -> bool:
        """Whether this thread may go on with it: it took the lock itself, or the thread that did is gone."""
        return self.is_taken and (self.owner is threading.current_thread() or not self.owner.is_alive())

    def release(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()

    def __del__(self) -> None:
        self.release()


def take_lock(storage: Storage, key: str) -> Lock:
    """Take a storage's lock; refused if another process or thread holds it.

    A thread that already holds the lock gets the same one again.
    """
    name = storage.identity(key)
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_S)
        with _taking:
            held = _held.get(name)
            if held is not None and held.is_ours:
                held.owner = threading.current_thread()
                return held
            if held is not None and held.is_taken:
                break
            release = storage.try_lock(key)
            if release is not None:
                lock = _held[name] = Lock(release)
                return lock
    raise _busy(storage, storage.lock_holder(key) or "another process")


def refuse_busy(storage: Storage, key: str) -> None:
    """Refuse a storage whose lock another process or thread holds; creates nothing."""
    with _taking:
        held = _held.get(storage.identity(key))
        holder = None if held is not None and held.is_ours else storage.lock_holder(key)
    if holder is not None:
        raise _busy(storage, holder)


def release_lock(storage: Storage, key: str) -> None:
    """Release the lock if this thread holds it."""
    held = _held.get(storage.identity(key))
    if held is not None and held.is_ours:
        held.release()


def _busy(storage: Storage, holder: str) -> Busy:
    return Busy(
        f"a folder is written by one run at a time; {storage.place()} is being measured by {holder} now; "
        "wait until it has ended, or give --out another folder"
    )
