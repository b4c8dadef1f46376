"""What every storage must do, a folder and an object store alike."""

import hashlib
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attlas.extract.errors import Refusal
from attlas.extract.store import Identity, Storage, Store, is_key, part_key, sha256_of
from attlas.extract.store.layout import LOCK, RUN
from attlas.extract.store.lock import refuse_busy, release_lock, take_lock
from attlas.extract.store.parts import write_part
from attlas.extract.store.records import ShardRecord
from attlas.extract.store.sealed import get_sealed, put_sealed

CONTENT = bytes(range(256)) * 40


def test_what_was_put_is_there_and_can_be_replaced(storage: Storage) -> None:
    for content in (CONTENT, b"", b"other"):
        storage.put("a/b/c.bin", content)
        assert storage.get("a/b/c.bin") == content
        assert storage.size("a/b/c.bin") == len(content)


def test_a_new_storage_holds_nothing(storage: Storage) -> None:
    assert storage.get("a") is None
    assert storage.size("a") is None
    assert storage.names() is None
    assert list(storage.list()) == []
    storage.delete("a")
    storage.clear("a")
    storage.remove_if_empty()


def test_a_missing_object_is_named(storage: Storage) -> None:
    for read in (lambda: storage.get_range("a/b", 0, 1), lambda: storage.open("a/b")):
        with pytest.raises(FileNotFoundError, match="a/b"):
            read()


def test_an_object_is_put_where_there_is_none_and_only_once(storage: Storage) -> None:
    assert storage.put_if_absent("deep/er/a", b"first")
    assert not storage.put_if_absent("deep/er/a", b"second")
    assert storage.get("deep/er/a") == b"first"
    assert list(storage.list()) == ["deep/er/a"]


def test_of_many_who_put_at_once_one_succeeds(storage: Storage) -> None:
    for n in range(20):
        start = threading.Barrier(4)

        def put(number: int, key: str = f"claims/{n}", start: threading.Barrier = start) -> bool:
            start.wait()
            return storage.put_if_absent(key, str(number).encode())

        with ThreadPoolExecutor(4) as pool:
            won = [number for number, took in enumerate(pool.map(put, range(4))) if took]
        assert [str(number).encode() for number in won] == [storage.get(f"claims/{n}")]


def test_ranges_are_of_the_object(storage: Storage) -> None:
    storage.put("a", CONTENT)
    for start, length in ((0, 1), (0, len(CONTENT)), (17, 1000), (len(CONTENT) - 3, 3), (5, 0)):
        assert storage.get_range("a", start, length) == CONTENT[start : start + length]


def test_an_object_is_read_like_a_file(storage: Storage) -> None:
    storage.put("a", CONTENT)
    with storage.open("a") as file:
        assert file.read(10) == CONTENT[:10]
        assert file.seek(-5, os.SEEK_END) == len(CONTENT) - 5
        assert file.read() == CONTENT[-5:]
        assert file.read(1) == b""
        file.seek(100)
        file.seek(20, os.SEEK_CUR)
        assert (file.tell(), file.read(3)) == (120, CONTENT[120:123])
    assert sha256_of(storage, "a") == hashlib.sha256(CONTENT).hexdigest()


def test_what_is_written_in_pieces_is_there_when_all_is_written(storage: Storage) -> None:
    storage.put("table/part", b"before")
    with storage.writing("table/part") as file:
        for piece in (CONTENT, b"", memoryview(CONTENT)):
            file.write(piece)
        assert storage.get("table/part") == b"before"
    assert storage.get("table/part") == CONTENT * 2


def test_a_writer_that_fails_leaves_what_was_there(storage: Storage) -> None:
    for key, before in (("new", None), ("old", b"before")):
        if before is not None:
            storage.put(key, before)
        with pytest.raises(ArithmeticError), storage.writing(key) as file:
            file.write(CONTENT * 2000)  # more than any buffer
            raise ArithmeticError
        assert storage.get(key) == before
    assert list(storage.list()) == ["old"]


