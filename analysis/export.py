"""Tables for statistics software: a row per document and place, or per sequence and place for mixed models.

Rows are read and written part by part, so memory is bounded by the largest part, however large the dataset.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import polars as pl

from attlas.analysis.comparability import COMPARED
from attlas.analysis.damage import refuse_if_damaged
from attlas.analysis.dataset import Dataset
from attlas.analysis.frames_output import refuse_other_suffix, write_frames
from attlas.analysis.summaries import WEIGHT, Grouping, averaged_columns, document_sums, weighted_parts
from attlas.extract.store import Location, Refusal

Form = Literal["long", "wide"]


def export(
    location: Location,
    output: Path | str,
    *,
    table: str = "heads",
    columns: Sequence[str] | None = None,
    form: Form = "long",
    mixed_model: str | None = None,
    min_documents: int = 1,
) -> Path:
    """Write means of documents, or the rows of a mixed model, to a CSV or Parquet file, and return its path.

    table: heads, residual or layers. columns: the statistics to export, in their own units; all that the dataset has by default.

    Each row is of a document and a place (`stack`, `layer`, and `head` or `site`), with the document's `source`, number of
    `sequences` and of `tokens` (special ones included). Long: a row for each `column`, with its `value`, the mean over the
    document weighted by rows (tokens, for residual and layers), and its `weight`, the number of these that have a value. Wide: a
    column for each statistic, and the largest of their weights.

    mixed_model: a statistic. Each row is then of a sequence and a place: `sequence_id`, `document_id`, `source`, `stack`, `layer`,
    `head` (or `site`) as a name such as L4H10, the statistic itself, `weight`, `tokens`, `log_tokens` (natural) and `share_special`
    (of the tokens). Sequences without a value are left out.

    min_documents: if it is more than 1, so many consecutive documents are pooled in a `group`, which takes the place of `document_id` and
    `source`, with its number of `documents`. Means that fewer of them have a value for are left out.

    Raises Refusal for a table or column that the dataset does not have, and for a file that can't be written.
    """
    path = Path(output)
    refuse_other_suffix(path)
    if form not in ("long", "wide"):
        raise Refusal(f"a form is long or wide; got {form!r}; choose one of them")
    dataset = Dataset.open(location, min_documents=min_documents)
    if mixed_model is not None and min_documents > 1:
        raise Refusal(
            "the rows of a mixed model are of single sequences; got --min-documents too; leave one of them out"
        )
    names = _columns(dataset, table, columns if mixed_model is None else [mixed_model])
    if mixed_model is not None:
        frames = sequence_rows(dataset, table, mixed_model)
    else:
        frames = document_means(dataset, table, names)
        frames = (_widen(frame, names) for frame in frames) if form == "wide" else frames
    with refuse_if_damaged(dataset):
        write_frames(frames, path)
    return path


def document_means(dataset: Dataset, table: str, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Means of documents, or of groups of min_documents, in long form. One that lies in several parts comes with its last part."""
    by = dataset.table(table).places
    facts, members = _facts_of_units(dataset)
    unit = facts.columns[0]
    keys, order = [unit, *by, "column"], pl.Enum(columns)
    last_parts = _last_parts(dataset, table).join(members, on="document_id").group_by(unit).agg(pl.col("part").max())
    weight = pl.col(WEIGHT).sum()
    unfinished: list[pl.DataFrame] = []
    for number, sums in enumerate(document_sums(dataset, table, columns, by)):
        weighed = sums.select("document_id", *by, "column", WEIGHT, total=pl.col(WEIGHT) * pl.col("mean"))
        # members are still apart, so that those with a value can be counted
        found = (
            pl.concat([*unfinished, weighed]).group_by("document_id", *by, "column").agg(weight, pl.col("total").sum())
        )
        of_units = found.join(members, on="document_id")
        is_done = pl.col(unit).is_in(last_parts.filter(pl.col("part") <= number)[unit].implode())
        unfinished = [of_units.filter(~is_done).select(found.columns)]
        yield (
            of_units.filter(is_done)
            .group_by(keys)
            .agg(weight, value=pl.col("total").sum() / weight, known=pl.len())
            .filter(pl.col("known") >= dataset.min_documents)
            .with_columns(pl.col("column").cast(order))
            .sort(keys)
            .with_columns(pl.col("column").cast(pl.String))
            .join(facts, on=unit, how="left", maintain_order="left")
            .select(*facts.columns, *by, "column", "value", WEIGHT)
        )


