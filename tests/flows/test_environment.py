"""The environment of a run: proxies, homes that can't be written, invalid settings of Prefect."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from attlas.flows import environment
from tests.flows.conftest import ROOT

LOOPBACK = "127.0.0.1,localhost,::1"
NOWHERE = "/proc/nothing"  # where no folder can be created


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate environment for each test, without proxies and without variables that name folders."""
    variables = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    for name in ("PREFECT_HOME", "HF_HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        variables.pop(name, None)
    monkeypatch.setattr(os, "environ", dict(variables))


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
def test_loopback_is_added_to_the_users_no_proxy(given: Mapping[str, str], wanted: str) -> None:
    os.environ.update(given)
    environment.exempt_loopback_from_proxies()
    assert (os.environ["no_proxy"], os.environ["NO_PROXY"]) == (wanted, wanted)
    environment.exempt_loopback_from_proxies()
    assert os.environ["NO_PROXY"] == wanted


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks4://127.0.0.1:9", "nonsense://127.0.0.1:9"])
def test_an_unsupported_proxy_does_not_affect_clients_that_need_none(proxy: str) -> None:
    os.environ["ALL_PROXY"] = proxy
    environment.exempt_loopback_from_proxies()
    with pytest.raises((ImportError, ValueError)):
        httpx.Client()
    before = dict(os.environ)
    with environment.proxies_disabled():
        httpx.Client().close()
    assert dict(os.environ) == before


def test_an_existing_home_is_used_and_nothing_is_created_in_it(tmp_path: Path) -> None:
    os.environ["HOME"] = str(tmp_path)
    assert environment.replace_missing_homes() is None
    assert os.environ["HOME"] == str(tmp_path) and "PREFECT_HOME" not in os.environ
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("home", [NOWHERE, "/dev/null", ""])
def test_an_unusable_home_is_replaced_by_a_temporary_one(home: str) -> None:
    os.environ["HOME"] = home or NOWHERE
    note = environment.replace_missing_homes()
    assert note is not None
    assert all(name in note for name in ("HOME", "PREFECT_HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "HF_HOME"))
    replacement = Path(os.environ["HOME"])
    assert replacement.is_dir() and replacement.stat().st_mode & 0o077 == 0
    assert environment.replace_missing_homes() is None
    environment.remove_temporary_folder()
    assert not replacement.exists()


@pytest.mark.parametrize(
    ("name", "home"), [("PREFECT_HOME", "PREFECT_HOME"), ("HF_HOME", "HF_HOME"), ("XDG_CACHE_HOME", "HF_HOME")]
)
def test_only_the_folder_that_cannot_be_created_is_replaced(tmp_path: Path, name: str, home: str) -> None:
    os.environ.update({"HOME": str(tmp_path), name: f"{NOWHERE}/inside"})
    note = environment.replace_missing_homes()
    assert note is not None and note.startswith(f"{home} ({NOWHERE}/inside")
    assert os.environ["HOME"] == str(tmp_path)
    assert Path(os.environ[home]).is_relative_to(environment.temporary_folder())
    environment.remove_temporary_folder()


def test_an_existing_folder_is_used_even_if_it_is_read_only(tmp_path: Path) -> None:
    os.environ.update({"HOME": str(tmp_path), "PREFECT_HOME": "/proc/self", "HF_HOME": "/proc/self"})
    assert environment.replace_missing_homes() is None
    assert os.environ["PREFECT_HOME"] == "/proc/self"


def test_there_is_no_cache_if_it_cannot_be_written(tmp_path: Path) -> None:
    os.environ["HOME"] = str(tmp_path)
    assert environment.cache_folder() == tmp_path / ".cache" / "attlas"
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "x")
    assert environment.cache_folder() == tmp_path / "x" / "attlas"
    os.environ["XDG_CACHE_HOME"] = NOWHERE
    assert environment.cache_folder() is None


@pytest.mark.parametrize("command", ["info", "report", "query", "verify", "stats", "run"])
def test_help_needs_no_home(command: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "attlas.flows.cli", command, "--help"],
        cwd=ROOT,
        env={"HOME": NOWHERE},
        capture_output=True,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "value"), [("PREFECT_API_URL", "http://[::1"), ("PREFECT_LOGGING_LEVEL", "loud")])
def test_invalid_settings_of_prefect_are_refused_in_one_line(tmp_path: Path, name: str, value: str) -> None:
    command = ["run", "--model", "demo", "--corpus", "demo", "--out", str(tmp_path / "out")]
    variables = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), name: value}
    ended = subprocess.run(
        [sys.executable, "-m", "attlas.flows.cli", *command], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("attlas: Prefect's settings") and len(ended.stderr.splitlines()) == 1
    assert ("IPv6" if "::1" in value else name) in ended.stderr
    assert not (tmp_path / "out").exists()
