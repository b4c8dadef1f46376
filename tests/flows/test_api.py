"""The address of a Prefect server is checked before any work."""

import http.server
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from attlas.extract.errors import Refusal
from tests.waiting import free_port

pytestmark = pytest.mark.usefixtures("prefect_environment")
Answer = tuple[int, str]


@contextmanager
def server_answering(status: int, body: str, *, certificate: Path | None = None) -> Iterator[str]:
    """A server with the same answer to every request; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        scheme = "http" if certificate is None else "https"
        yield f"{scheme}://127.0.0.1:{server.server_address[1]}/api"
        server.shutdown()


@contextmanager
def refusal_of(url: str, **others: str) -> Iterator[pytest.ExceptionInfo[Refusal]]:
    """The refusal of an address, which must name the address."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from attlas.flows.api import refuse_unreachable_server

    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(Refusal) as refused:
        refuse_unreachable_server()
    message = str(refused.value)
    assert url in message
    assert "PREFECT_API_URL" in message and "to use a temporary server" in message
    assert "\n" not in message
    yield refused


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, "<html>It works!</html>"), "does not answer as a Prefect server"),
        ((404, "not found"), r"status 404\); check that the address ends in /api"),
        ((401, json.dumps({"exception_message": "Unauthorized"})), "PREFECT_API_AUTH_STRING or PREFECT_API_KEY"),
        ((403, "{}"), "PREFECT_API_AUTH_STRING or PREFECT_API_KEY"),
        ((500, "{}"), "status 500"),
        ((200, json.dumps("2.20.1")), "same major version as Prefect here"),
    ],
)
def test_a_server_that_is_not_prefect_is_refused(answer: Answer, words: str) -> None:
    with server_answering(*answer) as url, refusal_of(url) as refused:
        refused.match(words)


def test_an_address_without_a_server_is_refused_with_how_to_start_one() -> None:
    with refusal_of(f"http://127.0.0.1:{free_port()}/api") as refused:
        refused.match("prefect server start")


def test_a_server_that_never_answers_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        with refusal_of(url) as refused:
            refused.match("does not answer within 4 s")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:4200/api", "localhost:4200", "ftp://host/api", "http://", "http://host:port/api"]
)
def test_an_invalid_address_is_refused(address: str) -> None:
    with refusal_of(address) as refused:
        refused.match("must be an address such as http://127.0.0.1:4200/api")


def test_an_unknown_host_is_refused() -> None:
    with refusal_of("http://nowhere.invalid:4200/api") as refused:
        refused.match("does not answer")


def test_an_untrusted_certificate_is_refused_with_the_setting(tmp_path: Path) -> None:
    with (
        server_answering(200, json.dumps("3.0.0"), certificate=self_signed(tmp_path)) as url,
        refusal_of(url) as refused,
    ):
        refused.match("PREFECT_API_SSL_CERT_FILE")


def test_an_https_address_of_a_server_without_tls_is_refused() -> None:
    with server_answering(200, json.dumps("3.0.0")) as url, refusal_of(url.replace("http:", "https:")) as refused:
        refused.match("does not use TLS; replace https:// with http://")


def test_a_password_in_the_address_is_not_repeated() -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from attlas.flows.api import refuse_unreachable_server

    with server_answering(404, "") as url:
        with_password = url.replace("//", "//user:secret@")
        with temporary_settings({PREFECT_API_URL: with_password}), pytest.raises(Refusal) as refused:
            refuse_unreachable_server()
    assert "secret" not in str(refused.value)


def test_a_server_of_this_version_or_none_is_accepted() -> None:
    import prefect
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from attlas.flows.api import refuse_unreachable_server

    with server_answering(200, json.dumps(prefect.__version__)) as url, temporary_settings({PREFECT_API_URL: url}):
        refuse_unreachable_server()
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        refuse_unreachable_server()


def test_a_run_and_a_schedule_are_refused_before_any_work(
    attlas: Callable[..., tuple[int, str, str]], corpus: Path, tmp_path: Path
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    file = tmp_path / "nightly.toml"
    file.write_text(f'model = "demo"\ncorpus = "{corpus}"\nout = "data"\n')
    with server_answering(404, "") as url, temporary_settings({PREFECT_API_URL: url}):
        for command in (("run", file), ("serve", file, "--interval", 60)):
            code, _, err = attlas(*command)
            assert code == 2 and url in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "nightly.toml"]


def self_signed(folder: Path) -> Path:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    unencrypted = serialization.NoEncryption()
    file = folder / "certificate.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, unencrypted)
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return file
