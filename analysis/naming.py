"""What a page or a table calls the model and the corpus."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from attlas.analysis.manifest import section
from attlas.extract.printable import printable

_LONGEST = 60
_DIGEST = re.compile(r"[0-9a-f]{16,}")  # the folder of a revision in the hub's cache
_CORPORA = {"demo": "demo (Python's reference manual)"}


def model_title(manifest: Mapping[str, Any]) -> str:
    """The model's title, else its name, else its architecture; the architecture beside a name that tells nothing."""
    model = section(manifest, "model")
    architecture = printable(model.get("architecture") or "", limit=_LONGEST)
    name = short_name(model.get("title") or model.get("name") or "")
    if name and ((name != "demo" and not _DIGEST.fullmatch(name)) or not architecture):
        return name
    return f"{name} ({architecture})" if name else architecture or "a model"


def corpus_title(manifest: Mapping[str, Any]) -> str:
    """The corpus by its name."""
    name = section(manifest, "corpus").get("name") or "a corpus"
    return _CORPORA.get(name, short_name(name))


def short_name(name: str) -> str:
    """A name that fits a heading: of a path of some machine the last part, the middle of a long name left out."""
    path = PureWindowsPath(name) if re.match(r"[A-Za-z]:[\\/]|\\\\", name) else PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.parts[:1] == ("~",):
        name = path.name or name
    return printable(name, limit=_LONGEST)
