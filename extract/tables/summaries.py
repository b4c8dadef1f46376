"""`summaries`: of every statistic, the sums over documents from which its mean and interval follow, shard by shard.

Made of a shard's other tables. Sums of shards merge by addition (`document_sums.py` says how), so an analysis of any number of
shards reads this small table instead of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from attlas.extract.tables import heads, layers, residual
from attlas.extract.tables.column import Column
from attlas.extract.tables.document_sums import (
    HEAVY_SHARE,
    POOLED,
    SUMS,
    documents_listed,
    run_numbers,
    run_starts,
    sum_documents,
)
from attlas.extract.tables.table import DOCUMENT_ID, HEAD, LAYER, SHARD, STACK, Rule, Table

_SUMMARIZED = (heads.TABLE, residual.TABLE, layers.TABLE)
_PLACE = {"stack": pa.string(), "layer": pa.int16(), "head": pa.int16(), "site": pa.string()}


def summarize_shard(tables: Mapping[str, pa.Table], columns: Mapping[str, Sequence[Column]], *, shard: int) -> pa.Table:
    """The rows of a shard, made of its tables. `columns`: what was measured of each."""
    sequences, documents = tables["sequences"], tables["documents"]
    sequences_of = dict(zip(documents["document_id"].to_pylist(), documents["sequences"].to_pylist(), strict=True))
    listed = documents_listed(_numbers(sequences["document_id"]), _numbers(sequences["tokens"]), sequences_of)
    parts = [
        _summarize(tables[table.name], table, [c.name for c in columns[table.name] if c.is_averaged], sequences, listed)
        for table in _SUMMARIZED
        if table.name in tables
    ]
    rows = pa.concat_tables(parts).sort_by([(name, "ascending") for name in TABLE.order])
    rows = rows.add_column(0, "shard", pa.array(np.full(len(rows), shard)))
    return rows.select(TABLE.schema().names).cast(TABLE.schema())


def _summarize(rows: pa.Table, table: Table, names: Sequence[str], sequences: pa.Table, listed: np.ndarray) -> pa.Table:
    """The summaries of columns of a table. Its rows are sorted by place."""
    firsts = run_starts(*(_codes(rows[name]) for name in table.places))
    sums = sum_documents(
        {name: _numbers(rows[name]) for name in names},
        weights_of(rows, table, sequences),
        run_numbers(firsts, len(rows)),
        _numbers(rows["document_id"]),
        listed=listed,
    )
    keys = rows.select(list(table.places)).take(firsts[sums.place])
    columns = {
        name: keys[name].cast(kind) if name in table.places else pa.nulls(len(keys), kind)
        for name, kind in _PLACE.items()
    }
    columns["column"] = pa.array(names, pa.string()).take(pa.array(sums.column))
    columns["document_id"] = pa.array(sums.document, pa.int64(), mask=sums.document == POOLED)
    return pa.table(columns | {name: pa.array(getattr(sums, name)) for name in SUMS})


def weights_of(rows: pa.Table, table: Table, sequences: pa.Table) -> np.ndarray:
    """What each row weighs in means: a column of the table itself, or of its sequence."""
    if table.weight in rows.column_names:
        return _numbers(rows[table.weight])
    places = np.searchsorted(_numbers(sequences["sequence_id"]), _numbers(rows["sequence_id"]))
    return _numbers(sequences[table.weight])[places]


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Values, NaN where null."""
    return column.to_numpy()


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    return (array if pa.types.is_dictionary(array.type) else array.dictionary_encode()).indices.to_numpy()


def _sum(name: str, formula: str, meaning: str = "", *, low: float | None = 0) -> Column:
    return Column(name=name, dtype="float64", formula=formula, meaning=meaning, bounds=(low, None))


SUM_KEYS = (
    STACK,
    LAYER,
    replace(HEAD, nullable=True, formula=f"{HEAD.formula}; null for columns of `residual` and `layers`"),
    Column(
        name="site",
        dtype="stack",
        formula=f"{residual.SITE.formula}; null for columns of `heads` and `layers`",
        nullable=True,
    ),
    Column(name="column", dtype="string", formula="the statistic: a column of `heads`, `residual` or `layers`"),
    replace(
        DOCUMENT_ID,
        nullable=True,
        formula="number of a document that is listed by itself; null for the other documents together",
    ),
)
SUM_ORDER = tuple(column.name for column in SUM_KEYS)
SUM_FACTS = (
    Column(
        name="documents",
        dtype="int64",
        formula="number of documents that have a value",
        bounds=(1, None),
    ),
    _sum("weight", "Σ_d W_d, W_d = Σ w over the rows of document d that have a value", "Rows that the mean is over."),
    _sum("mean", "θ = Σ_d Y_d ÷ Σ_d W_d, Y_d = Σ w·y", "The row-weighted mean.", low=None),
    _sum("deviation_squares", "Σ_d (Y_d − θ W_d)²", "How much documents differ."),
    _sum("deviation_products", "Σ_d (Y_d − θ W_d) W_d", low=None),
    _sum("weight_squares", "Σ_d W_d²", "How unequal documents are: they count as (Σ W_d)² ÷ Σ W_d²."),
)


SUM_EXAMPLE = (
    'SELECT stack, layer, head, "column", SUM(weight * mean) / SUM(weight) AS mean, SUM(weight) AS rows '
    "FROM {table} WHERE head IS NOT NULL GROUP BY ALL ORDER BY ALL LIMIT 5"
)
SUM_RULES = (
    Rule("weights", "weight <= 0", "a weight is not above 0"),
    Rule("documents", "document_id IS NOT NULL AND documents <> 1", "a listed document counts as several"),
    Rule(
        "documents",
        "weight_squares > weight * weight * 1.0000001 OR weight_squares * documents * 1.0000001 < weight * weight",
        "squared weights that no documents of this number and weight have",
    ),
    Rule("places", "head IS NOT NULL AND site IS NOT NULL", "both a head and a site"),
)

TABLE = Table(
    name="summaries",
    row="shard × stack × layer × head or site × column × listed document",
    kind="additive",
    is_newer=True,
    derive=summarize_shard,
    keys=(SHARD, *SUM_KEYS),
    facts=SUM_FACTS,
    order=SUM_ORDER,
    example=SUM_EXAMPLE,
    rules=SUM_RULES,
    notes=f"""\
w is `query_rows` for columns of `heads` and the sequence's `tokens` for those of `residual` and `layers`. A document is listed by
itself if it has sequences in another shard too, or at least a {1 / HEAVY_SHARE:.0f}th of the shard's tokens; for it the deviations
are 0. Rows merge by addition: with any θ', Σ (Y − θ' W)² = deviation_squares − 2 (θ' − θ) deviation_products +
(θ' − θ)² weight_squares, and parts of a listed document add their weights and weight · mean before they are squared. From
that the analyses work out the jackknife's standard error.""",
)
