"""Run a Python file of the user's, which is named by its path."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def is_python_file(name: str) -> bool:
    """Whether the name of a statistic is the path of a Python file."""
    return name.endswith(".py")


def python_files_in(statistics: str) -> list[Path]:
    """The Python files in a comma-separated list of statistics."""
    return [Path(name).expanduser() for name in map(str.strip, statistics.split(",")) if is_python_file(name)]


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Put the folder first on `sys.path`, as Python does for a script."""
    before, sys.path = sys.path, [str(folder.resolve()), *sys.path]
    try:
        yield
    finally:
        sys.path = before


def import_file(file: Path, *, prefix: str) -> Any:
    """Run the file as a module of its own, `prefix` and the file's name."""
    spec = importlib.util.spec_from_file_location(f"{prefix}_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module


def failing_line(file: Path, error: BaseException) -> str:
    """`, line 12`: where the file failed; empty if the error did not pass through it."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == file.resolve():
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == file.resolve()]
    return f", line {lines[-1]}" if lines else ""
