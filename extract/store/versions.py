"""Schema versions: which ones this attlas reads, and how to read the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attlas.extract.errors import Refusal
from attlas.extract.shapes import Malformed
from attlas.extract.tables import SCHEMA_VERSION

# datasets of these versions are read by what their manifests and parts say; columns added since are null
READABLE = (SCHEMA_VERSION,)
_RELEASE = re.compile(r"\d[\w.+-]{0,30}", re.ASCII)


def check_version(manifest: Mapping[str, Any], place: str) -> None:
    """Refuse a manifest of a version that this attlas does not read, saying how to read it. Malformed for a non-version."""
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
    """The release of attlas that wrote a manifest, if stated and plausible."""
    software = manifest.get("software")
    release = software.get("attlas") if isinstance(software, dict) else None
    return release if isinstance(release, str) and _RELEASE.fullmatch(release) else None
