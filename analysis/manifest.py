"""Access to the entries of a manifest, which may be null or, in older datasets, absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def section(manifest: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The object under nested keys; empty if there is none."""
    entry: Any = manifest
    for key in keys:
        entry = entry.get(key) or {}
    return entry
