"""JSON lines: an object per line, its text under a key. Objects that share a line are each a document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from extract.corpus.columns import MISSING, columns_in, value_at
from extract.corpus.documents import Document, document_of
from extract.corpus.files import CorpusFile
from extract.corpus.lines import decoded_lines
from extract.corpus.reading import Reading
from extract.errors import Refusal

_HEAD_LINES = 100  # looked at for columns before any work
_SPACE = re.compile(r"\s*")
_TWICE = object()  # the value of a key that an object has more than once


def json_columns(file: CorpusFile, reading: Reading) -> list[str]:
    """The keys of the objects in a file's head. Raises Refusal for a file that has no objects there."""
    lines = [line for line in islice(decoded_lines(file, reading.encoding), _HEAD_LINES) if line.text.strip()]
    if lines and lines[0].text.lstrip().startswith("["):
        raise Refusal(
            f"JSON must come as one object per line; {file.name} begins with an array; convert it (jq -c '.[]')"
        )
    objects = [o for line in lines if not line.wrong for o in _objects(line.text) if isinstance(o, dict)]
    if lines and not objects and all(line.wrong for line in lines):
        raise Refusal(
            f"a file must be text; {file.name} is {lines[0].wrong}; give its encoding, such as --encoding cp1252"
        )
    if lines and not objects:
        raise Refusal(
            f"JSON must come as one object per line; the head of {file.name} has none; convert it (jq -c . or jq -c '.[]')"
        )
    return list(dict.fromkeys(name for value in objects for name in columns_in(value)))


def json_documents(file: CorpusFile, reading: Reading) -> Iterator[Document]:
    for line in decoded_lines(file, reading.encoding):
        source = f"{file.name}:{line.number}"
        if line.wrong:
            yield Document(source, "", line.wrong)
        elif line.text.strip():
            values = _objects(line.text)
            places = [source] if len(values) == 1 else [f"{source}.{n}" for n in range(1, len(values) + 1)]
            for place, value in zip(places, values, strict=True):
                yield _document(place, value, reading.text_column)


def _objects(line: str) -> list[Any]:
    """The values of a line: one, or several objects side by side; an exception, returned, where it is neither."""
    try:
        return [json.loads(line, object_pairs_hook=_object)]
    except (ValueError, RecursionError) as error:
        side_by_side = _side_by_side(line) if line.lstrip().startswith("{") else []
        return side_by_side or [error]


def _side_by_side(line: str) -> list[dict[str, Any]]:
    """The objects that a line is made of, if it is made of nothing else: what is left when a line end was lost."""
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
        names = [name for name, _ in pairs]
        values |= {name: _TWICE for name in values if names.count(name) > 1}
    return values


def _document(source: str, value: Any, text_column: str) -> Document:
    match value:
        case dict():
            text = value_at(value, text_column)
            if text is MISSING:
                return Document(source, "", f"not text (no column {text_column})")
            if text is _TWICE:
                return Document(source, "", f"invalid JSON: key {text_column} more than once")
            return document_of(source, text)
        case json.JSONDecodeError() as error:
            return Document(source, "", f"invalid JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
        case Exception() as error:  # nested too deep, a number of too many digits
            return Document(source, "", f"invalid JSON: {type(error).__name__}")
        case _:
            return Document(source, "", f"invalid JSON: {type(value).__name__} instead of an object")
