"""Checks of a table as a whole: its numbering, the counts in the manifest, and agreement with other tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.integrity import Finding
from attlas.analysis.manifest import section
from attlas.analysis.report.numbers import plural
from attlas.analysis.row_checks import scan_rows
from attlas.extract.store import MANIFEST, Part, name_of
from attlas.extract.tables import Agreement, Table


def check_table(dataset: Dataset, table: Table, intact: Mapping[str, list[Part]]) -> Iterator[Finding]:
    """Check the table as a whole, and against other tables."""
    frame = scan_rows(dataset, intact[table.name])
    if table.counted_by is not None:
        yield from _check_numbering(table.name, table.counted_by, frame)
    yield from _check_corpus_totals(dataset, table, frame)
    for agreement in table.agreements:
        if is_intact(dataset, intact, agreement.table):
            yield from _check_agreement(dataset, table, agreement, intact)


def _check_numbering(table: str, key: str, frame: pl.LazyFrame) -> Iterator[Finding]:
    facts = frame.select(
        bad=(pl.col(key) != pl.int_range(pl.len(), dtype=pl.Int64)).sum(), duplicates=pl.len() - pl.col(key).n_unique()
    ).collect()
    if facts["bad"][0] or facts["duplicates"][0]:
        yield Finding(
            table, "keys", f"{key} does not count 0, 1, 2, … over the parts ({plural(facts['bad'][0], 'row')} off)"
        )


def _check_corpus_totals(dataset: Dataset, table: Table, frame: pl.LazyFrame) -> Iterator[Finding]:
    """Check counts of the corpus in the manifest against the table's rows."""
    if not table.totals:
        return
    corpus = section(dataset.manifest, "corpus")
    counts = frame.select(pl.sql_expr(sql).cast(pl.Int64).alias(name) for name, sql in table.totals.items()).collect()
    for name in table.totals:
        if corpus.get(name) not in (None, counts[name][0]):
            yield Finding(
                MANIFEST, "corpus", f"{name}: {corpus[name]} in the manifest, {counts[name][0]} in the tables"
            )


def _check_agreement(
    dataset: Dataset, table: Table, agreement: Agreement, intact: Mapping[str, list[Part]]
) -> Iterator[Finding]:
    """Check that two tables agree: shard by shard if they are written by shard, else over all rows."""
    if table.kind == "plan":
        yield from _compare(
            dataset, agreement, intact[table.name], intact[agreement.table], f"{table.name}, {agreement.table}"
        )
        return
    others = {name_of(part.path): part for part in intact[agreement.table]}
    for part in intact[table.name]:
        other = others.pop(name_of(part.path), None)
        if other is None:
            yield Finding(part.path, agreement.name, f"no {agreement.table} of the same shard")
        else:
            yield from _compare(dataset, agreement, [part], [other], part.path)
    for other in others.values():
        yield Finding(other.path, agreement.name, f"no {table.name} of the same shard")


def _compare(
    dataset: Dataset, agreement: Agreement, these: list[Part], those: list[Part], where: str
) -> Iterator[Finding]:
    by = list(agreement.by)
    this, that = (scan_rows(dataset, parts).filter(pl.sql_expr(agreement.only)) for parts in (these, those))
    this = this.filter(pl.sql_expr(agreement.where))
    if agreement.optional and this.select(pl.len() == 0).collect().item():
        return
    this = this.group_by(by).agg(this=pl.sql_expr(agreement.this))
    that = that.group_by(by).agg(that=pl.sql_expr(agreement.that))
    both = that.join(this, on=by, how="full", coalesce=True).select(
        this=pl.col("this").cast(pl.Float64).fill_null(0), that=pl.col("that").cast(pl.Float64)
    )
    slack = agreement.tolerance * pl.max_horizontal(pl.col("that").abs(), pl.lit(1.0))
    agrees = (pl.col("this") - pl.col("that")).abs() <= slack
    bad = both.select((~agrees.fill_null(False)).sum()).collect(engine="streaming").item()
    if bad:
        yield Finding(where, agreement.name, f"{agreement.message}: {bad}")


def is_intact(dataset: Dataset, intact: Mapping[str, list[Part]], table: str) -> bool:
    """Whether the table has parts and all of them are intact."""
    parts = dataset.parts(table) if table in dataset.tables else []
    return bool(parts) and len(intact.get(table, [])) == len(parts)
