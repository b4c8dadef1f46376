"""A hub for tests: an HTTP server that keeps the files of commits in memory and records requests."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """Repositories by name, each with the files of its branches, and what was asked."""

    address: str = ""
    branches: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    commits: list[list[str]] = field(default_factory=list)  # the files that each one adds
    fail_at_commit: int | None = None

    def create(self, name: str, *, private: bool) -> None:
        self.branches[name] = {"main": {".gitattributes": b""}}
        self.private[name] = private

    def commit(self, name: str, branch: str, lines: bytes) -> None:
        operations = [json.loads(line) for line in lines.splitlines()]
        files = self.branches[name][branch]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        self.commits.append([o["value"]["path"] for o in operations if o["key"] == "file"])


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, method: str) -> None:
            body = self._body()
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{method} {path}")
            is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._send(*_respond(hub, method, path, body) if is_known else (401, {"error": "unknown token"}))

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _send(self, status: int, answer: Any) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _respond(hub: Hub, method: str, path: str, body: bytes) -> tuple[int, Any]:
    """The status and the answer to a request, as far as uploads need it."""
    if path == "/api/whoami-v2":
        return 200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}}
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in hub.branches:
            return 409, {"error": "it exists", "url": f"{hub.address}/datasets/{name}"}
        hub.create(name, private=asked.get("private") or asked.get("visibility") == "private")
        return 200, {"url": f"{hub.address}/datasets/{name}"}
    parts = path.removeprefix("/api/datasets/").split("/")
    name, (what, *rest) = "/".join(parts[:2]), parts[2:] or [""]
    if name not in hub.branches:
        return 404, {"error": f"no {name}"}
    branches = hub.branches[name]
    branch = rest[0] if rest else "main"
    if what == "branch":
        branches.setdefault(branch, dict(branches["main"]))
        return 200, {}
    if branch not in branches:
        return 404, {"error": f"no {branch}"}
    if what in ("", "revision"):
        files = [{"rfilename": file} for file in branches[branch]]
        return 200, {"id": name, "sha": "0" * 40, "siblings": files, "private": hub.private[name], "tags": []}
    if what == "tree":
        return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in branches[branch].items()]
    if what == "preupload":
        files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
        return 200, {"files": files}
    if what == "commit":
        if hub.fail_at_commit == len(hub.commits):
            return 400, {"error": "not taken"}
        hub.commit(name, branch, body)
        return 200, {"commitUrl": f"{hub.address}/datasets/{name}/commit/0", "commitOid": "0" * 40, "success": True}
    return 404, {"error": f"{method} {path}"}
