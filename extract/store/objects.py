"""Storage in an object store: S3 and whatever else `obstore` opens, or its store in memory.

A response can be lost after the store has done what it was asked to. So every object that is created conditionally, or in
pieces, has a random number of its writer among its attributes, by which the writer knows it again.

Object stores have no locks. A lock is an object that only one caller can create and that says who did. A killed process
leaves its lock behind: the next process on the same machine takes it over, and the refusal on others names the object to delete.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, TypeVar, cast

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError

from attlas.extract.errors import Refusal, first_line
from attlas.extract.store.interface import Storage, is_key
from attlas.extract.store.layout import TEMPORARY, name_of
from attlas.extract.store.ranges import RangeReader

T = TypeVar("T")

_WRITER = "attlaswriter"  # letters only, which all stores allow in the name of an attribute
_TRIES = 3  # of what the client itself does not repeat
_REPEATED = re.compile(r"after [1-9]\d* retries")
_UPLOADS_AT_ONCE = 4  # a request must end within its timeout, so they should not share a slow line with too many others
_CODE = re.compile(r"<Code>(\w+)</Code>")
_QUERY = re.compile(r"\?\S*")  # may hold a signature
_METADATA_SERVER = "169.254.169.254"  # asked for credentials when the environment has none


@dataclass(frozen=True)
class State:
    """What a store tells of an object without its content."""

    size: int
    tag: str | None  # which the store compares if it is asked to
    modified: str

    @classmethod
    def of(cls, entry: obstore.ObjectMeta) -> State:
        return cls(entry["size"], entry["e_tag"], entry["last_modified"].isoformat())

    @property
    def version(self) -> str:
        """Text that changes whenever the object is written."""
        return self.tag or self.modified


class ChangedObject(OSError):
    """An object that is not as it was when it was looked up."""


class ObjectStorage(Storage):
    """Objects in an `obstore` store; `address` is its URL, for messages.

    upload_bytes: larger objects are uploaded in pieces of this size; a store may ask for 5 MiB at least.
    """

    def __init__(
        self, store: obstore.store.ObjectStore, address: str = "memory://", *, upload_bytes: int = 8 << 20
    ) -> None:
        self._store = store
        self._address = address if address.endswith("://") else address.rstrip("/")
        self._upload_bytes = upload_bytes

    def place(self, key: str = "") -> str:
        return f"{self._address.removesuffix('/')}/{key}" if key else self._address

    def put(self, key: str, content: bytes) -> None:
        with self._name_in_errors(key, "written"):
            _repeated(lambda: obstore.put(self._store, _check_key(key), bytes(content)))

    def put_if_absent(self, key: str, content: bytes) -> bool:
        ours = secrets.token_hex(8)
        with self._name_in_errors(key, "written"):
            for remaining in reversed(range(_TRIES)):
                try:
                    obstore.put(self._store, _check_key(key), bytes(content), mode="create", attributes={_WRITER: ours})
                except AlreadyExistsError:
                    return self._writer(key) == ours
                except GenericError:
                    writer = self._writer(key)
                    if writer is not None:
                        return writer == ours
                    if not remaining:
                        raise
                else:
                    return True
        raise AssertionError("unreachable")

    def _writer(self, key: str) -> str | None:
        """The random number of the writer of an object, empty if it has none; None if there is no object."""
        try:
            found = _repeated(lambda: obstore.get(self._store, key, options={"head": True}))
            return str(found.attributes.get(_WRITER, ""))
        except FileNotFoundError:
            return None

    @contextmanager
    def writing(self, key: str) -> Iterator[BinaryIO]:
        ours = secrets.token_hex(8)
        is_written = False
        with self._name_in_errors(key, "written"):
            writer = obstore.open_writer(
                self._store,
                _check_key(key),
                attributes={_WRITER: ours},
                buffer_size=self._upload_bytes,
                max_concurrency=_UPLOADS_AT_ONCE,
            )
            try:
                with writer:  # an error in the block abandons the upload
                    yield cast(BinaryIO, writer)
                    is_written = True
            except (GenericError, FileNotFoundError):
                # an upload whose completion is repeated, because the answer was lost, is not found
                if not is_written or self._writer(key) != ours:
                    raise

    def get(self, key: str) -> bytes | None:
        try:
            with self._name_in_errors(key, "read"):
                return bytes(_repeated(lambda: obstore.get(self._store, _check_key(key)).bytes()))
        except FileNotFoundError:
            return None

    def get_range(self, key: str, start: int, length: int, *, tag: str | None = None) -> bytes:
        """The same. tag: of the object that is meant; of another one, raises ChangedObject."""
        if not length:
            return b""
        options: obstore.GetOptions = {"range": (start, start + length)}
        if tag is not None:
            options["if_match"] = tag
        with self._name_in_errors(key, "read"):
            try:
                content = bytes(_repeated(lambda: obstore.get(self._store, _check_key(key), options=options).bytes()))
            except PreconditionError:
                raise ChangedObject(f"{self.place(key)} has been written again") from None
        if len(content) != length:
            raise ChangedObject(f"{self.place(key)} has become shorter")
        return content

    def open(self, key: str) -> BinaryIO:
        size = self.size(key)
        if size is None:
            raise FileNotFoundError(f"there is no {self.place(key)}")
        return self.source(key, size)

    def source(self, key: str, size: int) -> BinaryIO:
        return cast(BinaryIO, RangeReader(partial(self.get_range, key), size))

    def size(self, key: str) -> int | None:
        state = self.state(key)
        return None if state is None else state.size

    def state(self, key: str) -> State | None:
        """The state of an object; None if there is none."""
        try:
            with self._name_in_errors(key, "read"):
                return State.of(_repeated(lambda: obstore.head(self._store, _check_key(key))))
        except FileNotFoundError:
            return None

    def list(self, folder: str = "") -> Iterator[str]:
        yield from self.states(folder)

    def states(self, folder: str = "") -> dict[str, State]:
        """The state of each object below a folder, in the order of keys."""
        with self._name_in_errors(folder, "listed"):
            found = _repeated(
                lambda: [
                    (entry["path"], State.of(entry))
                    for chunk in obstore.list(self._store, prefix=folder or None)
                    for entry in chunk
                ]
            )
        return dict(sorted(found, key=lambda entry: entry[0].split("/")))

    def names(self, folder: str = "") -> Sequence[str] | None:
        with self._name_in_errors(folder, "listed"):
            found = _repeated(lambda: obstore.list_with_delimiter(self._store, prefix=folder or None))
        keys = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted({name_of(key.rstrip("/")) for key in keys}) or None

    def delete(self, key: str) -> None:
        with self._name_in_errors(key, "deleted"), suppress(FileNotFoundError):
            _repeated(lambda: obstore.delete(self._store, _check_key(key)))

    def clear(self, folder: str, keys: Iterable[str] = ()) -> None:
        with suppress(OSError), self._name_in_errors(folder, "deleted"):
            listed = list(self.list(folder))
            if listed:
                _repeated(lambda: obstore.delete(self._store, listed))
            for key in {*keys}.difference(listed):
                self.delete(key)

    def remove_if_empty(self) -> None:
        """Object stores have no empty folders."""

    def refuse_obstacle(self, key: str) -> None:
        """Any object may be replaced."""

    def try_lock(self, key: str) -> Callable[[], None] | None:
        ours = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}".encode()
        if not self.put_if_absent(key, ours) and not self._take_over(key, ours):
            return None
        if self.put_if_absent(key, ours):
            self.delete(key)
            raise Refusal(
                f"an object store must support conditional creation (If-None-Match); {self.place()} ignores the "
                "condition; use another store"
            )
        return partial(self._unlock, key, ours)

    def _take_over(self, key: str, ours: bytes) -> bool:
        """Replace the lock of a process of this machine that is gone; of several callers, one succeeds."""
        theirs = self.get(key)
        if theirs is None or not _is_of_ended_process(theirs):
            return False
        claim = f"{key}.{theirs.split()[-1].decode(errors='replace')}{TEMPORARY}"
        if not is_key(claim) or not self.put_if_absent(claim, ours):
            return False
        try:
            if self.get(key) != theirs:
                return False
            self.put(key, ours)
        finally:
            self.delete(claim)
        return True

    def _unlock(self, key: str, ours: bytes) -> None:
        with suppress(OSError):
            if self.get(key) == ours:
                self.delete(key)

    def lock_holder(self, key: str) -> str | None:
        content = self.get(key)
        if content is None or _is_of_ended_process(content):
            return None
        host, pid = _holder(content)
        if (host, pid) == (socket.gethostname(), str(os.getpid())):
            return "another thread of this process"
        return f"another process (pid {pid} on {host}; if it was killed, delete {self.place(key)})"

    def identity(self, key: str) -> str:
        # all stores in memory have one address
        is_in_memory = isinstance(self._store, obstore.store.MemoryStore)
        return f"{self.place(key)} {id(self._store)}" if is_in_memory else self.place(key)

    @contextmanager
    def _name_in_errors(self, key: str, done: str) -> Iterator[None]:
        """Turn errors of the store into OSErrors that name the full place."""
        try:
            yield
        except FileNotFoundError as error:
            if done == "read":
                raise FileNotFoundError(f"there is no {self.place(key)}") from error
            raise OSError(f"{self.place(key)} can't be {done}: {_reason(error)}") from None
        except BaseError as error:
            raise OSError(f"{self.place(key)} can't be {done}: {_reason(error)}") from None


def _repeated(call: Callable[[], T]) -> T:
    """Call again if it fails, unless the client has repeated the request itself: it does so neither for deletions nor for answers that are cut off."""
    for _ in range(_TRIES - 1):
        try:
            return call()
        except GenericError as error:
            if _REPEATED.search(str(error)):
                raise
    return call()


def _reason(error: BaseException) -> str:
    """What the store or its client says, in a line without the request's signature and the answer's body."""
    text = _QUERY.sub("", first_line(error).partition(": <")[0])
    code = _CODE.search(str(error))
    advice = "; the environment has no credentials" if _METADATA_SERVER in text else ""
    return f"{text} ({code[1]}){advice}" if code else f"{text}{advice}"


def _holder(lock: bytes) -> tuple[str, str]:
    """Host and process id in a lock."""
    host, pid, *_ = [*lock.decode(errors="replace").split(), "?", "?"]
    return host, pid


def _is_of_ended_process(lock: bytes) -> bool:
    """Whether the process that holds a lock was one of this machine and is gone."""
    host, pid = _holder(lock)
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _check_key(key: str) -> str:
    if not is_key(key):
        raise ValueError(f"a key is a relative path with forward slashes; got {key!r}")
    return key
