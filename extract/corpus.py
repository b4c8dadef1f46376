"""Documents, one after the other: the demo corpus, local files, data sets of the hub.

`datasets` reads the hub. Its readers of local files lose the name, the line and the byte of what is wrong, so these
are read here; a document that can't be used is yielded with the reason in place of its text.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa

from extract.errors import Refusal

Unit = Literal["document", "paragraph", "line"]
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
_KNOWN = f"{', '.join(e for e in _KIND_OF_EXTENSION if e)}; those of text, .parquet aside, also as {', '.join(_COMPRESSIONS)}"
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
_HEAD_LINES = 100  # of a JSON lines file, looked at for its columns before any work
_PARQUET_ROWS = 256
# null: a column of nothing but missing values; binary: how some writers store strings
_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_null,
)


@dataclass(frozen=True)
class Document:
    """A text and where it came from; `text` is "" where it was dropped before it could be read, or is an image's `file`."""

    source: str
    text: str
    dropped_reason: str | None = None
    file: Path | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, read as they are asked for; can be iterated again."""

    name: str
    files: tuple[tuple[str, int], ...]
    read: Callable[[], Iterator[Document]] = field(repr=False)
    folder: Path | None = None  # in which the files of a corpus of images lie
    limit: int | None = None
    strict: bool = False

    @property
    def of_images(self) -> bool:
        return self.folder is not None

    def __iter__(self) -> Iterator[Document]:
        for document in islice(self.read(), self.limit):
            if self.strict:
                refuse_unreadable(document)
            yield document


@dataclass(frozen=True)
class _File:
    path: Path
    name: str  # relative to what the user named, never a path of this machine
    kind: str
    size: int


def open_corpus(
    corpus: str,
    *,
    text_column: str = "text",
    unit: Unit = "document",
    limit: int | None = None,
    strict: bool = False,
) -> Corpus:
    """Check everything that can be checked before the documents are read, and give them.

    `corpus`: `demo`, `hub:NAME` (or `hub:NAME/CONFIG:SPLIT` with NAME as owner/name), a file, a folder or a glob.
    `limit` counts documents, dropped ones too. Raises Refusal.
    """
    if limit is not None and limit < 1:
        raise Refusal(f"limit must be at least 1; got {limit}; give a larger number or none")
    if unit not in ("document", "paragraph", "line"):
        raise Refusal(f"unit must be document, paragraph or line; got {unit!r}; give one of these")
    opened = partial(Corpus, limit=limit, strict=strict)
    if corpus == "demo" or corpus.startswith("hub:"):
        _check_unit(unit, corpus)
        return opened(corpus, (), _demo if corpus == "demo" else _hub(corpus, text_column))
    if corpus == "random-repeats":
        raise Refusal("random-repeats is made of token ids and can't be read as documents; give texts")
    name, folder, files = _local_files(corpus)
    _check_unit(unit, files[0].kind)
    if files[0].kind == IMAGES:
        images = partial(_images, files)
        return opened(name, _names_and_sizes(files), images, folder)
    if files[0].kind != "text":
        for file in files:
            _check_column(file, text_column)
    read = partial(_documents_of_files, files, text_column, unit)
    return opened(name, _names_and_sizes(files), read)


def reason_kind(reason: str) -> str:
    """What a dropped document counts as: its reason without place and details."""
    return re.split(r" at |: | \(", reason, maxsplit=1)[0]


def refuse_unreadable(document: Document) -> None:
    """Raise Refusal for a document that could not be read; an empty one was read."""
    if document.dropped_reason not in (None, "empty"):
        raise Refusal(
            f"a strict run refuses what can't be read; {document.source} is {document.dropped_reason}; "
            "repair it, or run without strict to have it counted as dropped"
        )


def _check_unit(unit: str, kind: str) -> None:
    if unit != "document" and kind != "text":
        raise Refusal(f"only text files are cut into a {unit} each; this corpus is {kind}; leave the unit out")


def _document(source: str, value: Any) -> Document:
    if not isinstance(value, str):
        return Document(source, "", f"not text ({'null' if value is None else type(value).__name__})")
    if not value:
        return Document(source, "", "empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and UTF-8 can't
        return Document(source, "", f"not text (lone surrogate at character {error.start})")
    return Document(source, value)


def _decoded(source: str, data: bytes, *, offset: int = 0) -> Document:
    """The document in these bytes, which lie `offset` bytes into their file."""
    try:
        return _document(source, data.decode())
    except UnicodeDecodeError as error:
        return Document(source, "", f"not UTF-8 at byte {offset + error.start}")


# --- the demo corpus and the hub


def _demo() -> Iterator[Document]:
    from pydoc_data.topics import topics

    return (_document(f"topics:{name}", topics[name]) for name in sorted(topics))


def _hub(corpus: str, text_column: str) -> Callable[[], Iterator[Document]]:
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, split = corpus.removeprefix("hub:").partition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise Refusal(f"a hub corpus is hub:NAME, NAME being name, owner/name or owner/name/config; got {corpus!r}")
    config = parts[2] if len(parts) == 3 else None
    try:
        rows = datasets.load_dataset("/".join(parts[:2]), config, split=split or "train", streaming=True)
        columns = rows.column_names or list(next(iter(rows), {text_column: None}))
    except ConnectionError as error:
        raise Refusal(
            f"a hub corpus needs the hub; {corpus} can't be reached ({error}); connect, unset HF_HUB_OFFLINE, "
            "or give local files"
        ) from error
    except (ValueError, FileNotFoundError, DatasetsError) as error:
        raise Refusal(f"a hub corpus must be there; {corpus}: {error}; check name, config and split") from error
    _check_in(columns, text_column, corpus)
    chosen = rows.select_columns([text_column])
    return lambda: (_document(f"{corpus}:{n}", row[text_column]) for n, row in enumerate(chosen, 1))


# --- local files


def _names_and_sizes(files: Iterable[_File]) -> tuple[tuple[str, int], ...]:
    return tuple((file.name, file.size) for file in files)


def _images(files: Iterable[_File]) -> Iterator[Document]:
    return (Document(file.name, "", file=file.path) for file in files)


def _local_files(corpus: str) -> tuple[str, Path, list[_File]]:
    """The corpus's name, its folder, and its files, sorted by name, all of one kind."""
    path = Path(corpus).expanduser()
    name = _public_name(corpus, path)
    if path.is_file():
        base, names = path.parent, [path.name]
    elif path.is_dir():
        base, names = path, _names_inside(path)
    elif glob.has_magic(corpus):
        base = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        pattern = path.relative_to(base).as_posix()
        # not Path.glob: this one leaves hidden files out, as a shell does
        found = glob.glob(pattern, root_dir=base, recursive=True)  # noqa: PTH207
        names = sorted(name for name in found if (base / name).is_file())
        name = pattern if name == path.name else name
    else:
        raise Refusal(f"a corpus is demo, hub:NAME, a file, a folder or a glob; there is no {corpus!r}; check the name")
    if not names:
        raise Refusal(f"a corpus has at least one file; {corpus!r} has none; check the name (hidden files don't count)")
    files = [_File(base / n, n, _kind(n), (base / n).stat().st_size) for n in names]
    _check_one_kind(corpus, files)
    return name, base, files


