"""What a dataset is stored in: objects that have a key, and appear whole or not at all.

A key is text with forward slashes, such as `heads/shard-00000.parquet`. A folder is what keys share before a slash: an
object store has no others, a file system may hold empty ones, and things that are neither folders nor regular files.

What fails is an OSError that names the place; an object that isn't there is a FileNotFoundError, or None where so said.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO

_AT_ONCE = 1 << 22


class Storage(ABC):
    """A folder or an object store."""

    @abstractmethod
    def place(self, key: str = "") -> str:
        """Where an object is, in full, as the user knows it; without a key, where the storage is."""

    @abstractmethod
    def put(self, key: str, content: bytes) -> None:
        """Write a whole object, durably; where that fails, what was there stays."""

    @abstractmethod
    def put_if_absent(self, key: str, content: bytes) -> bool:
        """Write a whole object unless there is one of that key: of all who try at once, one gets True."""

    @abstractmethod
    def writing(self, key: str) -> AbstractContextManager[BinaryIO]:
        """A file to write an object to, of any size; it takes its place when the block ends without an error."""

    @abstractmethod
    def get(self, key: str) -> bytes | None:
        """The whole object, or None where there is nothing. Raises Damaged where something else is in its place."""

    @abstractmethod
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """So many bytes of an object, all of which it has."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """An object to read from, at any place in it."""

    @abstractmethod
    def source(self, key: str) -> str | BinaryIO:
        """What a Parquet reader is given: the name of a local file, else a file that fetches the ranges it is asked for."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """The bytes of an object that is the storage's own, as no symbolic link is; None where there is no such object."""

    @abstractmethod
    def list(self, folder: str = "") -> Iterator[str]:
        """The keys of all objects below a folder, in order."""

    @abstractmethod
    def names(self, folder: str = "") -> Sequence[str] | None:
        """All that lies right in a folder, whatever it is, in order; None where nothing is there.

        Raises NotADirectoryError where something else than a folder is.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object, or whatever lies in its place, if there is any."""

    @abstractmethod
    def clear(self, folder: str) -> None:
        """Remove a folder and all that is in it, as far as that is possible."""

    @abstractmethod
    def remove_if_empty(self) -> None:
        """Remove the storage's own folder unless it holds something."""

    @abstractmethod
    def refuse_obstacle(self, key: str) -> None:
        """Refuse what lies where this object or its folder will be written and is not ours to remove."""

    @abstractmethod
    def try_lock(self, key: str) -> Callable[[], None] | None:
        """Take the lock of this key; gives the function that releases it, or None where another holds it."""

    @abstractmethod
    def lock_holder(self, key: str) -> str | None:
        """Who holds the lock of this key, in words; None where nobody does."""

    @abstractmethod
    def identity(self, key: str) -> str:
        """Text that is the same for two storages of this process just where they mean the same object."""


def sha256_of(storage: Storage, key: str) -> str:
    """The SHA-256 of an object, in hexadecimal."""
    digest = hashlib.sha256()
    with storage.open(key) as file:
        while content := file.read(_AT_ONCE):
            digest.update(content)
    return digest.hexdigest()


def is_key(text: str) -> bool:
    """Whether text can be a key: it leads nowhere else, and there is one way to write it."""
    return "\0" not in text and all(segment not in ("", ".", "..") for segment in text.split("/"))
