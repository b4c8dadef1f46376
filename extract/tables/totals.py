"""`totals`: the sums of `summaries` over all shards, written once when these are done.

From them the mean and interval of every statistic follow without reading anything else, however large the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa

from attlas.extract.tables.merged_sums import TOTAL_SHARE, MergedSums, listed_in_total
from attlas.extract.tables.summaries import SUM_EXAMPLE, SUM_FACTS, SUM_KEYS, SUM_ORDER, SUM_RULES
from attlas.extract.tables.table import Table


def add_up_shards(parts: Callable[[str], Iterator[pa.Table]]) -> pa.Table:
    """The rows, made of the parts of other tables in the order of shards."""
    sequences_of: dict[int, int] = {}
    for documents in parts("documents"):
        sequences_of |= zip(documents["document_id"].to_pylist(), documents["sequences"].to_pylist(), strict=True)
    shards = ((rows["document_id"].to_numpy(), rows["tokens"].to_numpy()) for rows in parts("sequences"))
    merged = MergedSums([name for name in SUM_ORDER if name != "document_id"], listed_in_total(shards, sequences_of))
    schema = TABLE.schema()
    merged.add(schema.empty_table())
    for rows in parts("summaries"):
        merged.add(rows)
    return merged.to_arrow().select(schema.names).cast(schema)


TABLE = Table(
    name="totals",
    row="stack × layer × head or site × column × listed document",
    kind="additive",
    is_newer=True,
    conclude=add_up_shards,
    keys=SUM_KEYS,
    facts=SUM_FACTS,
    order=SUM_ORDER,
    example=SUM_EXAMPLE,
    rules=SUM_RULES,
    notes=f"""\
The same sums as in `summaries`, over all shards, in a single part. Documents that lie in several shards are put together; those
that `summaries` lists and that have at least a {1 / TOTAL_SHARE:.0f}th of all tokens stay by themselves, since leaving one of them out
changes the weight of all others noticeably.""",
)
