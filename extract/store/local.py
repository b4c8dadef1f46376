"""Storage in a local folder."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from attlas.extract.errors import Damaged, Refusal
from attlas.extract.files import atomic_replacement, discard, open_regular, put_if_absent, read_file, write_atomically
from attlas.extract.store.flock import flock, flock_holder
from attlas.extract.store.interface import Storage, is_key
from attlas.extract.store.layout import name_of

LINK_OUT = "it is a link that leads out of the dataset"
_MAX_JSON_BYTES = 1 << 28  # a manifest names a part in 200


@dataclass(frozen=True)
class LocalFolder(Storage):
    """Keys are paths below `root`, which need not exist yet. Writes replace symbolic links.

    Reads follow links that stay inside the root, so that whoever made a dataset can't have other files read through it. In a
    snapshot of the hub's cache, whose files are links to its `blobs`, those are inside as well.
    """

    root: Path

    def place(self, key: str = "") -> str:
        return str(self._path(key))

    def put(self, key: str, content: bytes) -> None:
        write_atomically(self._path(key), content)

    def put_if_absent(self, key: str, content: bytes) -> bool:
        return put_if_absent(self._path(key), content)

    @contextmanager
    def writing(self, key: str) -> Iterator[BinaryIO]:
        with atomic_replacement(self._path(key)) as temporary, temporary.open("wb") as file:
            yield file

    def get(self, key: str) -> bytes | None:
        limit = _MAX_JSON_BYTES if key.endswith(".json") else None
        try:
            return read_file(self._path_inside(key), limit=limit)
        except OSError as error:
            raise Damaged(f"{name_of(key)} can't be read ({error.strerror or error})") from error

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self.open(key) as file:
            file.seek(start)
            return file.read(length)

    def open(self, key: str) -> BinaryIO:
        try:
            return open_regular(self._path_inside(key))
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # no such file can exist
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.place(key)) from error
            raise

    def source(self, key: str, size: int) -> str:  # noqa: ARG002
        return str(self._path_inside(key))

    def size(self, key: str) -> int | None:
        try:
            status = self._path(key).lstat()
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def list(self, folder: str = "") -> Iterator[str]:
        paths = (Path(above, name) for above, _, files in os.walk(self._path(folder)) for name in files)
        yield from (p.relative_to(self.root).as_posix() for p in sorted(paths) if p.is_file())

    def names(self, folder: str = "") -> Sequence[str] | None:
        path = self._path(folder)
        if path.is_dir():
            return sorted(entry.name for entry in path.iterdir())
        if path.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        return None

    def delete(self, key: str) -> None:
        discard(self._path(key))

    def clear(self, folder: str, keys: Iterable[str] = ()) -> None:  # noqa: ARG002
        shutil.rmtree(self._path(folder), ignore_errors=True)

    def remove_if_empty(self) -> None:
        with suppress(OSError):
            self.root.rmdir()

    def refuse_obstacle(self, key: str) -> None:
        path = self._path(key)
        _refuse_other(path.parent, is_folder=True)
        _refuse_other(path, is_folder=False)

    def try_lock(self, key: str) -> Callable[[], None] | None:
        return flock(self._path(key))

    def lock_holder(self, key: str) -> str | None:
        return flock_holder(self._path(key))

    def identity(self, key: str) -> str:
        path = self._path(key)
        return os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118 - realpath survives loops of links

    def _path_inside(self, key: str) -> Path:
        """The path of a key to read. Raises OSError for one that links lead out of the root."""
        path, root = self._path(key), Path(os.path.realpath(self.root))
        inside = [root] if root.parent.name != "snapshots" else [root, root.parent.parent / "blobs"]
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(folder) for folder in inside):
            raise OSError(errno.ELOOP, LINK_OUT, str(path))
        return path

    def _path(self, key: str) -> Path:
        if key and not is_key(key):
            raise ValueError(f"a key is a relative path with forward slashes; got {key!r}")
        return self.root / key


def _refuse_other(path: Path, *, is_folder: bool) -> None:
    """Refuse a path at which something else lies than the file or folder that will be written there."""
    if path.is_symlink() and not path.exists():
        is_free = not is_folder  # a broken link; a file takes its place
    else:
        is_free = not path.exists() or path.is_dir() == is_folder
    if not is_free:
        kind, came = ("folder", "something else") if is_folder else ("file", "a folder")
        raise Refusal(f"a {kind} is to be written at {path}, where {came} lies; move it away and run again")
