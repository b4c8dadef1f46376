"""What only object stores have: locks that outlive their process, and stores that ignore conditions."""

import pytest
from obstore.store import MemoryStore

from attlas.extract.errors import Refusal
from attlas.extract.store import Store
from attlas.extract.store.layout import LOCK
from attlas.extract.store.objects import ObjectStorage


class Forgetful(ObjectStorage):
    """A store that creates an object wherever it is asked to, as stores do that ignore If-None-Match."""

    def put_if_absent(self, key: str, content: bytes) -> bool:
        self.put(key, content)
        return True


def test_a_store_that_ignores_the_condition_is_refused_by_name() -> None:
    with pytest.raises(Refusal, match=r"If-None-Match\); memory:// ignores the condition; use another store"):
        Store(Forgetful(MemoryStore())).lock()


def test_the_lock_of_a_killed_process_is_named_with_what_to_do() -> None:
    storage = ObjectStorage(MemoryStore(), "s3://bucket/run")
    storage.put(LOCK, b"other-host 12 0123456789abcdef")
    for refused in (Store(storage).lock, Store(storage).refuse_busy):
        with pytest.raises(
            Refusal, match=r"\(pid 12 on other-host; if it was killed, delete s3://bucket/run/_work/lock\) now; wait"
        ):
            refused()
    storage.delete(LOCK)
    Store(storage).lock().release()
    assert storage.get(LOCK) is None


def test_two_storages_over_one_store_share_a_lock_and_over_two_do_not() -> None:
    store = MemoryStore()
    lock = Store(ObjectStorage(store)).lock()
    assert Store(ObjectStorage(store)).lock() is lock
    assert Store(ObjectStorage(MemoryStore())).lock() is not lock


def test_a_failure_of_the_store_names_the_place() -> None:
    storage = ObjectStorage(MemoryStore(), "s3://bucket/run")
    storage.put("a", b"x")
    with pytest.raises(OSError, match="s3://bucket/run/a can't be read: "):
        storage.get_range("a", 5, 1)
