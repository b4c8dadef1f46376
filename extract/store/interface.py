"""The storage interface: objects addressed by key, each written whole or not at all.

A key is a string with forward slashes, such as `heads/shard-00000.parquet`. A folder is a prefix of keys that ends before a
slash. A file system may also hold empty folders, symbolic links and special files; an object store has only objects.

Failures are OSErrors that name the full place. Reading a missing object raises FileNotFoundError unless stated otherwise.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO

_AT_ONCE = 1 << 22


class Storage(ABC):
    """A local folder or an object store."""

    @abstractmethod
    def place(self, key: str = "") -> str:
        """The full path or URL of an object, for messages; without a key, that of the storage."""

    @abstractmethod
    def put(self, key: str, content: bytes) -> None:
        """Write an object durably and atomically; on failure the previous one stays."""

    @abstractmethod
    def put_if_absent(self, key: str, content: bytes) -> bool:
        """Create an object if the key is free, atomically; of several concurrent callers exactly one gets True."""

    @abstractmethod
    def writing(self, key: str) -> AbstractContextManager[BinaryIO]:
        """A writable file for an object of any size, which appears when the block ends without an error."""

    @abstractmethod
    def get(self, key: str) -> bytes | None:
        """The content of an object, or None if there is none. Raises Damaged if something else has its name."""

    @abstractmethod
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """A range of bytes, which must lie within the object."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A readable, seekable file over an object."""

    @abstractmethod
    def source(self, key: str, size: int) -> str | BinaryIO:
        """What to give a Parquet reader: the path of a local file, or else a file that fetches only the ranges read.

        size: that of the object in bytes, which is not asked for again.
        """

    @abstractmethod
    def size(self, key: str) -> int | None:
        """The size of an object in bytes; None if there is none, or a symbolic link in its place."""

    @abstractmethod
    def list(self, folder: str = "") -> Iterator[str]:
        """The keys of all objects below a folder, sorted."""

    @abstractmethod
    def names(self, folder: str = "") -> Sequence[str] | None:
        """The names of everything directly inside a folder, sorted; None if nothing is there.

        Raises NotADirectoryError if there is something other than a folder.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object or whatever else has its name; a missing one is no error."""

    @abstractmethod
    def clear(self, folder: str, keys: Iterable[str] = ()) -> None:
        """Delete a folder and everything in it; errors are ignored.

        keys: what may be in it although an object store does not list it yet.
        """

    @abstractmethod
    def remove_if_empty(self) -> None:
        """Delete the root folder if it is empty."""

    @abstractmethod
    def refuse_obstacle(self, key: str) -> None:
        """Refuse if something that must not be deleted is in the way of writing this object."""

    @abstractmethod
    def try_lock(self, key: str) -> Callable[[], None] | None:
        """Try to take a lock; returns the function that releases it, or None if someone else holds it."""

    @abstractmethod
    def lock_holder(self, key: str) -> str | None:
        """A description of who holds a lock; None if it is free."""

    @abstractmethod
    def identity(self, key: str) -> str:
        """A name for an object that two storages of this process share only if they reach the same object."""


def sha256_of(storage: Storage, key: str) -> str:
    """The SHA-256 of an object, in hexadecimal."""
    digest = hashlib.sha256()
    with storage.open(key) as file:
        while content := file.read(_AT_ONCE):
            digest.update(content)
    return digest.hexdigest()


def is_key(text: str) -> bool:
    """Whether text is a valid key: relative, normalised, and inside the storage."""
    return "\0" not in text and all(segment not in ("", ".", "..") for segment in text.split("/"))
