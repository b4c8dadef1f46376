"""Every kind of storage, empty."""

from collections.abc import Callable
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from attlas.extract.store import LocalFolder, Storage
from attlas.extract.store.objects import ObjectStorage

KINDS: dict[str, Callable[[Path], Storage]] = {
    "folder": lambda folder: LocalFolder(folder / "new"),
    "object store": lambda _: ObjectStorage(MemoryStore()),
}


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return KINDS[request.param](tmp_path)