def test_listing_goes_down_and_names_stay(storage: Storage) -> None:
    for key in ("heads/b", "heads/a", "heads.txt", "_work/records/1", "heads2/a"):
        storage.put(key, b"x")
    assert list(storage.list()) == ["_work/records/1", "heads/a", "heads/b", "heads.txt", "heads2/a"]
    assert list(storage.list("heads")) == ["heads/a", "heads/b"]
    assert list(storage.list("_work")) == ["_work/records/1"]
    assert list(storage.list("nothing")) == []
    assert list(storage.names() or ()) == ["_work", "heads", "heads.txt", "heads2"]
    assert list(storage.names("_work") or ()) == ["records"]
    assert list(storage.names("heads") or ()) == ["a", "b"]
    assert storage.names("nothing") is None


def test_what_is_deleted_is_gone_and_nothing_else(storage: Storage) -> None:
    for key in ("heads/a", "heads/b", "heads2/a", "_work/records/1", "_work/lock"):
        storage.put(key, b"x")
    storage.delete("heads/a")
    storage.delete("heads/a")
    storage.clear("_work")
    assert list(storage.list()) == ["heads/b", "heads2/a"]
    assert storage.names("_work") is None
    storage.remove_if_empty()
    assert list(storage.list()) == ["heads/b", "heads2/a"]


@pytest.mark.parametrize("key", ["", "/a", "a//b", "a/", "../a", "a/../b", "./a", "a\0b"])
def test_a_key_leads_nowhere_else(storage: Storage, key: str) -> None:
    assert not is_key(key)
    if key:
        for use in (storage.get, storage.size, storage.open, storage.delete, lambda k: storage.put(k, b"x")):
            with pytest.raises(ValueError, match="a key is a relative path with forward slashes"):
                use(key)
        assert list(storage.list()) == []


def test_a_place_is_named_in_full(storage: Storage) -> None:
    assert storage.place("heads/a").startswith(storage.place())
    assert storage.place("heads/a").endswith("/heads/a")


# --- locks


def test_a_lock_is_one_threads_until_it_is_released(storage: Storage) -> None:
    lock = take_lock(storage, LOCK)
    assert take_lock(storage, LOCK) is lock
    refuse_busy(storage, LOCK)
    with ThreadPoolExecutor(1) as other:
        for refused in (take_lock, refuse_busy):
            with pytest.raises(Refusal, match="is being measured by another thread of this process now; wait"):
                other.submit(refused, storage, LOCK).result()
        other.submit(release_lock, storage, LOCK).result()
    assert lock.is_taken
    release_lock(storage, LOCK)
    assert not lock.is_taken
    with ThreadPoolExecutor(1) as other:
        other.submit(take_lock, storage, LOCK).result().release()


def test_a_lock_that_is_forgotten_is_free(storage: Storage) -> None:
    lock = take_lock(storage, LOCK)
    del lock
    assert storage.lock_holder(LOCK) is None


def test_who_ends_removes_the_lock_and_another_takes_it(storage: Storage) -> None:
    first = take_lock(storage, LOCK)
    storage.clear("_work")
    with ThreadPoolExecutor(1) as other:
        first.release()
        second = other.submit(take_lock, storage, LOCK).result()
    assert second.is_taken
    assert storage.lock_holder(LOCK) is not None


# --- what a dataset keeps in it


def test_a_sealed_object_tells_whether_it_was_changed(storage: Storage) -> None:
    put_sealed(storage, "_work/plan.json", {"shards": 3})
    assert get_sealed(storage, "_work/plan.json") == {"shards": 3}
    assert get_sealed(storage, "_work/other.json") is None
    storage.put("_work/plan.json", (storage.get("_work/plan.json") or b"").replace(b"3", b"4"))
    with pytest.raises(ValueError, match=r"plan\.json is not as it was written"):
        get_sealed(storage, "_work/plan.json")


