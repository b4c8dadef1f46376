"""The local files of a corpus: their names, sizes and kind."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from extract.corpus.finding import EVERYTHING, Found, find_files, kind_of_special_file
from extract.corpus.names import readable_name
from extract.errors import Refusal

IMAGES = "images"
_KIND_OF_EXTENSION = {
    **dict.fromkeys(("", ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".log"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "JSON lines"),
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"), IMAGES),
}
_COMPRESSIONS = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd", ".lz4")
_UNCOMPRESSED = ("Parquet", IMAGES)  # read as they are, being compressed inside
_UNKNOWN = "of no known kind"
_KNOWN = f"{', '.join(e for e in _KIND_OF_EXTENSION if e)}; those of text, .parquet aside, also as {', '.join(_COMPRESSIONS)}"


@dataclass(frozen=True)
class CorpusFile:
    """A file to read; `name` is relative to what the user named, never a path of this machine, and valid text."""

    path: Path
    name: str
    kind: str
    size: int


@dataclass(frozen=True)
class LocalFiles:
    """A corpus's name, its folder, its files, sorted by name and of one kind, and links that led to folders read already."""

    name: str
    folder: Path
    files: tuple[CorpusFile, ...]
    links_to_read_folders: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.files[0].kind


def local_files(corpus: str) -> LocalFiles:
    """The files that a file, a folder or a glob names. Raises Refusal."""
    path = Path(os.path.expanduser(corpus))  # noqa: PTH111 - a Path raises where there is no such user
    shown = readable_name(corpus)
    name = _public_name(corpus, path)
    # os.path: a Path raises where a name is too long
    if os.path.isfile(path):  # noqa: PTH113
        base, found = path.parent, Found({path.name: path.stat().st_size})
    elif os.path.isdir(path):  # noqa: PTH112
        base, found = path, find_files(path, EVERYTHING)
    elif what := kind_of_special_file(path):
        raise Refusal(f"a corpus is read from files; {shown} is {what}; write its content to a file")
    elif glob.has_magic(corpus):
        base = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        pattern = path.relative_to(base)
        found = find_files(base, pattern.parts) if os.path.isdir(base) else Found()  # noqa: PTH112
        name = readable_name(pattern.as_posix()) if name == readable_name(path.name) else name
    else:
        raise Refusal(f"a corpus is demo, hub:NAME, a file, a folder or a glob; there is no {shown!r}; check the name")
    if not found.sizes:
        raise Refusal(f"a corpus has at least one file; {shown!r} has none; check the name (hidden files don't count)")
    files = _files(base, found)
    _check_one_kind(shown, files)
    return LocalFiles(name, base, files, tuple(map(readable_name, found.links_to_read_folders)))


def _files(base: Path, found: Found) -> tuple[CorpusFile, ...]:
    return tuple(
        CorpusFile(base / name, readable_name(name), _kind(name), size) for name, size in sorted(found.sizes.items())
    )


def _public_name(corpus: str, path: Path) -> str:
    """The name as given, or its last part where the rest would tell of this machine."""
    if path.name in ("", ".."):
        return readable_name(path.resolve().name)
    return readable_name(path.name if path.is_absolute() or ".." in path.parts else str(Path(corpus)))


def _kind(name: str) -> str:
    path = Path(name.lower())
    inner = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    kind = _KIND_OF_EXTENSION.get(inner.suffix, _UNKNOWN)
    return _UNKNOWN if kind in _UNCOMPRESSED and inner is not path else kind


def _check_one_kind(corpus: str, files: Iterable[CorpusFile]) -> None:
    names_of: dict[str, list[str]] = {}
    for file in files:
        names_of.setdefault(file.kind, []).append(file.name)
    if len(names_of) == 1 and _UNKNOWN not in names_of:
        return
    listed = "; ".join(
        f"{kind} ({len(names)}): {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for kind, names in sorted(names_of.items())
    )
    raise Refusal(
        f"the files of a corpus are of one known kind ({_KNOWN}); {corpus!r} has {listed}; choose with a glob, such as '**/*.txt'"
    )
