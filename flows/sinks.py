"""Where alerts go: a file, a webhook, or Prefect's events. A webhook's address is in the environment, and is never shown or stored."""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import NAMESPACE_URL, uuid5

from attlas.extract.errors import Refusal
from attlas.extract.printable import printable
from attlas.flows.api import is_loopback

_TIMEOUT_S = 10.0
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


class SinkFailure(Exception):
    """An alert that was not taken. The message names the sink, without its address."""


class Sink(ABC):
    """One place that alerts go to; `name` is what the user calls it."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def id(self) -> str:
        """A name for files."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:12]

    @abstractmethod
    def send(self, alert: Mapping[str, Any]) -> None:
        """Deliver an alert. Raises SinkFailure."""


class FileSink(Sink):
    """A file of JSON lines, one for each alert. A line that is there already is not written again."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name)
        self._path = path

    def send(self, alert: Mapping[str, Any]) -> None:
        line = json.dumps(alert, ensure_ascii=False).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                file.seek(0)
                written = file.read()
                if line in written:
                    return
                file.write(line if not written or written.endswith(b"\n") else b"\n" + line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SinkFailure(f"{self.name} can't be written: {error.strerror or error}") from error


class WebhookSink(Sink):
    """A POST of the alert as JSON, with its key as `Idempotency-Key`: a receiver that has it already can ignore it."""

    def __init__(self, name: str, url: str) -> None:
        super().__init__(name)
        self._url = url

    def send(self, alert: Mapping[str, Any]) -> None:
        import httpx

        try:
            answer = httpx.post(
                self._url,
                json=alert,
                headers={"Idempotency-Key": alert["key"]},
                timeout=_TIMEOUT_S,
                follow_redirects=False,  # to a host that nobody has configured
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:  # their messages may repeat the address
            raise SinkFailure(f"{self.name} does not answer ({type(error).__name__})") from None
        if not answer.is_success:
            raise SinkFailure(f"{self.name} answers with status {answer.status_code}")


class PrefectSink(Sink):
    """An event of Prefect, `attlas.alert`, to which an automation can react. Its id follows from the alert's key."""

    def send(self, alert: Mapping[str, Any]) -> None:
        from prefect.events import emit_event

        emit_event(
            event="attlas.alert",
            resource={"prefect.resource.id": f"attlas.alert.{alert['key']}", "prefect.resource.name": alert["finding"]},
            payload=dict(alert),
            id=uuid5(NAMESPACE_URL, f"attlas:{alert['key']}"),
        )


def sink_named(name: str, *, folder: Path) -> Sink:
    """The sink of a name: `webhook:VARIABLE`, `prefect`, or a file, relative to a folder. Raises Refusal."""
    if name == "prefect":
        return PrefectSink(name)
    if name.startswith("webhook:"):
        return WebhookSink(name, _webhook_url(name.removeprefix("webhook:")))
    if not name or "://" in name:
        raise Refusal(
            "an alert goes to a file, to prefect, or to webhook:VARIABLE, where that environment variable holds the address; "
            f"got {'an address' if name else 'nothing'}; export it under a name, and give the name"
        )
    path = folder / Path(name).expanduser()
    if path.is_dir():
        raise Refusal(f"alerts are appended to a file; {printable(name)} is a folder; give a file in it")
    return FileSink(name, path)


def _webhook_url(variable: str) -> str:
    url = os.environ.get(variable) if _VARIABLE.fullmatch(variable) else None
    if not url:
        raise Refusal(
            f"webhook:VARIABLE names an environment variable that holds an address; {printable(variable)!r} is none that is set; export it"
        )
    try:
        parts = urlsplit(url)
        is_valid = bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(url)))
    except ValueError:
        is_valid = False
    if not is_valid:
        raise Refusal(
            f"the address of a webhook is https://…, or http:// on this machine; that in {variable} is not; correct it"
        )
    return url
