"""Display names of the model and the corpus."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from attlas.analysis.manifest import section
from attlas.extract.printable import printable

_MAX_LENGTH = 60
_DIGEST = re.compile(r"[0-9a-f]{16,}")  # the folder of a revision in the hub's cache
_BUILT_IN = re.compile(r"demo \((.+)\)")
_CORPUS_TITLES = {"demo": "demo (Python's reference manual)"}


def model_title(manifest: Mapping[str, Any]) -> str:
    """The model's title, name or architecture, whichever is there first; a name that says nothing is followed by the architecture."""
    model = section(manifest, "model")
    architecture = printable(model.get("architecture") or "", limit=_MAX_LENGTH)
    name = short_name(model.get("title") or model.get("name") or "")
    if name and ((name != "demo" and not _DIGEST.fullmatch(name)) or not architecture):
        return name
    return f"{name} ({architecture})" if name else architecture or "a model"


def heading(title: str) -> str:
    """A title for a heading: of `demo (name)`, which the built-in model and corpus have, the name."""
    found = _BUILT_IN.fullmatch(title)
    return found[1] if found else title


def corpus_title(manifest: Mapping[str, Any]) -> str:
    """The display name of the corpus."""
    name = section(manifest, "corpus").get("name") or "a corpus"
    return _CORPUS_TITLES.get(name, short_name(name))


def short_name(name: str) -> str:
    """A name short enough for a heading: the last part of a local path, and long names shortened in the middle."""
    path = PureWindowsPath(name) if re.match(r"[A-Za-z]:[\\/]|\\\\", name) else PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.parts[:1] == ("~",):
        name = path.name or name
    return printable(name, limit=_MAX_LENGTH)
