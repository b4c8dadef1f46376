"""Opens the storage that a user names."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from attlas.extract.errors import Refusal, first_line
from attlas.extract.store.interface import Storage
from attlas.extract.store.local import LocalFolder
from attlas.extract.urls import is_url, refuse_unsafe_url

if TYPE_CHECKING:
    from obstore.store import RetryConfig

Location = str | os.PathLike[str] | Storage
# A request that is not answered fails after 30 s, the default of obstore, which AWS_TIMEOUT and the like change in the
# environment. It is repeated, as are those that fail, for this long: a dead server is given up within about a minute.
_RETRIED_FOR = timedelta(seconds=40)
_LONGEST_PAUSE = timedelta(seconds=5)
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
        retries: RetryConfig = {
            "max_retries": 100,
            "retry_timeout": _RETRIED_FOR,
            "backoff": {"max_backoff": _LONGEST_PAUSE},
        }
        return ObjectStorage(from_url(address, retry_config=retries), address)
    except Exception as error:  # obstore raises many types, from URLs, settings and credentials
        raise Refusal(f"{rule} can't be opened ({first_line(error)}); check the URL and the credentials") from error
