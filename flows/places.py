"""Where a dataset is: a local folder, or an object store by its URL."""

import os
import re
from pathlib import Path
from typing import Any

from attlas.extract.errors import Refusal
from attlas.extract.urls import is_url, refuse_unsafe_url, url_name

Place = Path | str  # the path of a folder, or a URL

_BROKEN_URL = re.compile(r"\w{2,}:/(?!/)", re.ASCII)


def place_named(name: Any) -> Place:
    """The place of this name: a URL as text without a slash at its end, anything else as a path. Raises Refusal."""
    if isinstance(name, str) and is_url(name):
        refuse_unsafe_url(name)
        return name.rstrip("/") if url_name(name) else name
    if not isinstance(name, str | Path) or _BROKEN_URL.match(str(name)):
        raise Refusal(
            f"the output is a folder or a URL such as s3://bucket/folder; got {str(name)!r}; write a URL as text, with two slashes"
        )
    return normalized_path(Path(name))


def name_of_place(place: Place) -> str:
    """The last part of a place, for names of runs."""
    return place.name if isinstance(place, Path) else url_name(place) or place


def inside(place: Place, name: str) -> Place:
    """The place of this name in another one."""
    return place / name if isinstance(place, Path) else f"{place.rstrip('/')}/{name}"


def place_around(place: Place) -> Place:
    """The place that another one is in."""
    return place.parent if isinstance(place, Path) else place.rpartition("/")[0]


def absolute(place: Place) -> Place:
    """A path that means the same in any working directory; a URL as it is."""
    return place.absolute() if isinstance(place, Path) else place


def normalized_path(path: Path) -> Path:
    """The path without `..`, unless that changes its meaning because of a symbolic link."""
    normalized = Path(os.path.normpath(path))
    try:
        return normalized if normalized.resolve() == path.resolve() else path
    except (OSError, RuntimeError):  # such as circular links; reported on opening the path
        return path
