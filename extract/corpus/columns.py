"""The text column: a column's or key's name, or the dotted way to one inside another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from extract.errors import Refusal

MISSING = object()


def check_column(columns: Iterable[str], text_column: str, name: str, *, advice: str = "use --text-column") -> None:
    """Raise Refusal where the text column is not there, or there twice."""
    existing = list(columns)
    if text_column not in existing:
        raise Refusal(f"the text column must exist; {name} has no {text_column!r} but {', '.join(existing)}; {advice}")
    if existing.count(text_column) > 1:
        raise Refusal(
            f"the text column must be one; {name} has {existing.count(text_column)} of the name {text_column!r}; rename them"
        )


def value_at(record: Mapping[str, Any], column: str) -> Any:
    """The value of a key, or with dots of a key inside another; a key that is there as it stands wins. MISSING if none."""
    if column in record:
        return record[column]
    for outer, inner in _ways_in(column):
        match record.get(outer, MISSING):
            case None:
                return None
            case dict() as nested if (value := value_at(nested, inner)) is not MISSING:
                return value
    return MISSING


def _ways_in(column: str) -> Iterator[tuple[str, str]]:
    parts = column.split(".")
    return ((".".join(parts[:n]), ".".join(parts[n:])) for n in range(1, len(parts)))


def columns_in(record: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a record, those of records inside it with dots."""
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from (f"{key}.{inner}" for inner in columns_in(value))
        else:
            yield key
