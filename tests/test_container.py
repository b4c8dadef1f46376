"""The Containerfile: its pins, and that its commands make an installation that measures."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.container import SOURCE, instructions

FOUND = list(instructions((SOURCE / "Containerfile").read_text()))


def test_torch_is_that_of_the_constraints() -> None:
    pinned = re.findall(r"^torch==.*$", (SOURCE / "constraints.txt").read_text(), re.MULTILINE)
    assert [arguments.removeprefix("TORCH=") for name, arguments in FOUND if name == "ARG"] == pinned


def test_it_installs_every_extra_of_users() -> None:
    extras = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = [match[1] for name, line in FOUND if name == "RUN" and (match := re.search(r"/src\[(.*?)\]", line))]
    assert [name.split(",") for name in installed] == [[name for name in extras if name not in ("test", "dev")]]


@pytest.fixture
def new_root(tmp_path: Path) -> Path:
    """Where a root can be made; skips a test on a machine that forbids it."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs root and debootstrap")
    probe = tmp_path / "probe"
    probe.mkdir()
    if subprocess.run(["mount", "--rbind", "/dev", str(probe)], capture_output=True).returncode:
        pytest.skip("needs to mount")
    subprocess.run(["umount", "-l", str(probe)], check=True)
    return tmp_path / "root"


@pytest.mark.slow
def test_its_commands_in_a_new_root_make_an_installation_that_measures_and_verifies(new_root: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.container", str(new_root)], cwd=SOURCE, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (new_root / "data" / "demo" / "manifest.json").is_file()
