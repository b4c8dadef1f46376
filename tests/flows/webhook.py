"""A webhook's server, which keeps what it has taken."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


@dataclass
class Hook:
    """status: what the next request is answered with; only what gets 200 is taken."""

    status: Callable[[], int]
    received: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    refused: int = 0
    address: str = ""


@contextmanager
def started_hook(status: Callable[[], int]) -> Iterator[Hook]:
    hook = Hook(status)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = hook.status()
            if status == 200:
                hook.received.append(body)
                hook.keys.append(self.headers["Idempotency-Key"])
            else:
                hook.refused += 1
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"{hook.address}elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    hook.address = f"http://127.0.0.1:{server.server_port}/token-of-the-hook"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hook
    finally:
        server.shutdown()
        server.server_close()