def sequence_rows(dataset: Dataset, table: str, column: str) -> Iterator[pl.DataFrame]:
    """The rows of a mixed model, part by part."""
    sequences = dataset.scan("sequences").select("sequence_id", "tokens", "special_tokens").collect()
    sources = dataset.scan("documents").select("document_id", "source").collect()
    places = dataset.table(table).places
    name = _place_name(dataset, table)
    numbers = ["sequence_id", *places]
    grouping = Grouping([column], numbers)
    for rows in weighted_parts(dataset, table):
        known = grouping.of(rows).filter(pl.col(column).is_finite(), pl.col(WEIGHT) > 0).collect()
        yield (
            known.join(sequences, on="sequence_id", how="left")
            .join(sources, on="document_id", how="left")
            .sort(numbers)
            .select(
                *("sequence_id", "document_id", "source", "stack", "layer"),
                *([] if name is None else [name]),
                pl.col(column).cast(pl.Float64),
                *(WEIGHT, "tokens"),
                log_tokens=pl.col("tokens").log(),
                share_special=pl.col("special_tokens") / pl.col("tokens"),
            )
        )


def _place_name(dataset: Dataset, table: str) -> pl.Expr | None:
    """The name of a head or site, preceded by its stack if there are several; None of a whole layer."""
    key = next((key for key in ("head", "site") if key in dataset.table(table).places), None)
    if key is None:
        return None
    name = pl.format("L{}H{}" if key == "head" else "L{} {}", "layer", key)
    has_several = len(dataset.manifest["model"]["stacks"]) > 1
    return (pl.format("{} {}", "stack", name) if has_several else name).alias(key)


def _widen(frame: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """A column for each statistic, null where it has no value in a document, and the largest weight."""
    keys = [name for name in frame.columns if name not in ("column", "value", WEIGHT)]
    of_column = (pl.col("value").filter(pl.col("column") == name).first().alias(name) for name in columns)
    return frame.group_by(keys, maintain_order=True).agg(pl.col(WEIGHT).max(), *of_column)


def _facts_of_units(dataset: Dataset) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What is known of the rows' units, by their number in the first column, and the unit of each document.

    Units are documents, with `source`, `sequences` and `tokens`; or groups of min_documents consecutive ones, the last of which has the rest
    too, with `documents`, `sequences` and `tokens`.
    """
    tokens = dataset.scan("sequences").group_by("document_id").agg(pl.col("tokens").sum())
    documents = (
        dataset.scan("documents")
        .join(tokens, on="document_id")
        .select("document_id", "source", "sequences", "tokens")
        .sort("document_id")
        .collect()
    )
    if dataset.min_documents == 1:
        return documents, documents.select("document_id")
    number = pl.int_range(pl.len(), dtype=pl.Int64) // dataset.min_documents
    last = documents.height // dataset.min_documents - 1
    members = documents.with_columns(group=number.clip(upper_bound=last))
    facts = members.group_by("group").agg(
        documents=pl.len(), sequences=pl.col("sequences").sum(), tokens=pl.col("tokens").sum()
    )
    return facts.sort("group"), members.select("document_id", "group")


def _last_parts(dataset: Dataset, table: str) -> pl.DataFrame:
    """The number of the last part in which each document has rows."""
    parts = [
        rows.select("document_id").unique().with_columns(part=pl.lit(number))
        for number, rows in enumerate(dataset.scan_parts(table))
    ]
    return pl.concat(pl.collect_all(parts)).group_by("document_id").agg(pl.col("part").max())


def _columns(dataset: Dataset, table: str, names: Sequence[str] | None) -> list[str]:
    """The names of the statistics, checked. Raises Refusal."""
    if table not in COMPARED:
        raise Refusal(f"--table must be one of {', '.join(COMPARED)}; got {table!r}; choose one of them")
    dataset.parts(table)  # raises Refusal if there is no such table
    available = averaged_columns(dataset, table)
    for name in names or ():
        if name not in available:
            raise Refusal(
                f"an export has statistics that this dataset has in {table}; {name!r} is not one; {_suggestion(dataset, name, available)}"
            )
    if names is not None and not names:
        raise Refusal("an export has at least one column; got none; name one, or leave --columns out")
    return available if names is None else list(dict.fromkeys(names))


def _suggestion(dataset: Dataset, name: str, available: Sequence[str]) -> str:
    for table in COMPARED:
        if table in dataset.tables and name in averaged_columns(dataset, table):
            return f"{table} has it: use --table {table}"
    near = difflib.get_close_matches(name, available, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(available)}"
