"""Check the Prefect server that the user configured, before any work."""

import ipaddress
import os
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from attlas.extract.errors import Refusal, first_line

if TYPE_CHECKING:
    import httpx

_ANSWER_TIMEOUT_S = 4.0
_START_TIMEOUT_S = 2.0  # for a server that is started at the same time as the run


def refuse_unreachable_server() -> None:
    """Raise Refusal if PREFECT_API_URL is set and no Prefect server answers at that address."""
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        return
    refuse_invalid_address(url)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while (error := _connection_error(url)) is not None:
        if not _is_temporary(error) or time.monotonic() > deadline:
            raise _refusal(url, error)
        time.sleep(0.5)


def is_loopback(url: str | None) -> bool:
    """Whether an address is on this machine."""
    try:
        host = urlsplit(url or "").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_invalid_address(url: str) -> None:
    """Raise Refusal if PREFECT_API_URL is not an HTTP address."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port or IPv6 address
        is_valid = False
    if not is_valid:
        raise Refusal(
            f"PREFECT_API_URL must be an address such as http://127.0.0.1:4200/api; got {url!r}; correct it, or {_alternative()}"
        )


def _connection_error(url: str) -> Exception | None:
    """Ask the server for its version with Prefect's own client; returns the error, or None if it answers."""
    from prefect.client.base import ServerType
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            client = get_client(sync_client=True, httpx_settings={"timeout": _ANSWER_TIMEOUT_S, "base_url": url})
            with client:
                if client.server_type == ServerType.CLOUD:
                    return client.api_healthcheck()
                _refuse_other_major(url, str(client.api_version()), client.client_version())
    except Refusal:
        raise
    except Exception as error:  # from the network, TLS, a proxy, or an answer that is not Prefect's
        return error
    return None


def _refuse_other_major(url: str, server: str, client: str) -> None:
    if server.partition(".")[0] != client.partition(".")[0] and server[:1].isdigit():
        raise Refusal(
            f"the Prefect server must have the same major version as Prefect here, {client}; {_without_password(url)} has {server}; "
            f"start a server of this version, or {_alternative()}"
        )


def _is_temporary(error: Exception) -> bool:
    """Whether a server that is still starting may give this error."""
    status = _status(error)
    return "refused" in str(error) if status is None else status in (502, 503)


def _refusal(url: str, error: Exception) -> Refusal:
    return Refusal(
        f"PREFECT_API_URL must be the address of a running Prefect server; {_without_password(url)} {_problem(error)}, or {_alternative()}"
    )


def _problem(error: Exception) -> str:
    """What is wrong with the server, and what to do."""
    import httpx

    status = _status(error)
    message = first_line(error)
    if status in (401, 403):
        return f"rejects the credentials (status {status}); set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
    if status is not None and status >= 500:
        return f"answers with status {status}; check the server's log"
    if "WRONG_VERSION_NUMBER" in message:
        return "does not use TLS; replace https:// with http://"
    if "CERTIFICATE" in message.upper():
        return f"can't be trusted ({message}); set PREFECT_API_SSL_CERT_FILE to its certificate"
    if isinstance(error, httpx.TimeoutException):
        return f"does not answer within {_ANSWER_TIMEOUT_S:.0f} s; check that it runs (prefect server start)"
    if isinstance(error, httpx.ProxyError):
        return f"can't be reached through the configured proxy ({message}); correct it or add the host to NO_PROXY"
    if isinstance(error, httpx.TransportError):
        return f"does not answer ({message}); start it (prefect server start)"
    if status is None and not isinstance(error, ValueError):
        return f"can't be queried ({message}); check that it runs (prefect server start)"
    answer = f"status {status}" if status is not None else "something else"
    return f"does not answer as a Prefect server ({answer}); check that the address ends in /api"


def _status(error: Exception) -> int | None:
    response: httpx.Response | None = getattr(error, "response", None)
    return None if response is None else response.status_code


def _without_password(url: str) -> str:
    """The address without user name and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _alternative() -> str:
    remove = "unset it" if "PREFECT_API_URL" in os.environ else "`prefect config unset PREFECT_API_URL`"
    return f"{remove} to use a temporary server"
