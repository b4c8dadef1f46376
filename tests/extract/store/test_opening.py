"""What a location names, and which are refused."""

from pathlib import Path

import pytest
from obstore.store import MemoryStore

from attlas.extract.errors import Refusal
from attlas.extract.store import LocalFolder, open_storage
from attlas.extract.store.objects import ObjectStorage


def test_a_path_is_a_folder_and_a_storage_is_itself(tmp_path: Path) -> None:
    assert open_storage(tmp_path) == open_storage(str(tmp_path)) == LocalFolder(tmp_path)
    memory = ObjectStorage(MemoryStore())
    assert open_storage(memory) is memory


def test_an_address_is_opened_by_obstore() -> None:
    storage = open_storage("s3://bucket/some/folder")
    assert storage.place("heads/a") == "s3://bucket/some/folder/heads/a"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://", "memory:// is not; give an ObjectStorage over obstore's MemoryStore"),
        ("file:///tmp/x", "file:///tmp/x is not; give the folder's path"),
        ("gopher://host/x", "gopher://host/x can't be opened"),
    ],
)
def test_other_addresses_are_refused_by_name(address: str, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        open_storage(address)
