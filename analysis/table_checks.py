"""Checks of a table as a whole: its numbering, the counts in the manifest, and agreement with other tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import polars as pl
import polars.selectors as cs
import pyarrow as pa

from attlas.analysis.dataset import Dataset
from attlas.analysis.integrity import Finding
from attlas.analysis.manifest import section
from attlas.analysis.report.numbers import plural
from attlas.analysis.row_checks import scan_rows
from attlas.extract.store import MANIFEST, Part, generation_of, name_of, next_sequence, read_part
from attlas.extract.tables import TABLES, Agreement, Table

_ROUNDING = 1e-6  # of sums of squares, which differ by the order of their terms


def check_table(dataset: Dataset, table: Table, intact: Mapping[str, list[Part]]) -> Iterator[Finding]:
    """Check the table as a whole, and against other tables."""
    frame = scan_rows(dataset, intact[table.name])
    if table.counted_by is not None:
        yield from _check_numbering(dataset, table.name, table.counted_by, frame)
    yield from _check_corpus_totals(dataset, table, frame)
    for agreement in table.agreements:
        if is_intact(dataset, intact, agreement.table):
            yield from _check_agreement(dataset, table, agreement, intact)
    if (table.derive or table.conclude) and all(is_intact(dataset, intact, n) for n in dataset.tables if n in TABLES):
        for part in intact[table.name]:
            yield from _check_derived(dataset, table, part)


def _check_numbering(dataset: Dataset, table: str, key: str, frame: pl.LazyFrame) -> Iterator[Finding]:
    """Check that ids count up from 0; those of sequences leave out what later generations have lost."""
    has_gaps = key == "sequence_id" and generation_of(dataset.manifest) > 1
    rule = f"{key} does not count {'upwards' if has_gaps else '0, 1, 2, …'} over the parts"
    expected = pl.col(key).cum_max().clip(0) if has_gaps else pl.int_range(pl.len(), dtype=pl.Int64)
    bad, duplicates, last = (
        frame.select((pl.col(key) != expected).sum(), pl.len() - pl.col(key).n_unique(), last=pl.col(key).max())
        .collect()
        .row(0)
    )
    if bad or duplicates:
        yield Finding(table, "keys", f"{rule} ({plural(bad, 'row')} off)")
    if has_gaps and last is not None and last >= next_sequence(dataset.manifest):
        yield Finding(
            table, "keys", f"{key} is not below the manifest's next_sequence, {next_sequence(dataset.manifest)}"
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
    others = {_shard_name(part.path): part for part in intact[agreement.table]}
    for part in intact[table.name]:
        other = others.pop(_shard_name(part.path), None)
        if other is None:
            yield Finding(part.path, agreement.name, f"no {agreement.table} of the same shard")
        else:
            yield from _compare(dataset, agreement, [part], [other], part.path)
    for other in others.values():
        yield Finding(other.path, agreement.name, f"no {table.name} of the same shard")


def _shard_name(path: str) -> str:
    """The name that the parts of a shard have in common; a redacted one has a digest after it."""
    return name_of(path).partition(".")[0]


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


def _check_derived(dataset: Dataset, table: Table, part: Part) -> Iterator[Finding]:
    """Check that a part is what the other tables give: those of its shard, or all."""
    try:
        with np.errstate(all="ignore"):  # of damaged numbers
            derived = pl.from_arrow(_concluded(dataset, table) if table.conclude else _derived(dataset, table, part))
    except (IndexError, KeyError, ValueError):  # rows that do not belong together, which other checks name
        return
    assert isinstance(derived, pl.DataFrame), "a table has columns"
    expected = derived.lazy().with_columns(cs.categorical().cast(pl.String))
    keys = [c.name for c in table.keys]
    both = scan_rows(dataset, [part]).join(expected, on=keys, how="full", nulls_equal=True, suffix="|expected")
    is_same = pl.all_horizontal(_is_close(pl.col(c.name), pl.col(f"{c.name}|expected")) for c in table.facts)
    bad = both.select((~is_same.fill_null(False)).sum()).collect().item()
    if bad:
        yield Finding(part.path, "derived", f"other than what the rows it is made of give in {plural(bad, 'row')}")


def _derived(dataset: Dataset, table: Table, part: Part) -> pa.Table:
    """A part as it follows from the other parts of its shard."""
    assert table.derive is not None, "it is derived"
    shard = {
        name: read_part(dataset.storage, other)
        for name in dataset.tables
        if name in TABLES and TABLES[name].kind in ("plan", "dense")
        for other in dataset.parts(name)
        if _shard_name(other.path) == _shard_name(part.path)
    }
    columns = {
        name: [c for c in dataset.table(name).facts if c.name in rows.column_names] for name, rows in shard.items()
    }
    return table.derive(shard, columns, shard=shard["sequences"]["shard"][0].as_py())


def _concluded(dataset: Dataset, table: Table) -> pa.Table:
    """A part as it follows from the parts of all shards."""
    assert table.conclude is not None, "it is concluded"

    def parts_of(name: str) -> Iterator[pa.Table]:
        return (read_part(dataset.storage, part) for part in (dataset.parts(name) if name in dataset.tables else ()))

    return table.conclude(parts_of)


def _is_close(this: pl.Expr, that: pl.Expr) -> pl.Expr:
    return (this - that).abs() <= _ROUNDING * pl.max_horizontal(this.abs(), that.abs(), pl.lit(1.0))


def is_intact(dataset: Dataset, intact: Mapping[str, list[Part]], table: str) -> bool:
    """Whether the table has parts and all of them are intact."""
    parts = dataset.parts(table) if table in dataset.tables else []
    return bool(parts) and len(intact.get(table, [])) == len(parts)
