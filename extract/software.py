"""Versions of the software that a run depends on."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def software_version(package: str) -> str:
    """The version of an installed package; of attlas also if it runs from a source tree that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"  # through the link in attlas/
        if package != "attlas" or not project.is_file():
            raise
        return tomllib.loads(project.read_text("utf-8"))["project"]["version"]
