"""The files of a corpus in an object store: an object, all below a prefix, or those that match a glob."""

from __future__ import annotations

import glob
import io
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, cast

from attlas.extract.corpus.finding import EVERYTHING
from attlas.extract.errors import Refusal
from attlas.extract.store.opening import open_storage
from attlas.extract.store.ranges import RangeReader
from attlas.extract.urls import refuse_unsafe_url

if TYPE_CHECKING:
    from attlas.extract.store.objects import ObjectStorage, State

_BUFFER_BYTES = 4 << 20


class UnreadableStore(RuntimeError):
    """A file that the object store does not give: no property of the document, so that it is not dropped."""


@dataclass(frozen=True)
class StoredFile:
    """An object, with what readers use of a path."""

    storage: ObjectStorage
    key: str
    state: State

    @property
    def size(self) -> int:
        return self.state.size

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    def ranges(self) -> BinaryIO:
        """A file that fetches just what is read. Raises UnreadableStore."""
        return cast(BinaryIO, RangeReader(self._fetch, self.size))

    def open(self) -> BinaryIO:
        """A file that is read from its beginning, some megabytes at a time. Raises UnreadableStore."""
        return io.BufferedReader(cast(io.RawIOBase, self.ranges()), _BUFFER_BYTES)

    def _fetch(self, start: int, length: int) -> bytes:
        from attlas.extract.store.objects import ChangedObject

        try:
            return self.storage.get_range(self.key, start, length, tag=self.state.tag)
        except ChangedObject as error:
            raise Refusal(f"a corpus stays as it is while it is read; {error} meanwhile; run it again") from error
        except OSError as error:
            raise UnreadableStore(str(error)) from error


def stored_files(corpus: str) -> tuple[str | None, list[StoredFile]]:
    """The glob's pattern if there is one, and the files, whose keys are relative to what stands before it.

    Names follow the rules of local files: `**` matches any number of folders, and hidden names only what begins with a dot.
    """
    refuse_unsafe_url(corpus)
    scheme, _, path = corpus.rstrip("/").partition("://")
    bucket, *parts = path.split("/")
    named = list(takewhile(lambda part: not glob.has_magic(part), parts))
    pattern = parts[len(named) :]
    if not pattern and named:
        folder = _storage(scheme, bucket, named[:-1])
        state = folder.state(named[-1])
        if state is not None and state.size:  # an empty object may stand for a folder
            return None, [StoredFile(folder, named[-1], state)]
    storage = _storage(scheme, bucket, named)
    states = {key: state for key, state in storage.states().items() if _matches(key.split("/"), pattern or EVERYTHING)}
    folders = {str(above) for key in states for above in PurePosixPath(key).parents}
    found = [StoredFile(storage, key, state) for key, state in states.items() if state.size or key not in folders]
    if not found and not pattern:
        raise Refusal(
            f"a corpus is an object, a prefix or a glob of objects; there is nothing at {corpus}; check the URL"
        )
    return "/".join(pattern) or None, found


def _storage(scheme: str, bucket: str, parts: Sequence[str]) -> ObjectStorage:
    return cast("ObjectStorage", open_storage(f"{scheme}://{'/'.join([bucket, *parts])}"))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        if not rest:
            return bool(parts) and not any(part.startswith(".") for part in parts)
        return _matches(parts, rest) or (bool(parts) and not parts[0].startswith(".") and _matches(parts[1:], pattern))
    is_visible = bool(parts) and (first.startswith(".") or not parts[0].startswith("."))
    return is_visible and fnmatchcase(parts[0], first) and _matches(parts[1:], rest)
