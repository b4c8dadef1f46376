"""A server for all tests here, and the command line and Python pointed to it."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from attlas.extract.store import LocalFolder, Storage, open_storage
from tests.object_store.proxy import Proxy, started_proxy
from tests.object_store.server import BUCKET, environment, started_server


@pytest.fixture(scope="session")
def moto() -> Iterator[int]:
    with started_server() as port:
        yield port


@pytest.fixture
def proxy(moto: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy without faults, to which the environment points; a test may make it worse."""
    with started_proxy(Proxy(moto)) as started:
        for name, value in environment(started.port).items():
            monkeypatch.setenv(name, value)
        yield started


@pytest.fixture
def url(proxy: Proxy) -> str:
    """A new place in the store."""
    return f"s3://{BUCKET}/{uuid4().hex}"


def copied(dataset: Path, url: str) -> Storage:
    """A dataset in the store, with the content of a local one."""
    storage, folder = open_storage(url), LocalFolder(dataset)
    for key in folder.list():
        storage.put(key, folder.get(key) or b"")
    return storage


def contents(storage: Storage) -> dict[str, bytes | None]:
    return {key: storage.get(key) for key in storage.list()}
