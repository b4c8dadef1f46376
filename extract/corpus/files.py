"""The files of a corpus: names, sizes and kind."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from attlas.extract.corpus.finding import EVERYTHING, FoundFiles, find_files, kind_of_special_file
from attlas.extract.corpus.names import readable_name
from attlas.extract.corpus.stored import StoredFile, stored_files
from attlas.extract.errors import Refusal
from attlas.extract.urls import is_url, url_name

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
_NEVER_COMPRESSED = ("Parquet", IMAGES)  # these formats compress their own content
_UNKNOWN = "of unknown kind"
_SUPPORTED = f"{', '.join(e for e in _KIND_OF_EXTENSION if e)}; text files other than .parquet also with {', '.join(_COMPRESSIONS)}"


@dataclass(frozen=True)
class CorpusFile:
    """A file to read. `name` is valid text, relative to what the user named, and reveals no other path of this machine."""

    path: Path | StoredFile
    name: str
    kind: str
    size: int


@dataclass(frozen=True)
class CorpusFiles:
    """The name, folder and files of a corpus; the files have one kind and are sorted by name."""

    name: str
    folder: Path | None  # None in an object store
    files: tuple[CorpusFile, ...]
    duplicate_links: tuple[str, ...]  # links to folders that are read through another path

    @property
    def kind(self) -> str:
        """The common kind of all files."""
        return self.files[0].kind


def image_folder(corpus: str) -> Path:
    """The folder that the names of a corpus of images are relative to. Raises Refusal."""
    folder = corpus_files(corpus).folder
    assert folder is not None, "images are in a local folder"
    return folder


def corpus_files(corpus: str) -> CorpusFiles:
    """Find the files of a corpus given as a file, folder or glob, or as the URL of one in an object store. Raises Refusal."""
    return _stored_files(corpus) if is_url(corpus) else _local_files(corpus)


def _stored_files(corpus: str) -> CorpusFiles:
    pattern, found = stored_files(corpus)
    display_name = readable_name(corpus)
    _check_some(display_name, found)
    files = tuple(
        CorpusFile(file, readable_name(file.key), _kind(file.key), file.size)
        for file in sorted(found, key=lambda file: file.key)
    )
    _check_one_kind(display_name, files)
    if files[0].kind == IMAGES:
        raise Refusal(f"images are read from a local folder; {display_name} is a URL; copy them to a folder")
    return CorpusFiles(readable_name(pattern or url_name(corpus) or corpus), None, files, ())


def _local_files(corpus: str) -> CorpusFiles:
    path = Path(os.path.expanduser(corpus))  # noqa: PTH111 - Path raises for an unknown user
    display_name = readable_name(corpus)
    name = _public_name(corpus, path)
    # os.path, because Path raises for names that are too long
    if os.path.isfile(path):  # noqa: PTH113
        base, matches = path.parent, FoundFiles({path.name: path.stat().st_size})
    elif os.path.isdir(path):  # noqa: PTH112
        base, matches = path, find_files(path, EVERYTHING)
    elif what := kind_of_special_file(path):
        raise Refusal(f"a corpus is read from regular files; {display_name} is {what}; write its content to a file")
    elif glob.has_magic(corpus):
        base = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        pattern = path.relative_to(base)
        matches = find_files(base, pattern.parts) if os.path.isdir(base) else FoundFiles()  # noqa: PTH112
        name = readable_name(pattern.as_posix()) if name == readable_name(path.name) else name
    else:
        raise Refusal(
            f"a corpus is demo, random-repeats, needle, hub:NAME, a file, a folder or a glob; there is no {display_name!r}; check the name"
        )
    _check_some(display_name, matches.sizes)
    files = _files(base, matches)
    _check_one_kind(display_name, files)
    return CorpusFiles(name, base, files, tuple(map(readable_name, matches.duplicate_links)))


def _check_some(corpus: str, files: Collection[object]) -> None:
    if not files:
        raise Refusal(
            f"a corpus must have at least one file; {corpus!r} has none; check the name (hidden files are ignored)"
        )


def _files(base: Path, matches: FoundFiles) -> tuple[CorpusFile, ...]:
    return tuple(
        CorpusFile(base / name, readable_name(name), _kind(name), size) for name, size in sorted(matches.sizes.items())
    )


def _public_name(corpus: str, path: Path) -> str:
    """The name as given, or its last part if the rest would reveal a path of this machine."""
    if path.name in ("", ".."):
        return readable_name(path.resolve().name)
    return readable_name(path.name if path.is_absolute() or ".." in path.parts else str(Path(corpus)))


def _kind(name: str) -> str:
    path = Path(name.lower())
    inner = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    kind = _KIND_OF_EXTENSION.get(inner.suffix, _UNKNOWN)
    return _UNKNOWN if kind in _NEVER_COMPRESSED and inner is not path else kind


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
        f"the files of a corpus must be of one supported kind ({_SUPPORTED}); {corpus!r} has {listed}; select with a glob, such as '**/*.txt'"
    )
