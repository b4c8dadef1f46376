"""Storage in an object store: S3 and whatever else `obstore` opens, or its store in memory.

Object stores have no locks. A lock is an object that only one caller can create and that says who did. A killed process
leaves its lock behind; the refusal names the object to delete.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import BinaryIO, cast

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from attlas.extract.errors import Refusal, first_line
from attlas.extract.store.interface import Storage, is_key
from attlas.extract.store.layout import name_of
from attlas.extract.store.ranges import RangeReader


class ObjectStorage(Storage):
    """Objects in an `obstore` store; `address` is its URL, for messages."""

    def __init__(self, store: obstore.store.ObjectStore, address: str = "memory://") -> None:
        self._store = store
        self._address = address if address.endswith("://") else address.rstrip("/")

    def place(self, key: str = "") -> str:
        return f"{self._address.removesuffix('/')}/{key}" if key else self._address

    def put(self, key: str, content: bytes) -> None:
        with self._name_in_errors(key, "written"):
            obstore.put(self._store, _check_key(key), bytes(content))

    def put_if_absent(self, key: str, content: bytes) -> bool:
        with self._name_in_errors(key, "written"):
            try:
                obstore.put(self._store, _check_key(key), bytes(content), mode="create")
            except AlreadyExistsError:
                return False
        return True

    @contextmanager
    def writing(self, key: str) -> Iterator[BinaryIO]:
        # without close() no object appears
        with self._name_in_errors(key, "written"):
            writer = obstore.open_writer(self._store, _check_key(key))
            yield cast(BinaryIO, writer)
            writer.close()

    def get(self, key: str) -> bytes | None:
        try:
            with self._name_in_errors(key, "read"):
                return bytes(obstore.get(self._store, _check_key(key)).bytes())
        except FileNotFoundError:
            return None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._name_in_errors(key, "read"):
            return bytes(obstore.get_range(self._store, _check_key(key), start=start, length=length)) if length else b""

    def open(self, key: str) -> BinaryIO:
        size = self.size(key)
        if size is None:
            raise FileNotFoundError(f"there is no {self.place(key)}")
        return cast(BinaryIO, RangeReader(partial(self.get_range, key), size))

    def source(self, key: str) -> BinaryIO:
        return self.open(key)

    def size(self, key: str) -> int | None:
        try:
            with self._name_in_errors(key, "read"):
                return obstore.head(self._store, _check_key(key))["size"]
        except FileNotFoundError:
            return None

    def list(self, folder: str = "") -> Iterator[str]:
        with self._name_in_errors(folder, "listed"):
            found = [entry["path"] for chunk in obstore.list(self._store, prefix=folder or None) for entry in chunk]
        yield from sorted(found, key=lambda key: key.split("/"))

    def names(self, folder: str = "") -> Sequence[str] | None:
        with self._name_in_errors(folder, "listed"):
            found = obstore.list_with_delimiter(self._store, prefix=folder or None)
        keys = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted({name_of(key.rstrip("/")) for key in keys}) or None

    def delete(self, key: str) -> None:
        with self._name_in_errors(key, "deleted"), suppress(FileNotFoundError):
            obstore.delete(self._store, _check_key(key))

    def clear(self, folder: str) -> None:
        keys = list(self.list(folder))
        with suppress(OSError), self._name_in_errors(folder, "deleted"):
            obstore.delete(self._store, keys)

    def remove_if_empty(self) -> None:
        """Object stores have no empty folders."""

    def refuse_obstacle(self, key: str) -> None:
        """Any object may be replaced."""

    def try_lock(self, key: str) -> Callable[[], None] | None:
        ours = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}".encode()
        # a client that retried after a lost response is refused because of the object it created itself
        if not self.put_if_absent(key, ours) and self.get(key) != ours:
            return None
        if self.put_if_absent(key, ours):
            raise Refusal(
                f"an object store must support conditional creation (If-None-Match); {self.place()} ignores the "
                "condition; use another store"
            )
        return partial(self._unlock, key, ours)

    def _unlock(self, key: str, ours: bytes) -> None:
        with suppress(OSError):
            if self.get(key) == ours:
                self.delete(key)

    def lock_holder(self, key: str) -> str | None:
        content = self.get(key)
        if content is None:
            return None
        host, pid, *_ = [*content.decode(errors="replace").split(), "?", "?"]
        if (host, pid) == (socket.gethostname(), str(os.getpid())):
            return "another thread of this process"
        return f"another process (pid {pid} on {host}; if it was killed, delete {self.place(key)})"

    def identity(self, key: str) -> str:
        return f"{self.place(key)} {id(self._store)}"

    @contextmanager
    def _name_in_errors(self, key: str, done: str) -> Iterator[None]:
        """Turn errors of the store into OSErrors that name the full place."""
        try:
            yield
        except FileNotFoundError as error:
            if done == "read":
                raise FileNotFoundError(f"there is no {self.place(key)}") from error
            raise OSError(f"{self.place(key)} can't be {done}: {first_line(error)}") from error
        except BaseError as error:
            raise OSError(f"{self.place(key)} can't be {done}: {first_line(error)}") from error


def _check_key(key: str) -> str:
    if not is_key(key):
        raise ValueError(f"a key is a relative path with forward slashes; got {key!r}")
    return key
