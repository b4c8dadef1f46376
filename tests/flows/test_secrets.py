"""What a run reveals: no secret in any file, log or database, and no connection to another machine."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from attlas.flows.config import Run
from attlas.flows.environment import set_quiet_defaults
from attlas.flows.progress import SilentDisplay

pytestmark = pytest.mark.usefixtures("test_server")

KEY, TOKEN, WORD = "digest-key-of-a-test-0123456789", "hf_TokenOfATest0123456789", "xyzzyplugh"


def files_of_prefect() -> Iterator[Path]:
    """The server's database, with its log, and Prefect's home."""
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_HOME

    database = Path(str(PREFECT_API_DATABASE_CONNECTION_URL.value()).partition(":///")[2])
    assert database.is_file()
    yield from database.parent.glob(f"{database.name}*")
    yield from (path for path in Path(PREFECT_HOME.value()).rglob("*") if path.is_file())


def test_secrets_and_text_are_in_no_file_log_or_database(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The key of digests, a token of the hub, and the words of the corpus; and nothing is sent to another machine."""
    from attlas.flows.measure import measure_locally

    connected: list[object] = []
    connect = socket.socket.connect

    def recorded(self: socket.socket, address: object) -> None:
        connected.append(address)
        connect(self, address)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(socket.socket, "connect", recorded)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "key").write_text(KEY)
    (corpus / "secret.txt").write_text(f"The {WORD} sat on the mat.")
    run = Run(model="demo", corpus=str(corpus), out=tmp_path / "out", max_length=16, digest_key=tmp_path / "key")
    page = measure_locally(run, show=SilentDisplay())
    captured = capfd.readouterr()
    places = {"output": captured.out + captured.err}
    for file in [*tmp_path.joinpath("out").rglob("*"), page, *files_of_prefect()]:
        if file.is_file():
            places[str(file)] = file.read_bytes().decode("latin-1")
    assert len(places) > 10
    for secret in (KEY, TOKEN, WORD):
        assert [place for place, content in places.items() if secret in content] == []
    hosts = {address[0] for address in connected if isinstance(address, tuple)}
    assert hosts <= {"127.0.0.1", "::1", "localhost"}


def test_a_failed_run_says_neither_key_nor_token(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from attlas.flows.cli import exit_code

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "key").write_text(KEY[:10])
    options = ["--corpus", str(corpus), "--out", str(tmp_path / "out"), "--digest-key", str(tmp_path / "key")]
    assert exit_code(["run", "--model", "demo", *options]) == 2
    captured = capfd.readouterr()
    assert "a digest key has at least 16 bytes" in captured.err
    assert KEY[:10] not in captured.out + captured.err
    assert TOKEN not in captured.out + captured.err


def test_telemetry_is_off_unless_it_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_SERVER_ANALYTICS_ENABLED", "DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)
    set_quiet_defaults()
    assert (os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"], os.environ["DO_NOT_TRACK"]) == ("false", "1")
