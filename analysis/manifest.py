"""Reading a manifest's facts, some of which may be null or absent: older datasets know fewer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def section(manifest: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The object under these keys, one within the other; empty where there is none."""
    found: Any = manifest
    for key in keys:
        found = found.get(key) or {}
    return found
