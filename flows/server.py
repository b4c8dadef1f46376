"""Prefect's API for a run on this machine: the user's own server where one is set, else a temporary one.

Prefect can start a temporary server by itself, but only when the first flow starts, which waits for it; and that server
outlives a killed run. This one starts while the model loads, and ends when the pipe to the run that started it closes.
"""

import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from http.client import HTTPException
from typing import IO, Any

from flows.api import is_on_this_machine, refuse_silent_api
from flows.environment import without_proxies
from flows.server_process import DATABASE

# Prefect's own 20 s are too few for a first start on a busy machine
_PATIENCE_S = 180.0


class TemporaryServer:
    """A server of this machine only, for the duration of one run, with a database and a password of its own."""

    def __init__(self) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        # made by the process, so that none is left where this one is stopped before it has started that
        self._folder = f"{tempfile.gettempdir()}/attlas-server-{secrets.token_hex(8)}"
        self.password = secrets.token_hex(16)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with listener:
            # bound here and handed over, so that no other process can take the port in between
            listener.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                # -P: packages of the current folder are none of the server's
                [sys.executable, "-P", "-m", "flows.server_process", str(listener.fileno()), self._folder],
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is for the run, which then ends the server
                env=_environment_of_server(self.password),
            )

    def wait(self, *, seconds: float) -> None:
        """Return when the server answers; RuntimeError where it ended or took too long."""
        deadline = time.monotonic() + seconds
        while not self._answers():
            if self._process.poll() is not None:
                raise RuntimeError(f"Prefect's temporary server ended while starting:\n{self._last_words()}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"Prefect's temporary server did not answer within {seconds:.0f} s; "
                    "raise PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS or set PREFECT_API_URL to a running server"
                )
            time.sleep(0.1)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # where the process was killed before it could

    def _answers(self) -> bool:
        directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with directly.open(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException):
            return False

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:].strip()


def _environment_of_server(password: str) -> dict[str, str]:
    """The run's environment, but for what is said of other servers: their database, their password, their proxies."""
    of_databases = ("PREFECT_API_DATABASE_", "PREFECT_SERVER_DATABASE_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(of_databases) and not name.lower().endswith("_proxy")
    }
    return kept | {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{DATABASE}",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{DATABASE}",
        "PREFECT_SERVER_API_AUTH_STRING": f"attlas:{password}",
        # a flow without blocks needs none registered
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
    }


@contextmanager
def starting_server() -> Iterator[TemporaryServer | None]:
    """A temporary server on its way, or None where Prefect already has a server to speak to."""
    from prefect.settings import get_current_settings

    if get_current_settings().api.url:
        with _directly_on_this_machine():
            refuse_silent_api()
        yield None
        return
    server = TemporaryServer()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def prefect_through(server: TemporaryServer | None) -> Iterator[None]:
    """Wait for the server, then let Prefect speak to it."""
    if server is None:
        with _directly_on_this_machine():
            yield
        return
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    server.wait(seconds=_startup_patience())
    spoken_to: dict[Any, str] = {PREFECT_API_URL: server.url, PREFECT_API_AUTH_STRING: f"attlas:{server.password}"}
    with without_proxies(), temporary_settings(spoken_to):
        try:
            yield
        finally:
            _deliver_what_waits()


def _directly_on_this_machine() -> AbstractContextManager[None]:
    """No proxy at all where the user's server is on this machine; theirs where it is elsewhere."""
    from prefect.settings import get_current_settings

    return without_proxies() if is_on_this_machine(get_current_settings().api.url) else nullcontext()


def _deliver_what_waits() -> None:
    """Send the last log lines and events while the server is there; Prefect would try for a minute afterwards."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)


def only_news_of_errors() -> None:
    """Keep Prefect's lines on the terminal to what is news there: failures that are tried again.

    How the run ended is said once, by the command; its option --debug shows tracebacks and everything else.
    """
    repeated = ("Finished in state", "Encountered exception during execution")

    def news(record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = None
        return not record.getMessage().startswith(repeated)

    for handler in logging.getLogger().handlers:
        handler.addFilter(news)


def _startup_patience() -> float:
    from prefect.settings import get_current_settings

    ephemeral = get_current_settings().server.ephemeral
    chosen = "startup_timeout_seconds" in ephemeral.model_fields_set
    return float(ephemeral.startup_timeout_seconds) if chosen else _PATIENCE_S
