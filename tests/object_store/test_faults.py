"""Storage over a real server that fails: what was done is done once, and what can't be done is said in words."""

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from attlas.extract.errors import Refusal
from attlas.extract.store import Storage, Store, open_storage
from attlas.extract.store.layout import LOCK
from attlas.extract.store.objects import ObjectStorage
from tests.object_store.proxy import FAULTS, Proxy, started_proxy, unconditional
from tests.object_store.server import KEY, SECRET, environment

MIB = 1 << 20


def in_pieces(url: str) -> Storage:
    """The storage of a URL, with uploads in pieces of the smallest size that stores take."""
    storage = open_storage(url)
    assert isinstance(storage, ObjectStorage)
    return ObjectStorage(storage._store, url, upload_bytes=5 * MIB)


def write(storage: Storage, key: str, content: bytes) -> None:
    with storage.writing(key) as file:
        for start in range(0, len(content), MIB):
            file.write(content[start : start + MIB])


def slow_if_silent(fault: str) -> object:
    return pytest.param(fault, marks=pytest.mark.slow) if "silence" in fault else fault


@pytest.mark.parametrize("fault", [slow_if_silent(f) for f in FAULTS])
def test_each_fault_is_survived_by_each_operation(proxy: Proxy, url: str, fault: str) -> None:
    storage = open_storage(url)
    proxy.faults, proxy.rate = (fault,), 1.0  # the first two tries of each request fail
    content = os.urandom(10_000)
    storage.put("a/b", content)
    assert storage.get("a/b") == content
    assert storage.get_range("a/b", 17, 1000) == content[17:1017]
    assert storage.size("a/b") == len(content)
    assert list(storage.list()) == ["a/b"]
    assert storage.put_if_absent("c", b"ours")
    assert not storage.put_if_absent("c", b"ours")
    assert proxy.injected[fault] >= 10


@pytest.mark.parametrize("fault", [slow_if_silent(f) for f in FAULTS if "after" in f])
def test_of_many_who_create_while_answers_are_lost_one_succeeds(proxy: Proxy, url: str, fault: str) -> None:
    storage = open_storage(url)
    proxy.faults, proxy.rate, proxy.only = (fault,), 0.7, "^PUT"
    for n in range(3):
        with ThreadPoolExecutor(4) as pool:
            # the same content, as two processes with the same run have
            won = list(pool.map(lambda _, key=f"claims/{n}": storage.put_if_absent(key, b"same"), range(4)))
        assert won.count(True) == 1
    assert proxy.injected[fault] >= 5


def test_a_large_object_is_uploaded_in_pieces_that_are_tried_again(proxy: Proxy, url: str) -> None:
    storage, content = in_pieces(url), os.urandom(17 * MIB)
    proxy.rate, proxy.only = 0.6, "^PUT|^POST"
    write(storage, "heads/part", content)
    assert storage.get("heads/part") == content
    assert proxy.injected.total() >= 4
    sent = [r for r in proxy.requests if r.method == "PUT" and "partNumber=" in r.path]
    assert len({r.path for r in sent}) == 4


def test_an_upload_whose_completion_is_answered_by_nobody_is_complete(proxy: Proxy, url: str) -> None:
    storage, content = in_pieces(url), os.urandom(11 * MIB)
    proxy.rate, proxy.only, proxy.faults = 1.0, r"^POST .*uploadId=", ("reset after",)
    write(storage, "heads/part", content)
    assert proxy.injected["reset after"] >= 1
    assert storage.get("heads/part") == content


def test_an_upload_that_fails_leaves_no_object_and_no_pieces(proxy: Proxy, url: str) -> None:
    import boto3

    storage = in_pieces(url)
    with pytest.raises(ArithmeticError), storage.writing("heads/part") as file:
        file.write(b"x" * 11 * MIB)
        raise ArithmeticError
    assert storage.get("heads/part") is None
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{proxy.store}")
    uploads = client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    assert [upload for upload in uploads if url.rpartition("/")[2] in upload["Key"]] == []


@pytest.mark.parametrize("moment", ["dead", "silent"])
def test_a_dead_server_is_given_up_in_words(url: str, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    from attlas.extract.store import opening

    monkeypatch.setattr(opening, "_RETRIED_FOR", timedelta(seconds=4))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if moment == "silent":
            listening.listen()
        for name, value in environment(listening.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        storage, start = open_storage(url), time.monotonic()
        with pytest.raises(OSError, match=rf"^{url}/a can't be read: .*error sending request"):
            storage.get("a")
        assert time.monotonic() - start < 30


def test_no_message_has_a_secret_or_the_answer_of_the_server(proxy: Proxy, url: str) -> None:
    storage = open_storage(url.replace("bucket", "no-such-bucket"))
    with pytest.raises(OSError, match=r"can't be listed: .*404 Not Found \(NoSuchBucket\)$") as raised:
        storage.names()
    assert raised.value.__cause__ is None
    assert SECRET not in str(raised.value) and KEY not in str(raised.value) and "<" not in str(raised.value)


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_over_by_one(proxy: Proxy, url: str) -> None:
    code = "import os, sys; from attlas.extract.store import Store; lock = Store.at(sys.argv[1]).lock(); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, url], env=dict(os.environ), capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert open_storage(url).get(LOCK) is not None
    Store.at(url).refuse_busy()

    def try_lock(_: int) -> Callable[[], None] | None:
        return open_storage(url).try_lock(LOCK)

    with ThreadPoolExecutor(4) as pool:
        taken = [release for release in pool.map(try_lock, range(4)) if release is not None]
    assert len(taken) == 1
    assert list(open_storage(url).list()) == [LOCK]
    taken[0]()
    assert open_storage(url).get(LOCK) is None


def test_a_store_that_ignores_if_none_match_is_refused(proxy: Proxy, url: str) -> None:
    proxy.asked = unconditional
    with pytest.raises(Refusal, match=r"must support conditional creation \(If-None-Match\); .* ignores the condition"):
        Store.at(url).lock()
    assert open_storage(url).get(LOCK) is None


def test_an_object_is_read_like_a_file_through_faults(proxy: Proxy, url: str) -> None:
    storage, content = open_storage(url), os.urandom(3 * MIB)
    storage.put("a", content)
    proxy.rate = 0.4
    with storage.open("a") as file:
        read = b"".join(iter(lambda: file.read(MIB // 4), b""))
    assert read == content
    assert io.BytesIO(read).read(10) == content[:10]
    assert proxy.injected.total() >= 2


def test_two_proxies_draw_the_same_faults_from_the_same_seed(moto: int) -> None:
    drawn = []
    for _ in range(2):
        with started_proxy(Proxy(moto, seed=3, rate=0.5)) as proxy:
            drawn.append([proxy.fault(f"GET /{n}") for n in range(20)])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 2
