"""The files that a folder or a glob holds, links followed.

A name is a file: two names of one file are two. A folder is entered once, by itself before any link to it, so that
links in a circle end; a link that is not followed for that reason is told, since what is not read is counted.
Hidden names match only a pattern that begins with a dot, as in a shell.
"""

from __future__ import annotations

import glob
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from extract.corpus.names import readable_name
from extract.errors import Refusal

EVERYTHING = ("**",)
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass
class Found:
    """Names relative to where the search began: files with their sizes in bytes, and links to folders read already."""

    sizes: dict[str, int] = field(default_factory=dict)
    links_to_read_folders: list[str] = field(default_factory=list)


def find_files(base: Path, pattern: Sequence[str]) -> Found:
    """Files below `base` whose path matches the pattern, part by part; `**` stands for any folders.

    Raises Refusal for what matches and can't be read as a file, and for a folder that can't be listed.
    """
    found = Found()
    entered: set[tuple[tuple[int, int], tuple[str, ...]]] = set()
    # folders by themselves first: a link is only followed to what is not read otherwise
    waiting, behind_links = deque([("", tuple(pattern))]), deque[tuple[str, tuple[str, ...]]]()
    while waiting or behind_links:
        is_link = not waiting
        place, parts = (behind_links if is_link else waiting).popleft()
        folder = _identity(base / place), parts
        if parts[0] == "**" and folder in entered:
            found.links_to_read_folders.append(place)
            continue
        entered.add(folder)
        for name, rest in _matching(base, place, parts):
            path = f"{place}/{name}" if place else name
            if rest and os.path.isdir(base / path):  # noqa: PTH112 - a Path raises where the right to look is missing
                (behind_links if _is_link(base / path) else waiting).append((path, rest))
            elif not rest or rest == EVERYTHING or _may_be_lost_folder(base / path):
                _add_file(found, base, path)
    found.links_to_read_folders = sorted({p for p in found.links_to_read_folders if p})
    return found


def _matching(base: Path, place: str, parts: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, rest of the pattern) of what matches in one folder; files have no rest, or one of `**` alone."""
    first, *rest = parts
    if first == "**":
        for name in _listed(base / place):
            if not name.startswith("."):
                yield name, parts
        if rest:
            yield from _matching(base, place, tuple(rest))
    elif glob.has_magic(first):
        for name in _listed(base / place):
            if fnmatchcase(name, first) and (first.startswith(".") or not name.startswith(".")):
                yield name, tuple(rest)
    elif _is_there(base / place / first):
        yield first, tuple(rest)


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except PermissionError:
        return True  # as far as can be known; said when it is to be read
    except (OSError, ValueError):
        return False
    return True


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names, not paths
    except OSError as error:
        raise Refusal(
            f"every folder of a corpus must be readable; {_shown(folder)}: {error.strerror}; give yourself the right "
            "to list it, or choose files with a glob that leaves it out"
        ) from error


def _may_be_lost_folder(path: Path) -> bool:
    """Whether what a pattern would have entered can't be looked at: a link to a disk that is not there, say."""
    try:
        path.stat()
    except OSError:
        return not (_is_link(path) and path.suffix)
    return False


def _add_file(found: Found, base: Path, name: str) -> None:
    path = base / name
    try:
        status = path.stat()
    except OSError as error:
        what = _lost(path, error)
    else:
        if stat.S_ISREG(status.st_mode):
            found.sizes[name] = status.st_size
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            return
        what = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
    raise Refusal(
        f"a corpus is made of files; {readable_name(name)} is {what}; remove it, or choose files with a glob such as '**/*.txt'"
    )


def kind_of_special_file(path: Path) -> str | None:
    """What a path is that is there and is neither file nor folder, such as "a FIFO"; None where nothing is there."""
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except (OSError, ValueError) as error:  # a name can be too long, or hold a NUL
        return _lost(path, error) if isinstance(error, OSError) and os.path.lexists(path) else None


def _is_link(path: Path) -> bool:
    return os.path.islink(path)  # noqa: PTH114 - a Path raises where the right to look is missing


def _lost(path: Path, error: OSError) -> str:
    return f"{'a link that leads nowhere' if _is_link(path) else 'out of reach'} ({error.strerror})"


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except (OSError, ValueError) as error:
        raise Refusal(
            f"a corpus is in a folder that is there; {_shown(folder)}: {getattr(error, 'strerror', None) or error}; check the name"
        ) from error
    return status.st_dev, status.st_ino


def _shown(folder: Path) -> str:
    return readable_name(str(folder))
