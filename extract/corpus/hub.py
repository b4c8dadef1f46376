"""Corpora other than local files: Python's reference manual (demo) and datasets on the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from attlas.extract.corpus.columns import MISSING, check_column, columns_in, value_at
from attlas.extract.corpus.documents import Document, make_document
from attlas.extract.errors import Refusal


def demo_documents() -> Iterator[Document]:
    """The topics of Python's built-in help."""
    from pydoc_data.topics import topics

    return (make_document(f"topics:{name}", topics[name]) for name in sorted(topics))


def hub_documents(corpus: str, text_column: str) -> Callable[[], Iterator[Document]]:
    """A function that reads the rows of `hub:NAME` or `hub:NAME/CONFIG:SPLIT`. Raises Refusal."""
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, split = corpus.removeprefix("hub:").partition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3:
        raise Refusal(
            f"a hub corpus is hub:NAME, where NAME is name, owner/name or owner/name/config; got {corpus!r}; correct it"
        )
    config = parts[2] if len(parts) == 3 else None
    try:
        rows = datasets.load_dataset("/".join(parts[:2]), config, split=split or "train", streaming=True)
        columns = rows.column_names or list(next(iter(rows), {text_column: None}))
        if text_column not in columns and "." in text_column:
            columns = list(columns_in(next(iter(rows), {text_column: None})))
    except ConnectionError as error:
        raise Refusal(
            f"a hub corpus needs the hub; {corpus} can't be reached ({error}); connect, unset HF_HUB_OFFLINE, "
            "or give local files"
        ) from error
    except (ValueError, FileNotFoundError, DatasetsError) as error:
        raise Refusal(f"a hub corpus must exist; {corpus}: {error}; check name, config and split") from error
    check_column(columns, text_column, corpus)
    outer = next(c for c in rows.column_names or columns if text_column == c or text_column.startswith(f"{c}."))
    selected = rows.select_columns([outer])
    return lambda: (_row_document(f"{corpus}:{n}", row, text_column) for n, row in enumerate(selected, 1))


def _row_document(source: str, row: dict[str, Any], text_column: str) -> Document:
    value = value_at(row, text_column)
    return make_document(source, None if value is MISSING else value)
