"""What a run finds around it: proxies, homes that can't be written, settings that Prefect does not take."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from flows import environment
from tests.flows.conftest import ROOT

LOOPBACK = "127.0.0.1,localhost,::1"
NOWHERE = "/proc/nothing"  # where nobody can make a folder


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment of the test's own, without proxies and without folders that are named."""
    ours = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    for name in ("PREFECT_HOME", "HF_HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        ours.pop(name, None)
    monkeypatch.setattr(os, "environ", dict(ours))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, LOOPBACK),
        ({"NO_PROXY": "example.org"}, f"example.org,{LOOPBACK}"),
        ({"no_proxy": " a , b ,"}, f"a,b,{LOOPBACK}"),
        ({"no_proxy": "a", "NO_PROXY": "b"}, f"a,{LOOPBACK}"),
        ({"NO_PROXY": "localhost,127.0.0.1"}, "localhost,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*"),
        ({"no_proxy": "a,*"}, "*"),
        ({"no_proxy": ""}, LOOPBACK),
    ],
)
def test_loopback_goes_through_no_proxy_and_what_the_user_named_stays(given: Mapping[str, str], wanted: str) -> None:
    os.environ.update(given)
    environment.exempt_loopback()
    assert (os.environ["no_proxy"], os.environ["NO_PROXY"]) == (wanted, wanted)
    environment.exempt_loopback()
    assert os.environ["NO_PROXY"] == wanted


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks4://127.0.0.1:9", "nonsense://127.0.0.1:9"])
def test_a_proxy_that_no_client_can_use_does_not_stop_one_that_needs_none(proxy: str) -> None:
    os.environ["ALL_PROXY"] = proxy
    environment.exempt_loopback()
    with pytest.raises((ImportError, ValueError)):
        httpx.Client()
    before = dict(os.environ)
    with environment.without_proxies():
        httpx.Client().close()
    assert dict(os.environ) == before


def test_a_home_that_is_there_stays_and_nothing_is_made_in_it(tmp_path: Path) -> None:
    os.environ["HOME"] = str(tmp_path)
    assert environment.provide_homes() is None
    assert os.environ["HOME"] == str(tmp_path) and "PREFECT_HOME" not in os.environ
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("home", [NOWHERE, "/dev/null", ""])
def test_a_home_that_is_none_has_a_temporary_one_in_its_place(home: str) -> None:
    os.environ["HOME"] = home or NOWHERE
    note = environment.provide_homes()
    assert note is not None
    assert all(name in note for name in ("HOME", "PREFECT_HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "HF_HOME"))
    made = Path(os.environ["HOME"])
    assert made.is_dir() and made.stat().st_mode & 0o077 == 0
    assert environment.provide_homes() is None
    environment.remove_temporary_folder()
    assert not made.exists()


@pytest.mark.parametrize(
    ("name", "of"), [("PREFECT_HOME", "PREFECT_HOME"), ("HF_HOME", "HF_HOME"), ("XDG_CACHE_HOME", "HF_HOME")]
)
def test_one_folder_that_cannot_be_made_is_named_and_alone_replaced(tmp_path: Path, name: str, of: str) -> None:
    os.environ.update({"HOME": str(tmp_path), name: f"{NOWHERE}/inside"})
    note = environment.provide_homes()
    assert note is not None and note.startswith(f"{of} ({NOWHERE}/inside")
    assert os.environ["HOME"] == str(tmp_path)
    assert Path(os.environ[of]).is_relative_to(environment.temporary_folder())
    environment.remove_temporary_folder()


def test_a_folder_that_is_there_is_read_even_where_it_cannot_be_written(tmp_path: Path) -> None:
    os.environ.update({"HOME": str(tmp_path), "PREFECT_HOME": "/proc/self", "HF_HOME": "/proc/self"})
    assert environment.provide_homes() is None
    assert os.environ["PREFECT_HOME"] == "/proc/self"


def test_the_cache_is_where_it_can_be_written_or_nowhere(tmp_path: Path) -> None:
    os.environ["HOME"] = str(tmp_path)
    assert environment.cache_folder() == tmp_path / ".cache" / "attlas"
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "x")
    assert environment.cache_folder() == tmp_path / "x" / "attlas"
    os.environ["XDG_CACHE_HOME"] = NOWHERE
    assert environment.cache_folder() is None


@pytest.mark.parametrize("command", ["info", "report", "query", "verify", "stats", "run"])
def test_help_needs_no_home(command: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "flows.cli", command, "--help"], cwd=ROOT, env={"HOME": NOWHERE}, capture_output=True
    )
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "value"), [("PREFECT_API_URL", "http://[::1"), ("PREFECT_LOGGING_LEVEL", "loud")])
def test_settings_that_prefect_does_not_take_are_refused_in_words(tmp_path: Path, name: str, value: str) -> None:
    command = ["run", "--model", "demo", "--corpus", "demo", "--out", str(tmp_path / "out")]
    ours = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), name: value}
    ended = subprocess.run(
        [sys.executable, "-m", "flows.cli", *command], cwd=ROOT, env=ours, capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("attlas: Prefect's settings") and len(ended.stderr.splitlines()) == 1
    assert ("IPv6" if "::1" in value else name) in ended.stderr
    assert not (tmp_path / "out").exists()
