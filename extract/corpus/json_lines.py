"""Read JSON lines: one object per line, with its text under a key. Several objects on a line are several documents."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from attlas.extract.corpus.columns import MISSING, columns_in, value_at
from attlas.extract.corpus.documents import Document, make_document
from attlas.extract.corpus.files import CorpusFile
from attlas.extract.corpus.lines import read_lines
from attlas.extract.corpus.options import ReadOptions
from attlas.extract.errors import Refusal

_HEAD_LINES = 100  # read for the names of columns before any work
_SPACE = re.compile(r"\s*")
_DUPLICATE = object()  # the value of a key that occurs more than once in an object


def json_columns(file: CorpusFile, options: ReadOptions) -> list[str]:
    """The keys of the objects in the first lines of a file. Raises Refusal if there are no objects."""
    lines = [line for line in islice(read_lines(file, options), _HEAD_LINES) if line.text.strip()]
    if lines and lines[0].text.lstrip().startswith("["):
        raise Refusal(f"JSON must have one object per line; {file.name} begins with an array; convert it (jq -c '.[]')")
    objects = [o for line in lines if not line.error for o in _objects(line.text) if isinstance(o, dict)]
    if lines and not objects and all(line.error for line in lines):
        raise Refusal(
            f"JSON lines must be text; {file.name} is {lines[0].error}; set its encoding, such as --encoding cp1252"
        )
    if lines and not objects:
        raise Refusal(
            f"JSON must have one object per line; the first lines of {file.name} have none; convert it (jq -c . or jq -c '.[]')"
        )
    return list(dict.fromkeys(name for value in objects for name in columns_in(value)))


def json_documents(file: CorpusFile, options: ReadOptions) -> Iterator[Document]:
    """The documents of all objects in a file."""
    for line in read_lines(file, options):
        source = f"{file.name}:{line.number}"
        if line.error:
            yield Document(source, "", line.error)
        elif line.text.strip():
            values = _objects(line.text)
            places = [source] if len(values) == 1 else [f"{source}.{n}" for n in range(1, len(values) + 1)]
            for place, value in zip(places, values, strict=True):
                yield _document(place, value, options.text_column)


def _objects(line: str) -> list[Any]:
    """The JSON values on a line: one value, or several objects side by side; or the exception if the line is invalid."""
    try:
        return [json.loads(line, object_pairs_hook=_object)]
    except (ValueError, RecursionError) as error:
        side_by_side = _side_by_side(line) if line.lstrip().startswith("{") else []
        return side_by_side or [error]


def _side_by_side(line: str) -> list[dict[str, Any]]:
    """The objects on a line that consists of objects only, as after a lost line end."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    objects: list[dict[str, Any]] = []
    text, place = line.strip(), 0
    try:
        while place < len(text):
            value, end = decoder.raw_decode(text, place)
            if not isinstance(value, dict):
                return []
            objects.append(value)
            space = _SPACE.match(text, end)
            place = end if space is None else space.end()
    except (ValueError, RecursionError):
        return []
    return objects


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        times = Counter(name for name, _ in pairs)
        values |= {name: _DUPLICATE for name, count in times.items() if count > 1}
    return values


def _document(source: str, value: Any, text_column: str) -> Document:
    match value:
        case dict():
            text = value_at(value, text_column)
            if text is MISSING:
                return Document(source, "", f"not text (no column {text_column})")
            if text is _DUPLICATE:
                return Document(source, "", f"invalid JSON: key {text_column} more than once")
            return make_document(source, text)
        case json.JSONDecodeError() as error:
            return Document(source, "", f"invalid JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
        case Exception() as error:  # nesting too deep, or a number with too many digits
            return Document(source, "", f"invalid JSON: {type(error).__name__}")
        case _:
            return Document(source, "", f"invalid JSON: {type(value).__name__} instead of an object")
