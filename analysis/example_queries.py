"""Queries that answer common questions about any dataset, to be used as they are or changed.

Means over sequences weigh each row by `query_rows`, or by its sequence's tokens, because a row is a mean over these.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from attlas.analysis.dataset import Dataset
from attlas.analysis.output import write_whole
from attlas.analysis.residual import SITES
from attlas.analysis.result import Format, write_result
from attlas.extract.store import Location
from attlas.extract.tables import CLASS_MASSES

_WIDTH = 120


@dataclass(frozen=True)
class Example:
    """A query: its name, what it answers, the columns that it needs besides keys (TABLE.COLUMN), and its SQL."""

    name: str
    answers: str
    needs: tuple[str, ...]
    sql: str

    def lacks(self, dataset: Dataset) -> list[str]:
        """The tables and columns that it needs and this dataset does not have."""
        tables = dict.fromkeys(need.partition(".")[0] for need in self.needs)
        lacking = [table for table in tables if table not in dataset.tables]
        for need in self.needs:
            table, _, column = need.partition(".")
            if table not in lacking and column not in dataset.part_schema(table).names:
                lacking.append(need)
        return lacking


def _mean(column: str, weight: str = "query_rows") -> str:
    return f"SUM({column} * {weight}) / SUM({weight}) FILTER ({column} IS NOT NULL) AS {column}"


# the first and last position (or distance) of a doubling bin
_LOW = "CASE WHEN ABS(bin) < 3 THEN bin ELSE SIGN(bin) * (2 ** (ABS(bin) - 2) + 1) END::BIGINT"
_HIGH = "CASE WHEN ABS(bin) < 3 THEN bin ELSE SIGN(bin) * 2 ** (ABS(bin) - 1) END::BIGINT"
_SITES = list(SITES)
_CLASS_MEANS = ",\n".join(f"  {_mean(name)}" for name in CLASS_MASSES)

EXAMPLES = (
    Example(
        "sharpest-heads",
        "Which heads look at the fewest keys?",
        ("heads.entropy_nats", "heads.max_weight", "heads.query_rows"),
        f"""\
SELECT stack, layer, head,
  {_mean("entropy_nats")},
  {_mean("max_weight")}
FROM heads GROUP BY ALL ORDER BY entropy_nats LIMIT 10""",
    ),
    Example(
        "means-and-errors",
        "Mean entropy of every head and its standard error over documents, without reading a row of heads.",
        tuple(
            f"totals.{name}"
            for name in (
                "documents",
                "weight",
                "mean",
                "deviation_squares",
                "deviation_products",
                "weight_squares",
            )
        ),
        """\
WITH sums AS (
  SELECT *, SUM(weight) OVER place AS total, SUM(weight * mean) OVER place / SUM(weight) OVER place AS theta
  FROM totals WHERE "column" = 'entropy_nats' WINDOW place AS (PARTITION BY stack, layer, head)
), deviations AS (
  SELECT *, theta - mean AS shift, total - weight_squares / weight AS others FROM sums
)
SELECT stack, layer, head, ANY_VALUE(theta) AS entropy_nats,
  SQRT((SUM(documents) - 1) / SUM(documents) * (
    SUM((deviation_squares - 2 * shift * deviation_products + shift ** 2 * weight_squares) / others ** 2)
    - SUM(shift * weight / others) ** 2 / SUM(documents))) AS standard_error,
  SUM(documents) AS documents, ANY_VALUE(total) ** 2 / SUM(weight_squares) AS effective_documents
FROM deviations GROUP BY ALL ORDER BY entropy_nats""",
    ),
    Example(
        "attention-by-class",
        "Which kinds of tokens does each layer look at? The shares of a layer add up to 1.",
        (*(f"heads.{name}" for name in CLASS_MASSES), "heads.query_rows"),
        f"""\
SELECT stack, layer,
{_CLASS_MEANS}
FROM heads GROUP BY ALL ORDER BY ALL""",
    ),
    Example(
        "attention-by-distance",
        "How is attention spread over distances, and how would even attention be?",
        ("profiles.sum", "profiles.count"),
        f"""\
SELECT stack, {_LOW} AS distance, {_HIGH} AS to_distance,
  SUM("sum") / SUM(SUM("sum")) OVER (PARTITION BY stack) AS attention,
  SUM("count") / SUM(SUM("count")) OVER (PARTITION BY stack) AS pairs
FROM profiles WHERE profile = 'offset' GROUP BY stack, bin ORDER BY stack, bin""",
    ),
    Example(
        "entropy-by-position",
        "How does entropy depend on the position of the query in its sequence?",
        ("profiles.sum", "profiles.count"),
        f"""\
SELECT stack, layer, {_LOW} AS position, {_HIGH} AS to_position,
  SUM("sum") / SUM("count") AS entropy_nats, SUM("count") AS rows
FROM profiles WHERE profile = 'entropy_by_position' GROUP BY stack, layer, bin ORDER BY stack, layer, bin""",
    ),
    Example(
        "previous-token-heads",
        "Which heads look at the token before?",
        ("heads.mass_previous", "heads.distance_tokens", "heads.query_rows"),
        f"""\
SELECT stack, layer, head,
  {_mean("mass_previous")},
  {_mean("distance_tokens")}
FROM heads GROUP BY ALL ORDER BY mass_previous DESC NULLS LAST LIMIT 10""",
    ),
    Example(
        "first-token-sinks",
        "Which heads rest on the first token, and how much of what they write comes from it?",
        ("heads.mass_first", "heads.value_weighted_first", "heads.query_rows"),
        f"""\
