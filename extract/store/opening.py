"""From what a user names to a storage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from extract.errors import Refusal, first_line
from extract.store.interface import Storage
from extract.store.local import LocalFolder
from extract.store.sealed import as_json, get_json

Location = str | os.PathLike[str] | Storage
_ELSEWHERE = {"file": "give the folder's path", "memory": "give an ObjectStorage over obstore's MemoryStore"}


def open_storage(location: Location) -> Storage:
    """The storage at a location: a folder's path, the address of an object store (`s3://…`), or a storage itself."""
    if isinstance(location, Storage):
        return location
    if isinstance(location, str) and "://" in location:
        return _object_storage(location)
    return LocalFolder(Path(location))


def _object_storage(address: str) -> Storage:
    rule = f"an address is that of an object store, such as s3://bucket/folder; {address}"
    way_out = _ELSEWHERE.get(address.partition("://")[0])
    if way_out:
        raise Refusal(f"{rule} is none; {way_out}")
    try:
        from obstore.store import from_url

        from extract.store.objects import ObjectStorage
    except ImportError as error:
        raise Refusal(f"{rule} needs the package obstore to open it; pip install obstore") from error
    try:
        return ObjectStorage(from_url(address), address)
    except Exception as error:  # of obstore, whatever it makes of an address and of the environment's credentials
        raise Refusal(f"{rule} can't be opened ({first_line(error)}); check the address and the credentials") from error


def read_json(file: Path) -> Any | None:
    """The value of a JSON file, or None where there is none, for tools that look at a local dataset. Raises Damaged."""
    return get_json(LocalFolder(file.parent), file.name)


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file as a dataset's are, for tools that change a local dataset."""
    LocalFolder(file.parent).put(file.name, as_json(value))
