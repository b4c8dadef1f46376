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

    Raises Refusal for a table or column that the dataset does not have, and for a file that can't be written.
    """
    path = Path(output)
    refuse_other_suffix(path)
    if form not in ("long", "wide"):
        raise Refusal(f"a form is long or wide; got {form!r}; choose one of them")
    dataset = Dataset.open(location)
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
    """Means of documents in long form. A document that lies in several parts comes with its last one."""
    by = dataset.table(table).places
    keys, facts = ["document_id", *by, "column"], _documents(dataset)
    order = pl.Enum(columns)
    last_parts = _last_parts(dataset, table)
    unfinished: list[pl.DataFrame] = []
    for number, sums in enumerate(document_sums(dataset, table, columns, by)):
        weighed = sums.select(*keys, WEIGHT, total=pl.col(WEIGHT) * pl.col("mean"))
        found = pl.concat([*unfinished, weighed]).group_by(keys).agg(pl.col(WEIGHT, "total").sum())
        is_done = pl.col("document_id").is_in(last_parts.filter(pl.col("part") <= number)["document_id"].implode())
        unfinished = [found.filter(~is_done)]
        yield (
            found.filter(is_done)
            .with_columns(pl.col("column").cast(order), value=pl.col("total") / pl.col(WEIGHT))
            .sort(keys)
            .with_columns(pl.col("column").cast(pl.String))
            .join(facts, on="document_id", how="left", maintain_order="left")
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


def _documents(dataset: Dataset) -> pl.DataFrame:
    """Of each measured document `document_id`, `source`, `sequences` and `tokens`."""
    tokens = dataset.scan("sequences").group_by("document_id").agg(pl.col("tokens").sum())
    return (
        dataset.scan("documents")
        .join(tokens, on="document_id")
        .select("document_id", "source", "sequences", "tokens")
        .collect()
    )


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
