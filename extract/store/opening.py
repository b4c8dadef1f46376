"""Opens the storage that a user names."""

from __future__ import annotations

import os
from pathlib import Path

from attlas.extract.errors import Refusal, first_line
from attlas.extract.store.interface import Storage
from attlas.extract.store.local import LocalFolder
from attlas.extract.urls import is_url, refuse_unsafe_url

Location = str | os.PathLike[str] | Storage
_ELSEWHERE = {"file": "give the folder's path", "memory": "give an ObjectStorage over obstore's MemoryStore"}


def open_storage(location: Location) -> Storage:
    """The storage at a location: the path of a folder, the URL of an object store (`s3://…`), or a storage as it is."""
    if isinstance(location, Storage):
        return location
    if isinstance(location, str) and is_url(location):
        return _object_storage(location)
    return LocalFolder(Path(location))


def _object_storage(address: str) -> Storage:
    refuse_unsafe_url(address)
    rule = f"the URL of a dataset is that of an object store, such as s3://bucket/folder; {address}"
    way_out = _ELSEWHERE.get(address.partition("://")[0])
    if way_out:
        raise Refusal(f"{rule} is not; {way_out}")
    try:
        from obstore.store import from_url

        from attlas.extract.store.objects import ObjectStorage
    except ImportError as error:
        raise Refusal(f"{rule} needs the package obstore to open it; pip install obstore") from error
    try:
        return ObjectStorage(from_url(address), address)
    except Exception as error:  # obstore raises many types, from URLs, settings and credentials
        raise Refusal(f"{rule} can't be opened ({first_line(error)}); check the URL and the credentials") from error
