"""The text column: the name of a column or key, or a dotted path to a nested one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attlas.extract.errors import Refusal

MISSING = object()


def check_column(columns: Iterable[str], text_column: str, name: str, *, advice: str = "use --text-column") -> None:
    """Raise Refusal if the text column is missing or ambiguous."""
    existing = list(columns)
    if text_column not in existing:
        raise Refusal(
            f"the text column must exist; {name} has no {text_column!r}, only {', '.join(existing)}; {advice}"
        )
    if existing.count(text_column) > 1:
        raise Refusal(
            f"the text column must be unique; {name} has {existing.count(text_column)} named {text_column!r}; rename them"
        )


def value_at(record: Mapping[str, Any], column: str) -> Any:
    """The value of a key or of a dotted path; a key with that exact name wins. MISSING if there is neither."""
    if column in record:
        return record[column]
    for outer, inner in _path_splits(column):
        match record.get(outer, MISSING):
            case None:
                return None
            case dict() as nested if (value := value_at(nested, inner)) is not MISSING:
                return value
    return MISSING


def _path_splits(column: str) -> Iterator[tuple[str, str]]:
    """All ways to split a dotted path into an outer key and the rest."""
    parts = column.split(".")
    return ((".".join(parts[:n]), ".".join(parts[n:])) for n in range(1, len(parts)))


def columns_in(record: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a record, with dotted paths for nested ones."""
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from (f"{key}.{inner}" for inner in columns_in(value))
        else:
            yield key
