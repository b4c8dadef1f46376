"""Which versions of the schema this attlas reads. The version is the manifest's; its other keys depend on it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from extract.errors import Refusal
from extract.schema import SCHEMA_VERSION
from extract.shapes import Malformed

# a dataset of one of these is read by what its manifest and its parts say, whatever columns have been added since
READABLE = (SCHEMA_VERSION,)
_RELEASE = re.compile(r"\d[\w.+-]{0,30}", re.ASCII)


def check_version(manifest: Mapping[str, Any], place: str) -> None:
    """Refuse a manifest of a version that this attlas does not read, with the way to read it; Malformed if it has none."""
    version = manifest["schema_version"]
    wanted = f"{' or '.join(map(str, READABLE))}, which this attlas reads"
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version < 1 << 63:
        raise Malformed("schema_version", wanted, "another; use the attlas that wrote it")
    if version in READABLE:
        return
    wrote = _written_by(manifest)
    if version > max(READABLE):
        came = f"that of a newer attlas{f', {wrote}' if wrote else ''}; read it with that version"
    else:
        came = f"that of an older attlas{f', {wrote}' if wrote else ''}; read it with that version, or measure again into another folder"
    raise Refusal(f"{place}: schema_version must be {wanted}; got {version}, {came}")


def _written_by(manifest: Mapping[str, Any]) -> str | None:
    """The attlas that wrote a dataset, where the manifest says so and it reads like a release."""
    software = manifest.get("software")
    release = software.get("attlas") if isinstance(software, dict) else None
    return release if isinstance(release, str) and _RELEASE.fullmatch(release) else None
