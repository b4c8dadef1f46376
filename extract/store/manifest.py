"""The manifest, which is written last and makes the dataset exist, and the shape that every reader may rely on."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from attlas.extract.errors import Damaged, Refusal
from attlas.extract.shapes import (
    Malformed,
    any_value,
    count,
    flag,
    list_of,
    mapping_of,
    nullable,
    record,
    sha256,
    share,
    text,
)
from attlas.extract.store.interface import Storage, is_key
from attlas.extract.store.layout import MANIFEST
from attlas.extract.store.sealed import get_json
from attlas.extract.store.versions import check_version
from attlas.extract.tables import TABLES

_NAME = re.compile(r"[\w.-]+\.parquet", re.ASCII)
_STACK = record({"stack": text, "layers": count, "heads": nullable(count)}, optional={"of_tokens": flag})
_ATTENTION = record({"stack": text, "layer": count, "heads": count, "way": text})
_LAYOUT = record(
    {"attention": list_of(_ATTENTION)},
    optional={
        "sites": list_of(mapping_of(any_value)),
        "without_pattern": list_of(text),
        "residual_refusals": mapping_of(text),
    },
)
_MODEL = record(
    {
        "name": text,
        "architecture": text,
        "width": nullable(count),
        "residual": text,
        "stacks": list_of(_STACK),
        "layout": _LAYOUT,
    },
    optional={
        "revision": nullable(text),
        "weights_digest": nullable(text),
        "measured": text,
        "parameters": count,
        "stack": nullable(text),
        "layers": nullable(count),
        "heads": nullable(count),
    },
)
_CORPUS = record(
    {
        "name": text,
        "documents": count,
        "sequences": count,
        "tokens": count,
        "content_tokens": count,
        "dropped": mapping_of(count),
    },
    optional={"digest": nullable(text), "digest_keyed": flag, "files": mapping_of(count)},
)
_RUN = record({}, optional={"max_length": count, "stride": count})
_GRID = record({"rows": count, "columns": count, "first_patch": count})
_IMAGES = record(
    {"preprocessor": text, "pixels": list_of(count), "tokens": count, "grids": mapping_of(_GRID)},
    optional={"digest": text},
)
PART = record({"path": text, "rows": count, "bytes": count, "sha256": sha256})
_TABLE = record({"rows": count, "parts": list_of(PART)}, optional={"columns": list_of(text)})
_GENERATION = record(
    dict.fromkeys(("number", "next_sequence", "measured_shards", "added", "changed", "removed"), count)
)
_OWN_COLUMN = record(
    {
        **dict.fromkeys(("table", "name", "origin", "formula", "unit", "meaning", "reference"), text),
        "bounds": list_of(any_value),
    }
)
_MANIFEST = record(
    {
        "run": _RUN,
        "model": _MODEL,
        "corpus": _CORPUS,
        "engine": text,
        "device": text,
        "dtype": text,
        "tables": mapping_of(_TABLE),
    },
    optional={
        "tokenizer": record({"name": text}, optional={"digest": text}),
        "images": _IMAGES,
        "software": mapping_of(text),
        "shards": count,
        "generation": _GENERATION,
        "padding_waste": share,
        "by_reference": mapping_of(list_of(text)),
        "own_statistics": list_of(_OWN_COLUMN),
    },
)


def read_manifest(storage: Storage, key: str = MANIFEST) -> dict[str, Any] | None:
    """A manifest, or None if there is none. Refuses a damaged one, naming the key, and one of another version."""
    try:
        manifest = get_json(storage, key)
        if manifest is not None:
            _check(manifest, storage.place(key))
    except (Damaged, Malformed) as error:
        raise Refusal(
            f"a manifest is as attlas wrote it; {storage.place(key)}: {error}; "
            "restore the file from a copy, or measure again into another folder"
        ) from error
    return manifest


def _check(manifest: Any, place: str) -> None:
    """Raise Malformed, naming the key, where a manifest is not of the shape that this version writes and reads."""
    record({"schema_version": any_value})(manifest, "")
    check_version(manifest, place)
    _MANIFEST(manifest, "")
    for number, column in enumerate(manifest.get("own_statistics", ())):
        _check_own_column(column, f"own_statistics.{number}")
    for table, facts in manifest["tables"].items():
        _check_parts(table, [part["path"] for part in facts["parts"]])


def _check_own_column(column: dict[str, Any], key: str) -> None:
    """A column of a table of the contract that the contract does not have, with two bounds."""
    table = TABLES.get(column["table"])
    if table is None or not column["name"].isidentifier() or column["name"] in {c.name for c in table.columns}:
        raise Malformed(key, "a column beside those of the contract", f"{column['table']}.{column['name']}")
    if len(column["bounds"]) != 2 or not all(b is None or type(b) in (int, float, str) for b in column["bounds"]):
        raise Malformed(f"{key}.bounds", "two numbers, texts or nulls", repr(column["bounds"]))


def _check_parts(table: str, paths: list[str]) -> None:
    """A table of the contract, its parts distinct Parquet files in its own folder."""
    key = f"tables.{table}"
    if table not in TABLES:
        raise Malformed("a key of tables", f"one of {', '.join(TABLES)}", repr(table))
    for path in paths:
        if not is_key(path):
            raise Malformed(key, "parts inside the dataset (a part lies inside its dataset)", repr(path))
        folder, _, name = path.rpartition("/")
        if folder != table or not _NAME.fullmatch(name):
            raise Malformed(key, f"Parquet files in the folder {table}", repr(path))
    path, times = Counter(paths).most_common(1)[0] if paths else ("", 0)
    if times > 1:
        raise Malformed(key, "parts that are named once each", f"{path!r} {times} times")
