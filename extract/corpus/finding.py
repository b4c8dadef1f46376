"""Find the files in a folder or that match a glob, following links.

Two names of one file are two files. A folder is entered once, and directly rather than through a link if possible, so that
circular links end. Links skipped for that reason are reported, because everything that is not read is counted. Hidden names
match only patterns that begin with a dot, as in a shell.
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

from attlas.extract.corpus.names import readable_name
from attlas.extract.errors import Refusal

EVERYTHING = ("**",)
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass
class FoundFiles:
    """Files with their sizes in bytes, and links to folders that are read through another path; names relative to the base."""

    sizes: dict[str, int] = field(default_factory=dict)
    duplicate_links: list[str] = field(default_factory=list)


def find_files(base: Path, pattern: Sequence[str]) -> FoundFiles:
    """Find the files below `base` whose path matches the pattern; `**` matches any number of folders.

    Raises Refusal for matches that are not readable files, and for folders that can't be listed.
    """
    result = FoundFiles()
    entered: set[tuple[tuple[int, int], tuple[str, ...]]] = set()
    # all folders before any link: a link is followed only if nothing else leads to its target
    queue, behind_links = deque([("", tuple(pattern))]), deque[tuple[str, tuple[str, ...]]]()
    while queue or behind_links:
        is_link = not queue
        place, parts = (behind_links if is_link else queue).popleft()
        folder = _identity(base / place), parts
        if parts[0] == "**" and folder in entered:
            result.duplicate_links.append(place)
            continue
        entered.add(folder)
        for name, rest in _matching(base, place, parts):
            path = f"{place}/{name}" if place else name
            if rest and os.path.isdir(base / path):  # noqa: PTH112 - Path raises without permission
                (behind_links if _is_link(base / path) else queue).append((path, rest))
            elif not rest or rest == EVERYTHING or _may_be_unreachable_folder(base / path):
                _add_file(result, base, path)
    result.duplicate_links = sorted({p for p in result.duplicate_links if p})
    return result


def _matching(base: Path, place: str, parts: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (name, rest of the pattern) for the matches in one folder; for a file the rest is empty or just `**`."""
    first, *rest = parts
    if first == "**":
        for name in _list_folder(base / place):
            if not name.startswith("."):
                yield name, parts
        if rest:
            yield from _matching(base, place, tuple(rest))
    elif glob.has_magic(first):
        for name in _list_folder(base / place):
            if fnmatchcase(name, first) and (first.startswith(".") or not name.startswith(".")):
                yield name, tuple(rest)
    elif _exists(base / place / first):
        yield first, tuple(rest)


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except PermissionError:
        return True  # unknown; reported when it is read
    except (OSError, ValueError):
        return False
    return True


def _list_folder(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names, not paths
    except OSError as error:
        raise Refusal(
            f"every folder of a corpus must be readable; {_display(folder)}: {error.strerror}; change its permissions, "
            "or select files with a glob that leaves it out"
        ) from error


def _may_be_unreachable_folder(path: Path) -> bool:
    """Whether a match can't be accessed and might be a folder, such as a link to a disk that is not mounted."""
    try:
        path.stat()
    except OSError:
        return not (_is_link(path) and path.suffix)
    return False


def _add_file(result: FoundFiles, base: Path, name: str) -> None:
    path = base / name
    try:
        status = path.stat()
    except OSError as error:
        what = _access_problem(path, error)
    else:
        if stat.S_ISREG(status.st_mode):
            result.sizes[name] = status.st_size
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            return
        what = _KINDS.get(stat.S_IFMT(status.st_mode), "not a file")
    raise Refusal(
        f"a corpus consists of files; {readable_name(name)} is {what}; remove it, or select files with a glob such as '**/*.txt'"
    )


def kind_of_special_file(path: Path) -> str | None:
    """What a path is if it exists and is neither file nor folder, such as "a FIFO"; None otherwise."""
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except (OSError, ValueError) as error:  # a name may be too long or contain a NUL
        return _access_problem(path, error) if isinstance(error, OSError) and os.path.lexists(path) else None


def _is_link(path: Path) -> bool:
    return os.path.islink(path)  # noqa: PTH114 - Path raises without permission


def _access_problem(path: Path, error: OSError) -> str:
    return f"{'a broken link' if _is_link(path) else 'inaccessible'} ({error.strerror})"


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except (OSError, ValueError) as error:
        raise Refusal(
            f"the folder of a corpus must exist; {_display(folder)}: {getattr(error, 'strerror', None) or error}; check the name"
        ) from error
    return status.st_dev, status.st_ino


def _display(folder: Path) -> str:
    return readable_name(str(folder))