def test_a_part_is_known_by_its_size_and_its_digest(storage: Storage) -> None:
    rows = pa.table({"layer": pa.array([0, 1, 2], pa.int16()), "entropy": pa.array([0.5, None, 2], pa.float32())})
    part = write_part(storage, "heads", 3, rows)
    content = storage.get("heads/shard-00003.parquet") or b""
    assert (part.path, part.rows) == (part_key("heads", 3), 3)
    assert (part.bytes, part.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert pq.read_table(io.BytesIO(content)).equals(rows)
    with pq.ParquetFile(storage.source(part.path, part.bytes)) as file:
        assert file.read(columns=["entropy"]).num_rows == 3


def test_every_storage_holds_the_same_bytes_of_a_part(tmp_path) -> None:
    from tests.extract.store.conftest import KINDS

    rows = pa.table({"x": pa.array(range(5000), pa.int64()), "y": pa.array([0.1] * 5000, pa.float32())})
    assert len({write_part(kind(tmp_path), "heads", 0, rows).sha256 for kind in KINDS.values()}) == 1


def test_a_shard_is_done_when_its_record_and_its_parts_are_there(storage: Storage) -> None:
    store = Store(storage)
    part = store.write_part("heads", 0, pa.table({"x": [1]}))
    record = ShardRecord(0, {"heads": part}, {"positions": 4, "padded": 1}, "0" * 64)
    assert not store.has_records
    store.write_record(record)
    assert store.has_records
    assert store.read_record(0) == record
    store.discard_damaged(0, spool="0" * 64)
    assert store.read_record(0) == record
    store.discard_damaged(0, spool="1" * 64)
    assert store.read_record(0) is None
    store.write_record(record)
    storage.put(part.path, (storage.get(part.path) or b"")[:-1])
    assert store.read_record(0) is None


def test_parts_and_records_of_another_plan_go(storage: Storage) -> None:
    store = Store(storage)
    done = []
    for shard in (0, 1):
        part = store.write_part("heads", shard, pa.table({"x": [shard]}))
        done.append(ShardRecord(shard, {"heads": part}, {"positions": 1, "padded": 0}, "0" * 64))
        store.write_record(done[-1])
    storage.put("heads/shard-00001-0a1b2c3d4e5f.parquet", b"x")  # of another plan of the same shard
    foreign = ["_work/records/x.json", "heads/1.parquet"]
    for key in foreign:
        storage.put(key, b"x")
    store.discard_leftovers(done)
    records, parts = ["_work/records/00000.json", "_work/records/00001.json"], [part_key("heads", n) for n in (0, 1)]
    assert set(storage.list()) == {*records, *parts, *foreign}
    store.discard_leftovers(done[:1])
    assert set(storage.list()) == {records[0], parts[0], *foreign}


def run(model: str, **files: int) -> Identity:
    return Identity({"model": model}, {"name": "texts", "files": files})


def test_a_storage_is_taken_by_one_run(storage: Storage) -> None:
    store = Store(storage)
    lock = store.lock()
    assert store.claim(run("a"))
    assert not store.claim(run("a"))
    assert store.held_identity() == run("a")
    with pytest.raises(
        Refusal, match=r"holds a different run, says its _work/run\.json \(model: there 'a', asked 'b'\)"
    ):
        store.claim(run("b"))
    storage.put(RUN, b"{}")
    with pytest.raises(Refusal, match=r"_work/run\.json says which run a folder holds, and it is damaged"):
        store.held_identity()
    lock.release()


def test_the_same_recipe_on_another_state_of_the_corpus_is_told_apart(storage: Storage) -> None:
    Store(storage).claim(run("a", one=1, two=2))
    with pytest.raises(Refusal, match="holds this run on another state of its corpus") as caught:
        Store(storage).claim(run("a", two=3, three=3))
    said = "(corpus file one: there 1, asked None; corpus file three: there None, asked 3; corpus file two: there 2, asked 3)"
    assert said in str(caught.value)
    many = {f"file{n}": n for n in range(1, 100)}
    with pytest.raises(Refusal, match="; and 96 more"):
        Store(storage).claim(run("b", one=1, two=2, **many))


def test_a_storage_that_holds_something_else_is_refused(storage: Storage) -> None:
    storage.put("notes.txt", b"mine")
    with pytest.raises(Refusal, match=r"holds something else \(notes\.txt\) and no run"):
        Store(storage).claim(run("a"))
    assert list(storage.list()) == ["notes.txt"]
