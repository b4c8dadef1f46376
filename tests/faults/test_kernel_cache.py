"""Damaged files in the kernel cache are compiled again and replaced; foreign code is never loaded."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit, types

from attlas.extract.engines import kernel_cache
from tests.faults.damage import BYTE_DAMAGES

NAME = "test.double"
ROOT = Path(__file__).parents[2]


def double(values: Any) -> None:
    for n in range(len(values)):
        values[n] *= 2


def compile_kernel(name: str = NAME) -> Any:
    """Compile or load the kernel, and check that it works."""
    signature = types.void(types.Array(types.float64, 1, "C"))
    dispatcher = kernel_cache.load_or_compile(name, lambda keeps: njit(signature, cache=keeps)(double))
    values = np.array([1.0, 2.5])
    dispatcher(values)
    assert values.tolist() == [2.0, 5.0]
    return dispatcher


def was_loaded(dispatcher: Any) -> bool:
    return sum(dispatcher.stats.cache_hits.values()) > 0


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def warns_that_it_is_not_kept() -> Any:
    return pytest.warns(UserWarning, match="can't be kept: .*; set NUMBA_CACHE_DIR to a folder that can be written")


def cache_file(name: str = NAME) -> Path:
    folder = kernel_cache.cache_folder()
    assert folder is not None
    return folder / f"{name}.kernel"


def test_what_was_compiled_is_loaded_the_next_time() -> None:
    assert not kernel_cache.is_kept(NAME)
    assert not was_loaded(compile_kernel())
    assert kernel_cache.is_kept(NAME)
    before = cache_file().read_bytes()
    assert was_loaded(compile_kernel())
    assert cache_file().read_bytes() == before
    assert [path.name for path in cache_file().parent.iterdir()] == [cache_file().name]
    assert cache_file().parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("what", list(BYTE_DAMAGES))
def test_a_damaged_file_is_compiled_again_and_replaced(what: str) -> None:
    compile_kernel()
    BYTE_DAMAGES[what](cache_file())
    assert not kernel_cache.is_kept(NAME)
    assert not was_loaded(compile_kernel())
    assert was_loaded(compile_kernel())


def test_a_file_of_another_kernel_is_not_loaded() -> None:
    compile_kernel("test.other")
    cache_file().write_bytes(cache_file("test.other").read_bytes())
    assert not was_loaded(compile_kernel())


def test_a_file_of_another_version_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel()
    ours, content = cache_file(), cache_file().read_bytes()
    ours.parent.rename(ours.parent.with_name("0" * 16))
    assert not was_loaded(compile_kernel())
    changed = bytearray(content)
    changed[:32] = bytes(32)
    ours.write_bytes(changed)
    assert not was_loaded(compile_kernel())


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_is_not_used(mode: int) -> None:
    compile_kernel()
    before = cache_file().read_bytes()
    cache_file().parent.chmod(mode)
    assert not kernel_cache.is_kept(NAME)
    with warns_that_it_is_not_kept():
        assert not was_loaded(compile_kernel())
    assert cache_file().read_bytes() == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("which", ["the folder", "the file"])
def test_what_belongs_to_another_user_is_not_loaded(which: str) -> None:
    compile_kernel()
    os.chown(cache_file().parent if which == "the folder" else cache_file(), 12345, 12345)
    with warns_that_it_is_not_kept() if which == "the folder" else nullcontext():
        assert not was_loaded(compile_kernel())


def test_a_folder_that_is_a_link_is_not_used(tmp_path: Path) -> None:
    compile_kernel()
    folder = cache_file().parent
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with warns_that_it_is_not_kept():
        assert not was_loaded(compile_kernel())


def test_without_a_folder_to_write_into_it_is_compiled_each_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file" / "cache"))
    for _ in range(2):
        with warns_that_it_is_not_kept():
            assert not was_loaded(compile_kernel())
    assert not kernel_cache.is_kept(NAME)


def test_processes_that_compile_at_once_leave_one_good_file(home: Path) -> None:
    code = "from tests.faults.test_kernel_cache import compile_kernel; compile_kernel()"
    command = [sys.executable, "-c", code]
    runs = [subprocess.Popen(command, cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(home)}) for _ in range(3)]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    assert was_loaded(compile_kernel())
    assert [path.name for path in cache_file().parent.iterdir()] == [cache_file().name]