def _public_name(corpus: str, path: Path) -> str:
    """The name as given, or its last part where the rest would tell of this machine."""
    if path.name in ("", ".."):
        return path.resolve().name
    return path.name if path.is_absolute() or ".." in path.parts else str(Path(corpus))


def _names_inside(folder: Path) -> list[str]:
    """Names of all files below the folder; what is hidden stays so."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _kind(name: str) -> str:
    path = Path(name.lower())
    inner = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    kind = _KIND_OF_EXTENSION.get(inner.suffix, "of no known kind")
    return "of no known kind" if kind in _UNCOMPRESSED and inner is not path else kind


def _check_one_kind(corpus: str, files: list[_File]) -> None:
    names_of: dict[str, list[str]] = {}
    for file in files:
        names_of.setdefault(file.kind, []).append(file.name)
    if len(names_of) == 1 and "of no known kind" not in names_of:
        return
    listed = "; ".join(
        f"{kind} ({len(names)}): {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for kind, names in sorted(names_of.items())
    )
    raise Refusal(
        f"the files of a corpus are of one known kind ({_KNOWN}); {corpus!r} has {listed}; choose with a glob, such as '**/*.txt'"
    )


def _check_column(file: _File, text_column: str) -> None:
    """Refuse a file that can't be opened as its kind or lacks the column; one without rows passes."""
    try:
        columns = _COLUMNS[file.kind](file)
    except (*_READ_ERRORS, UnicodeDecodeError, csv.Error) as error:
        raise Refusal(f"{file.name} must be readable as {file.kind}; {error}; repair it or leave it out") from error
    if columns:
        _check_in(columns, text_column, file.name)
    if file.kind == "Parquet":
        _check_parquet_type(file, text_column)


