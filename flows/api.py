"""The Prefect server that the user names: whether it is there and is one, asked before any work."""

import ipaddress
import os
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from extract.errors import Refusal, first_line

if TYPE_CHECKING:
    import httpx

_ANSWERS_WITHIN_S = 4.0
_STARTS_WITHIN_S = 2.0  # a server that is started beside the run may need a moment


def refuse_silent_api() -> None:
    """Raise Refusal, with the address, where Prefect's API_URL is set and no Prefect server answers there."""
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        return
    refuse_wrong_address(url)
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while (error := _ask(url)) is not None:
        if not _may_pass(error) or time.monotonic() > deadline:
            raise _refusal(url, error)
        time.sleep(0.5)


def is_on_this_machine(url: str | None) -> bool:
    """Whether the address is a loopback one."""
    try:
        host = urlsplit(url or "").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_wrong_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half of an IPv6 address
        is_address = False
    if not is_address:
        raise Refusal(
            f"PREFECT_API_URL is an address such as http://127.0.0.1:4200/api; got {url!r}; correct it, or {_way_out()}"
        )


def _ask(url: str) -> Exception | None:
    """What goes wrong when the server is asked for its version, as Prefect itself would ask it; None if nothing does."""
    from prefect.client.base import ServerType
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            client = get_client(sync_client=True, httpx_settings={"timeout": _ANSWERS_WITHIN_S, "base_url": url})
            with client:
                if client.server_type == ServerType.CLOUD:
                    return client.api_healthcheck()
                _refuse_other_major(url, str(client.api_version()), client.client_version())
    except Refusal:
        raise
    except Exception as error:  # of the network, of TLS, of a proxy, or of an answer that is not Prefect's
        return error
    return None


def _refuse_other_major(url: str, server: str, client: str) -> None:
    if server.partition(".")[0] != client.partition(".")[0] and server[:1].isdigit():
        raise Refusal(
            f"Prefect's server must be of the major version of Prefect here, {client}; {_shown(url)} is {server}; "
            f"start one of this version, or {_way_out()}"
        )


def _may_pass(error: Exception) -> bool:
    """Whether a server that is just starting gives such an error."""
    status = _status(error)
    return "refused" in str(error) if status is None else status in (502, 503)


def _refusal(url: str, error: Exception) -> Refusal:
    return Refusal(
        f"PREFECT_API_URL names a running Prefect server; {_shown(url)} {_complaint(error)}, or {_way_out()}"
    )


def _complaint(error: Exception) -> str:
    """What is wrong with the address, and what to do."""
    import httpx

    status = _status(error)
    said = first_line(error)
    if status in (401, 403):
        return f"wants other credentials (status {status}); set PREFECT_API_AUTH_STRING or PREFECT_API_KEY to them"
    if status is not None and status >= 500:
        return f"answers with status {status}; look at the server's log"
    if "WRONG_VERSION_NUMBER" in said:
        return "does not speak TLS; write http:// for https://"
    if "CERTIFICATE" in said.upper():
        return f"can't be trusted ({said}); set PREFECT_API_SSL_CERT_FILE to its certificate"
    if isinstance(error, httpx.TimeoutException):
        return f"does not answer within {_ANSWERS_WITHIN_S:.0f} s; see that it runs (prefect server start)"
    if isinstance(error, httpx.ProxyError):
        return f"can't be reached through the proxy that the environment sets ({said}); correct it or add the host to NO_PROXY"
    if isinstance(error, httpx.TransportError):
        return f"does not answer ({said}); start it (prefect server start)"
    if status is None and not isinstance(error, ValueError):
        return f"can't be asked ({said}); see that it runs (prefect server start)"
    answer = f"status {status}" if status is not None else "something else"
    return f"answers as no Prefect server does ({answer}); its address ends in /api"


def _status(error: Exception) -> int | None:
    response: httpx.Response | None = getattr(error, "response", None)
    return None if response is None else response.status_code


def _shown(url: str) -> str:
    """The address without a password that it may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _way_out() -> str:
    remove = "unset it" if "PREFECT_API_URL" in os.environ else "`prefect config unset PREFECT_API_URL`"
    return f"{remove} for a temporary server"
