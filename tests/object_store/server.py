"""A real object store over HTTP: moto's server, in a process of its own."""

import contextlib
import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

KEY, SECRET = "AKIATESTOFATTLAS0000", "a-secret-that-is-nowhere/else+0123456789"
BUCKET = "bucket"


@contextlib.contextmanager
def started_server() -> Iterator[int]:
    """The port of a server with one bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _make_bucket(port, seconds=120)
        yield port
    finally:
        process.kill()
        process.wait(30)


def _make_bucket(port: int, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().status == 200
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def environment(port: int) -> dict[str, str]:
    """What the environment says of the store at this port. Requests time out soon, for tests of that."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_TIMEOUT": "2s",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