SELECT stack, layer, head,
  {_mean("mass_first")},
  {_mean("value_weighted_first")}
FROM heads GROUP BY ALL ORDER BY mass_first DESC NULLS LAST LIMIT 10""",
    ),
    Example(
        "redundant-heads",
        "Which two heads of the model have the most similar patterns? 1 means equal.",
        ("pairs.bhattacharyya", "pairs.rows"),
        """\
SELECT stack, layer, head, other_layer, other_head, SUM(bhattacharyya) / SUM(rows) AS similarity
FROM pairs WHERE layer <> other_layer OR head <> other_head
GROUP BY ALL ORDER BY similarity DESC LIMIT 10""",
    ),
    Example(
        "residual-growth",
        "How does the residual stream grow through the model, and how large is each update?",
        ("residual.stream_norm", "residual.update_norm", "residual.max_abs", "sequences.tokens"),
        f"""\
SELECT stack, layer, site,
  {_mean("stream_norm", "tokens")},
  {_mean("update_norm", "tokens")},
  MAX(max_abs) AS max_abs
FROM residual JOIN sequences USING (sequence_id)
GROUP BY stack, layer, site ORDER BY stack, layer, LIST_POSITION({_SITES}, site)""",
    ),
    Example(
        "layers-that-change-least",
        "Which layers turn the residual stream least, and could be left out?",
        ("layers.block_influence", "sequences.tokens"),
        f"""\
SELECT stack, layer,
  {_mean("block_influence", "tokens")}
FROM layers JOIN sequences USING (sequence_id) GROUP BY ALL ORDER BY block_influence NULLS LAST LIMIT 10""",
    ),
    Example(
        "longest-documents",
        "Which documents are the longest, and how many sequences are they?",
        ("documents.source", "documents.content_tokens", "documents.sequences"),
        "SELECT document_id, source, content_tokens, sequences FROM documents ORDER BY content_tokens DESC LIMIT 10",
    ),
    Example(
        "dropped-documents",
        "Which documents were not measured, and why?",
        ("documents.source", "documents.dropped_reason"),
        "SELECT document_id, source, dropped_reason FROM documents WHERE dropped_reason IS NOT NULL ORDER BY document_id",
    ),
    Example(
        "unusual-documents",
        "On which documents does attention differ most from the rest? Of each, the head that is furthest from its mean.",
        ("heads.entropy_nats", "heads.query_rows", "documents.source"),
        f"""\
WITH means AS (
  SELECT document_id, source, stack, layer, head, {_mean("entropy_nats")}
  FROM heads_named GROUP BY ALL
), scores AS (
  SELECT *, (entropy_nats - AVG(entropy_nats) OVER place) / STDDEV_POP(entropy_nats) OVER place AS deviations
  FROM means WINDOW place AS (PARTITION BY stack, layer, head)
)
SELECT document_id, source, MAX_BY('L' || layer || 'H' || head, ABS(deviations)) AS head_name,
  MAX_BY(deviations, ABS(deviations)) AS standard_deviations
FROM scores WHERE ISFINITE(deviations) GROUP BY ALL ORDER BY MAX(ABS(deviations)) DESC LIMIT 10""",
    ),
    Example(
        "one-head-on-one-document",
        "What does one head do in each window of one document?",
        (
            "heads.entropy_nats",
            "heads.distance_tokens",
            "heads.mass_first",
            "documents.source",
            "sequences.window",
            "sequences.tokens",
        ),
        """\
SELECT source, "window", tokens, head_name, entropy_nats, distance_tokens, mass_first
FROM heads_named JOIN sequences USING (sequence_id)
WHERE head_name = 'L0H0' AND heads_named.document_id = 0 ORDER BY stack, "window\"""",
    ),
)


def write_examples(location: Location | None, form: Format, stream: IO[Any]) -> None:
    """Write the examples: as text that is valid SQL (`table`), or as rows. With a dataset, also what it lacks for each.

    Raises OutputError if the stream does not take everything.
    """
    dataset = None if location is None else Dataset.open(location)
    if form == "table":
        text = "\n".join(_lines(dataset)) + "\n"
        write_whole([text.encode(getattr(stream, "encoding", None) or "utf-8", "backslashreplace")], stream)
    else:
        write_result(examples_table(dataset), form, stream)


def examples_table(dataset: Dataset | None = None) -> pa.Table:
    """The examples as rows of `name`, `answers`, `sql`; with a dataset also `lacks`, the columns that it does not have."""
    columns: dict[str, list] = {
        "name": [example.name for example in EXAMPLES],
        "answers": [example.answers for example in EXAMPLES],
        "sql": [example.sql for example in EXAMPLES],
    }
    if dataset is not None:
        columns["lacks"] = pa.array([example.lacks(dataset) for example in EXAMPLES], pa.list_(pa.string()))
    return pa.table(columns)


def _lines(dataset: Dataset | None) -> Iterator[str]:
    yield f"-- {len(EXAMPLES)} queries, each for: attlas query DIR SQL"
    for example in EXAMPLES:
        yield ""
        title = f"{example.name}: {example.answers}"
        yield from textwrap.wrap(title, _WIDTH, initial_indent="-- ", subsequent_indent="-- ")
        lacking = [] if dataset is None else example.lacks(dataset)
        if lacking:
            yield f"-- this dataset lacks {', '.join(lacking)}"
        yield f"{example.sql};"