def _check_in(columns: Iterable[str], text_column: str, name: str) -> None:
    existing = list(columns)
    if text_column not in existing:
        raise Refusal(
            f"the text column must exist; {name} has no {text_column!r} but {', '.join(existing)}; use --text-column"
        )


def _documents_of_files(files: Iterable[_File], text_column: str, unit: Unit) -> Iterator[Document]:
    for file in files:
        rows = _text_documents(file, unit) if file.kind == "text" else _ROWS[file.kind](file, text_column)
        place = file.name
        try:
            for document in rows:
                place = document.source
                yield document
        except _READ_ERRORS as error:
            # what is behind the damage can't be counted, so it can't be dropped
            raise Refusal(
                f"a corpus must be readable to its end; {file.name} fails after {place}: {error}; "
                "repair it or leave it out"
            ) from error


def _opened(file: _File) -> BinaryIO:
    match file.path.suffix.lower():
        case ".gz" | ".gzip":
            return cast(BinaryIO, gzip.open(file.path))
        case ".bz2":
            return cast(BinaryIO, bz2.open(file.path))
        case ".xz":
            return cast(BinaryIO, lzma.open(file.path))
        case ".zst" | ".zstd" | ".lz4" as suffix:
            codec = "lz4" if suffix == ".lz4" else "zstd"
            return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(str(file.path), compression=codec)))
    return file.path.open("rb")


def _lines(file: _File) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset in bytes, line with its end) of each line, without a byte order mark."""
    with _opened(file) as stream:
        offset = 0
        for number, line in enumerate(stream, 1):
            mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            yield number, offset + mark, line[mark:]
            offset += len(line)


def _text_documents(file: _File, unit: Unit) -> Iterator[Document]:
    match unit:
        case "document":
            return _whole_text(file)
        case "line":
            return (_decoded(f"{file.name}:{n}", _without_end(line), offset=at) for n, at, line in _lines(file))
        case "paragraph":
            return _paragraphs(file)


def _whole_text(file: _File) -> Iterator[Document]:
    try:
        with _opened(file) as stream:
            data = stream.read()
    except _READ_ERRORS as error:
        yield Document(file.name, "", f"unreadable: {type(error).__name__}")
        return
    text = data.removeprefix(codecs.BOM_UTF8)
    yield _decoded(file.name, text, offset=len(data) - len(text))


def _paragraphs(file: _File) -> Iterator[Document]:
    """Runs of lines between blank ones, named by their first line."""
    held: list[tuple[int, int, bytes]] = []
    for line in chain(_lines(file), [(0, 0, b"")]):
        if line[2].strip():
            held.append(line)
        elif held:
            number, offset, _ = held[0]
            yield _decoded(f"{file.name}:{number}", _without_end(b"".join(h[2] for h in held)), offset=offset)
            held.clear()


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


# --- JSON lines


def _json_columns(file: _File) -> list[str]:
    lines = [line for _, _, line in islice(_lines(file), _HEAD_LINES) if line.strip()]
    if lines and lines[0].lstrip().startswith(b"["):
        raise Refusal(
            f"JSON must come as one object per line; {file.name} begins with an array; convert it (jq -c '.[]')"
        )
    objects = [value for value in map(_json_value, lines) if isinstance(value, dict)]
    if lines and not objects:
        raise Refusal(
            f"JSON must come as one object per line; the head of {file.name} has none; convert it (jq -c '.[]')"
        )
    return list(dict.fromkeys(key for value in objects for key in value))


def _json_value(line: bytes) -> Any:
    """The line's value; an exception, returned, where it is no JSON."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return error


