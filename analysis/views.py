"""Views for people: rows of `heads` and `residual` with the names that they otherwise refer to by number.

Queries see them like tables. They are made inside the database of a query and are no part of the dataset.
"""

from __future__ import annotations

from dataclasses import dataclass

from attlas.analysis.dataset import Dataset
from attlas.analysis.naming import model_title


@dataclass(frozen=True)
class View:
    """A view: its name, the tables that it reads, and its SELECT statement, in which {model} is the model's name as SQL."""

    name: str
    tables: tuple[str, ...]
    sql: str


VIEWS = (
    View(
        "heads_named",
        ("heads", "documents"),
        "SELECT {model} AS model, documents.source, 'L' || heads.layer || 'H' || heads.head AS head_name, heads.* "
        "FROM heads LEFT JOIN documents USING (document_id)",
    ),
    View(
        "residual_named",
        ("residual", "documents"),
        "SELECT {model} AS model, documents.source, 'L' || residual.layer || ' ' || residual.site AS site_name, residual.* "
        "FROM residual LEFT JOIN documents USING (document_id)",
    ),
)


def views_of(dataset: Dataset) -> list[View]:
    """The views whose tables this dataset has."""
    return [view for view in VIEWS if set(view.tables) <= set(dataset.tables)]


def statement(view: View, dataset: Dataset) -> str:
    """The SQL that creates a view."""
    model = model_title(dataset.manifest).replace("'", "''")
    select = view.sql.format(model=f"'{model}'")
    return f"CREATE VIEW {view.name} AS {select}"
