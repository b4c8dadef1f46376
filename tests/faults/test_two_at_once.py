"""Two runs into one folder: exactly one gets it, and the lock of a killed run is free."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attlas.analysis.verify import verify
from attlas.extract.corpus import open_corpus  # noqa: F401 - imported here, so that the race does not include the import
from attlas.extract.errors import Refusal
from attlas.extract.files import put_if_absent
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shards, plan_run
from attlas.extract.store import WORK, Identity, Store

ROOT = Path(__file__).parents[2]
FOLDERS = 100


def race(folder: Path, claim: Callable[[Store, int], object], *, threads: int) -> list[int]:
    """Let all threads claim at once; returns the numbers of those that were not refused."""
    start = threading.Barrier(threads)

    def try_claim(number: int) -> bool:
        start.wait()
        try:
            claim(Store.at(folder), number)
        except Refusal:
            return False
        return True

    with ThreadPoolExecutor(threads) as pool:
        return [number for number, took in enumerate(pool.map(try_claim, range(threads))) if took]


def test_of_different_runs_in_threads_exactly_one_takes_a_folder(tmp_path: Path) -> None:
    for n in range(FOLDERS):
        folder = tmp_path / str(n)
        (winner,) = race(folder, lambda store, number: store.claim(Identity({"run": number}, {})), threads=4)
        assert Store.at(folder).held_identity() == Identity({"run": winner}, {})
        assert [path.name for path in (folder / WORK).iterdir()] == ["run.json"]


def test_of_identical_runs_in_threads_exactly_one_takes_the_lock(tmp_path: Path) -> None:
    for n in range(FOLDERS):
        locks = []
        all_done = threading.Barrier(4)

        def take_lock(store: Store, number: int, locks: list = locks, all_done: threading.Barrier = all_done) -> None:
            try:
                locks.append(store.lock())
            finally:
                all_done.wait()  # a thread that has ended holds no lock

        assert len(race(tmp_path / str(n), take_lock, threads=4)) == 1
        locks[0].release()


CLAIMS = """
import os, sys
from pathlib import Path
from attlas.extract.store import Identity, Store
from attlas.extract.errors import Refusal
print("ready", flush=True)
sys.stdin.readline()
won = []
for n in range(int(sys.argv[2])):
    try:
        Store.at(Path(sys.argv[1]) / str(n)).claim(Identity({"pid": os.getpid()}, {}))
        won.append(n)
    except Refusal:
        pass
print(*won)
"""


@pytest.mark.slow
def test_of_different_runs_in_processes_exactly_one_takes_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CLAIMS, str(tmp_path), str(FOLDERS)]
    runs = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for run in runs:
        assert run.stdout
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        assert run.stdin
        run.stdin.write("go\n")
        run.stdin.flush()
    won = [int(n) for run in runs for n in run.communicate(timeout=60)[0].split()]
    assert all(run.returncode == 0 for run in runs)
    assert sorted(won) == list(range(FOLDERS))


def test_a_file_is_created_completely_and_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    assert put_if_absent(path, b"first")
    assert not put_if_absent(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


HOLDS = """
import sys, time
from pathlib import Path
from attlas.extract.store import Store
lock = Store.at(Path(sys.argv[1])).lock()
print("locked", flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "out")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout
            assert holder.stdout.readline() == "locked\n"
            for refused in (store.lock, store.refuse_busy):
                with pytest.raises(Refusal, match=rf"measured by another process \(pid {holder.pid}\) now; wait"):
                    refused()
        finally:
            holder.send_signal(signal.SIGKILL)
    store.refuse_busy()
    store.lock().release()


def test_a_thread_may_begin_again_and_another_may_not(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    lock = store.lock()
    assert store.lock() is lock
    with ThreadPoolExecutor(1) as other, pytest.raises(Refusal, match="another thread of this process"):
        other.submit(store.lock).result()
    store.unlock()
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(store.lock).result()
        with pytest.raises(Refusal, match="another thread of this process"):
            store.refuse_busy()
    assert store.lock() is theirs  # its thread has ended
    del lock, theirs
    store.refuse_busy()


def test_looking_whether_a_folder_is_busy_creates_nothing(tmp_path: Path) -> None:
    Store.at(tmp_path / "out").refuse_busy()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lay", [lambda p: p.mkdir(), os.mkfifo, lambda p: p.symlink_to(p)])
def test_anything_in_the_place_of_the_lock_is_replaced(tmp_path: Path, lay: Callable[[Path], None]) -> None:
    path = tmp_path / WORK / "lock"
    path.parent.mkdir()
    lay(path)
    lock = Store.at(tmp_path).lock()
    assert path.is_file()
    lock.release()


def test_a_finished_dataset_keeps_no_lock_and_is_free(demo, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A short text, and nothing else. " * 4)
    options = RunOptions(
        model="demo",
        corpus=str(tmp_path / "text.txt"),
        out=tmp_path / "out",
        max_length=12,
        shard_sequences=2,
        engine="reference",
    )
    planned = plan_run(options)
    with ThreadPoolExecutor(1) as other, pytest.raises(Refusal, match="another thread of this process"):
        other.submit(plan_run, options).result()
    measure_shards(planned.open_worker(), planned.remaining)
    finish(options.out)
    assert not (options.out / WORK).exists()
    with ThreadPoolExecutor(1) as other:
        again = other.submit(plan_run, options).result()
    assert again.is_complete
    assert not (options.out / WORK).exists()
    assert verify(options.out) == []
