"""A real object store over HTTP: moto's server, in a process of its own."""

import contextlib
import http.client
import subprocess
import sys
from collections.abc import Iterator

from tests.waiting import free_port, wait_until

KEY, SECRET = "AKIATESTOFATTLAS0000", "a-secret-that-is-nowhere/else+0123456789"
BUCKET = "bucket"


@contextlib.contextmanager
def started_server() -> Iterator[int]:
    """The port of a server with one bucket."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _makes_bucket(port), seconds=120, pause_s=0.2)
        yield port
    finally:
        process.kill()
        process.wait(30)


def _makes_bucket(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("PUT", f"/{BUCKET}")
    return connection.getresponse().status == 200


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
