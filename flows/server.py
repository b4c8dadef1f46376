"""Connect Prefect to the user's own server, or to a temporary one for the run.

Prefect can start a temporary server itself, but only when the first flow starts, which then waits for it, and that server
outlives a killed run. This one starts while the model loads, and exits when the pipe from its run is closed.
"""

import logging
import os
import queue
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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from http.client import HTTPException
from typing import IO, Any

from attlas.extract.errors import causes
from attlas.flows.api import is_loopback, refuse_unreachable_server
from attlas.flows.environment import environment_with, proxies_disabled
from attlas.flows.server_process import DATABASE

# Prefect's default of 20 s is too short for a first start on a busy machine
_STARTUP_TIMEOUT_S = 180.0


class TemporaryServer:
    """A local server for the duration of one run, with its own database and password."""

    def __init__(self) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        # created by the server process, so that none is left behind if this process is stopped before it starts that
        self._folder = f"{tempfile.gettempdir()}/attlas-server-{secrets.token_hex(8)}"
        self.password = secrets.token_hex(16)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with listener:
            # bound here and passed on, so that no other process can take the port
            listener.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                # -P: don't import packages from the current folder
                [sys.executable, "-P", "-m", "attlas.flows.server_process", str(listener.fileno()), self._folder],
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C goes to the run only, which stops the server
                env=_server_environment(self.password),
            )

    def wait(self, *, seconds: float) -> None:
        """Wait until the server answers. Raises RuntimeError if it exits or takes too long."""
        deadline = time.monotonic() + seconds
        while not self._answers():
            if self._process.poll() is not None:
                raise RuntimeError(f"Prefect's temporary server exited while starting:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"Prefect's temporary server did not answer within {seconds:.0f} s; "
                    "raise PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS or set PREFECT_API_URL to a running server"
                )
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop the server and remove its folder."""
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # in case the process was killed before it could

    def _answers(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException):
            return False

    def _log_tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:].strip()


def _server_environment(password: str) -> dict[str, str]:
    """The environment of the run, without settings for other servers: database, password, proxies."""
    database_settings = ("PREFECT_API_DATABASE_", "PREFECT_SERVER_DATABASE_")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(database_settings) and not name.lower().endswith("_proxy")
    }
    return inherited | {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{DATABASE}",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{DATABASE}",
        "PREFECT_SERVER_API_AUTH_STRING": f"attlas:{password}",
        # the flow uses no blocks
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
    }


@contextmanager
def temporary_server() -> Iterator[TemporaryServer | None]:
    """Start a temporary server and stop it afterwards; None if the user has configured a server."""
    from prefect.settings import get_current_settings

    if get_current_settings().api.url:
        with _loopback_without_proxies():
            refuse_unreachable_server()
        yield None
        return
    server = TemporaryServer()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def prefect_connected(server: TemporaryServer | None) -> Iterator[None]:
    """Wait for the temporary server, if any, and connect Prefect to it."""
    if server is None:
        with _loopback_without_proxies():
            yield
        return
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    server.wait(seconds=_startup_timeout())
    connection: dict[Any, str] = {PREFECT_API_URL: server.url, PREFECT_API_AUTH_STRING: f"attlas:{server.password}"}
    # processes that measure shards report to the same server from their first moment on
    inherited = environment_with({setting.name: value for setting, value in connection.items()})
    with proxies_disabled(), inherited, temporary_settings(connection):
        try:
            yield
        finally:
            _deliver_logs_and_events()


def _loopback_without_proxies() -> AbstractContextManager[None]:
    """Disable proxies if the user's server is on this machine."""
    from prefect.settings import get_current_settings

    return proxies_disabled() if is_loopback(get_current_settings().api.url) else nullcontext()


def _deliver_logs_and_events() -> None:
    """Deliver the last log messages and events while the server runs; Prefect would keep trying for a minute."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error comes from a server that can't be reached."""
    import httpx

    return any(isinstance(cause, httpx.TransportError) for cause in causes(error))


def forget_logs_and_events() -> None:
    """Drop what waits for a server that is gone; Prefect would try each event for 7 s before the process ends."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        for service in tuple(worker._instances.values()):  # pyright: ignore[reportPrivateUsage]
            with suppress(queue.Empty):
                while True:
                    service._queue.get_nowait()  # pyright: ignore[reportPrivateUsage]


def show_only_errors() -> None:
    """Reduce Prefect's messages on the terminal to failures that are retried, without tracebacks.

    The command itself reports the result of the run; --debug shows everything.
    """
    redundant = ("Finished in state", "Encountered exception during execution", "Crash detected! Execution was aborted")
    undelivered = "Service 'EventsWorker' failed to process item"
    is_told = False

    def is_relevant(record: logging.LogRecord) -> bool:
        nonlocal is_told
        record.exc_info = record.exc_text = None
        message = record.getMessage()
        if not message.startswith(undelivered):
            return not message.startswith(redundant)
        is_new, is_told = not is_told, True
        record.msg, record.args = "the Prefect server does not answer; what happens meanwhile may be missing there", ()
        return is_new

    # this logger does not pass on what it is told
    for handler in (*logging.getLogger().handlers, *logging.getLogger("prefect._internal").handlers):
        handler.addFilter(is_relevant)


def _startup_timeout() -> float:
    from prefect.settings import get_current_settings

    ephemeral = get_current_settings().server.ephemeral
    is_configured = "startup_timeout_seconds" in ephemeral.model_fields_set
    return float(ephemeral.startup_timeout_seconds) if is_configured else _STARTUP_TIMEOUT_S
