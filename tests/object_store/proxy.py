"""A proxy in front of an object store that counts requests and makes some of them fail, in ways drawn from a seed."""

import contextlib
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# "before": the store never sees the request; "after": it does what it is asked to, and the answer is lost
FAULTS = (
    "500 before",
    "500 after",
    "503 before",
    "silence before",
    "silence after",
    "reset in the middle",
    "reset after",
    "answer cut off",
)
_AT_MOST_IN_A_ROW = 2  # of one request, so that a client that repeats it gets an answer in the end
Headers = list[tuple[str, str]]
_ERRORS = {"500": ("InternalError", 500), "503": ("SlowDown", 503)}


def unconditional(headers: Headers) -> Headers:
    """A request's headers for a store that ignores conditions of creation."""
    return [(name, value) for name, value in headers if name.lower() != "if-none-match"]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    sent: int  # bytes of the answer's body


@dataclass
class Proxy:
    """What the proxy does. rate: the share of requests that fail. list_delay_s: for so long a new object is in no listing."""

    store: int  # its port
    seed: int = 0
    rate: float = 0.0
    faults: Sequence[str] = FAULTS
    only: str = ""  # a pattern for method and path of the requests that may fail
    silence_s: float = 2.3
    list_delay_s: float = 0.0
    # the headers that the store gets for those of a request, and the client for those of an answer
    asked: Callable[[Headers], Headers] = lambda headers: headers
    answered: Callable[[Headers], Headers] = lambda headers: headers
    on_request: Callable[[str], None] = lambda _: None  # called with method and path before the store gets a request
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    _in_a_row: Counter[str] = field(default_factory=Counter)
    _created: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def fault(self, request: str) -> str | None:
        """The fault for a request, if it is to fail."""
        with self._lock:
            if not re.search(self.only, request) or self._in_a_row[request] >= _AT_MOST_IN_A_ROW:
                self._in_a_row[request] = 0
                return None
            if self._random.random() >= self.rate:
                self._in_a_row[request] = 0
                return None
            self._in_a_row[request] += 1
            kind = self._random.choice(list(self.faults))
            self.injected[kind] += 1
            return kind

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)
            if request.method in ("PUT", "POST"):
                self._created.setdefault(unquote(urlsplit(request.path).path), time.monotonic())

    def without_new_keys(self, path: str, body: bytes) -> bytes:
        """The answer to a listing, without objects that are too new."""
        bucket = urlsplit(path).path.rstrip("/")
        now = time.monotonic()

        def keep(match: "re.Match[str]") -> str:
            key = re.search(r"<Key>(.*?)</Key>", match[0], re.DOTALL)
            created = None if key is None else self._created.get(f"{bucket}/{key[1]}")
            return "" if created is not None and now - created < self.list_delay_s else match[0]

        return re.sub(r"<Contents>.*?</Contents>", keep, body.decode(), flags=re.DOTALL).encode()

    @property
    def bytes_sent(self) -> int:
        return sum(request.sent for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *arguments: Any) -> None:
        pass

    def _serve(self) -> None:
        self.proxy.on_request(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        kind = self.proxy.fault(f"{self.command} {self.path}")
        if kind == "reset in the middle":
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self.rfile.read(length)
        if kind == "silence before":
            time.sleep(self.proxy.silence_s)
            self._reset()
            return
        if kind in ("500 before", "503 before"):
            self._answer_error(kind)
            return
        status, headers, answer = self._forwarded(body)
        if kind == "500 after":
            self._answer_error(kind)
        elif kind == "silence after":
            time.sleep(self.proxy.silence_s)
            self._reset()
        elif kind == "reset after":
            self._reset()
        else:
            self._answer(status, headers, answer, cut_off=kind == "answer cut off" and len(answer) > 1)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    def _forwarded(self, body: bytes) -> tuple[int, Headers, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.store, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.proxy.asked(self.headers.items()):
                if name.lower() != "connection":
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            answer = response.read()
        is_listing = self.command == "GET" and "list-type" in parse_qs(urlsplit(self.path).query)
        if is_listing and self.proxy.list_delay_s:
            answer = self.proxy.without_new_keys(self.path, answer)
        self.proxy.note(Request(self.command, self.path, len(answer)))
        return response.status, self.proxy.answered(response.getheaders()), answer

    def _answer(self, status: int, headers: Headers, answer: bytes, *, cut_off: bool) -> None:
        self.send_response_only(status)
        kept = ("connection", "transfer-encoding", *(() if self.command == "HEAD" else ("content-length",)))
        for name, value in headers:
            if name.lower() not in kept:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if cut_off:
            self.wfile.write(answer[: len(answer) // 2])
            self.wfile.flush()
            self._reset()
        elif self.command != "HEAD":
            self.wfile.write(answer)

    def _answer_error(self, kind: str) -> None:
        code, status = _ERRORS[kind[:3]]
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self._answer(status, [("Content-Type", "application/xml")], body, cut_off=False)

    def _reset(self) -> None:
        """Close the connection so that the client gets a reset instead of an end."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()


@contextlib.contextmanager
def started_proxy(proxy: Proxy) -> Iterator[Proxy]:
    """The proxy on a free port, which it then has as `port`."""
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