def _json_rows(file: _File, text_column: str) -> Iterator[Document]:
    for number, offset, line in _lines(file):
        if line.strip():
            yield _json_document(f"{file.name}:{number}", line, offset, text_column)


def _json_document(source: str, line: bytes, offset: int, text_column: str) -> Document:
    match _json_value(line):
        case dict() as value if text_column in value:
            return _document(source, value[text_column])
        case dict():
            return Document(source, "", f"not text (no column {text_column})")
        case UnicodeDecodeError() as error:
            return Document(source, "", f"not UTF-8 at byte {offset + error.start}")
        case json.JSONDecodeError() as error:
            return Document(source, "", f"invalid JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
        case Exception() as error:  # nested too deep, a number of too many digits
            return Document(source, "", f"invalid JSON: {type(error).__name__}")
        case value:
            return Document(source, "", f"invalid JSON: {type(value).__name__} instead of an object")


# --- CSV and TSV


def _csv_columns(file: _File) -> list[str]:
    header, wrong = next(_csv_records(file), ([], None))
    if wrong:
        raise Refusal(f"{file.name} must begin with a header; its first line is {wrong}; repair it or leave it out")
    return header


def _csv_records(file: _File) -> Iterator[tuple[list[str], str | None]]:
    """(fields, None) or ([], what is wrong) of each record, the header first; blank lines are none."""
    undecodable: list[int] = []
    # a process-wide setting, and the only one there is: the default refuses texts of more than 128 KiB
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if file.kind == "TSV" else ","
    records = csv.reader(_csv_lines(file, undecodable), delimiter=delimiter, strict=True)
    while True:
        undecodable.clear()  # the reader takes no line beyond its record
        try:
            fields = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            yield [], f"invalid {file.kind}: {error}"
            continue
        if undecodable:
            yield [], f"not UTF-8 at byte {undecodable[0]}"
        elif fields:
            yield fields, None


def _csv_lines(file: _File, undecodable: list[int]) -> Iterator[str]:
    for _, offset, line in _lines(file):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            undecodable.append(offset + error.start)
            yield line.decode(errors="replace")


def _csv_rows(file: _File, text_column: str) -> Iterator[Document]:
    records = _csv_records(file)
    header, _ = next(records, ([], None))
    for number, (fields, wrong) in enumerate(records, 1):
        source = f"{file.name}:{number}"
        if wrong is None and len(fields) != len(header):
            wrong = f"invalid {file.kind}: {len(fields)} fields where the header has {len(header)}"
        yield Document(source, "", wrong) if wrong else _document(source, fields[header.index(text_column)])


# --- Parquet


def _parquet_columns(file: _File) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_schema(file.path).names


def _check_parquet_type(file: _File, text_column: str) -> None:
    import pyarrow.parquet as pq

    held = pq.read_schema(file.path).field(text_column).type
    value = held.value_type if isinstance(held, pa.DictionaryType) else held
    if not any(test(value) for test in _TEXT_TYPES):
        raise Refusal(f"the text column must hold text; {text_column!r} of {file.name} holds {held}; use --text-column")


def _parquet_rows(file: _File, text_column: str) -> Iterator[Document]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(file.path) as parquet:
        for batch in parquet.iter_batches(_PARQUET_ROWS, columns=[text_column]):
            for value in _bytes_if_text(batch.column(0)).to_pylist():
                number += 1
                source = f"{file.name}:{number}"
                yield _decoded(source, value) if isinstance(value, bytes) else _document(source, value)


def _bytes_if_text(column: pa.Array) -> pa.Array:
    """Text as bytes: writers don't check that it is UTF-8, and one bad row must not take its batch along."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return column.cast(pa.large_binary()) if is_text else column


_COLUMNS: dict[str, Callable[[_File], list[str]]] = {
    "JSON lines": _json_columns,
    "CSV": _csv_columns,
    "TSV": _csv_columns,
    "Parquet": _parquet_columns,
}
_ROWS: dict[str, Callable[[_File, str], Iterator[Document]]] = {
    "JSON lines": _json_rows,
    "CSV": _csv_rows,
    "TSV": _csv_rows,
    "Parquet": _parquet_rows,
}
