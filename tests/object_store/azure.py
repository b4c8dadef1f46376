"""Azurite, an Azure blob store over HTTP, in a process of its own: npm's package azurite."""

import base64
import contextlib
import hashlib
import hmac
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tests.waiting import free_port, wait_until

PROGRAM = shutil.which("azurite-blob")
ACCOUNT, CONTAINER = "devstoreaccount1", "box"
# of every emulator, as its documentation says
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextlib.contextmanager
def started_azurite(folder: Path) -> Iterator[dict[str, str]]:
    """The environment that refers to a store with one container."""
    assert PROGRAM is not None
    port = free_port()
    command = [PROGRAM, "--silent", "--location", str(folder), "--blobPort", str(port), "--skipApiVersionCheck"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _makes_container(port), seconds=60, pause_s=0.2)
        yield {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
            "AZURE_ALLOW_HTTP": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
    finally:
        process.kill()
        process.wait(30)


def _makes_container(port: int) -> bool:
    headers = {"x-ms-date": f"{datetime.now(UTC):%a, %d %b %Y %H:%M:%S} GMT", "x-ms-version": "2021-08-06"}
    of_headers = [f"{name}:{value}" for name, value in headers.items()]
    resource = [f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}", "restype:container"]
    signed = "\n".join(["PUT", *([""] * 11), *of_headers, *resource])
    signature = base64.b64encode(hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()).decode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{ACCOUNT}/{CONTAINER}?restype=container",
        method="PUT",
        headers={**headers, "Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Length": "0"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.status == 201
