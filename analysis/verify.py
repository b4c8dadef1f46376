"""Verification of a dataset against its manifest, its schema and the rules of its tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import polars as pl
import polars.selectors as cs
import pyarrow as pa

from attlas.analysis.dataset import Dataset
from attlas.analysis.integrity import Finding as Finding
from attlas.analysis.integrity import check_file, check_row_counts, find_stray_files
from attlas.analysis.manifest import section
from attlas.analysis.parts import first_line
from attlas.analysis.report.numbers import plural
from attlas.analysis.scanning import scan_parts
from attlas.extract.store import MANIFEST, Location, Part, name_of
from attlas.extract.tables import TABLES, Agreement, Table

BOUND_TOLERANCE = 1e-4  # of float32 means; relative to bounds beyond ±1
_ROW = "|row"
# a panic in Polars' Rust code is not a subclass of Exception
READING_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, OSError, MemoryError)
_SHARD = re.compile(r"shard-(\d+)\.parquet$")


@dataclass(frozen=True)
class Check:
    """A rule for rows; `bad` selects the rows that break it."""

    name: str
    bad: pl.Expr
    message: str


def verify(location: Location) -> list[Finding]:
    """All problems of a dataset; an empty list if there are none. Raises Refusal if there is no dataset."""
    return findings_in(Dataset.open(location))


def findings_in(dataset: Dataset) -> list[Finding]:
    """All problems of an open dataset."""
    findings = list(find_stray_files(dataset))
    always = [table.name for table in TABLES.values() if table.is_always_written]
    missing = [table for table in always if table not in dataset.tables]
    if missing:
        findings.append(
            Finding(MANIFEST, "tables", f"every dataset has {', '.join(always)}; {', '.join(missing)} missing")
        )
    intact: dict[str, list[Part]] = {table: [] for table in always}
    for table in dataset.tables:
        findings += check_row_counts(dataset, table)
        for part in dataset.parts(table):  # raises Refusal for parts outside the dataset
            problems = list(check_file(dataset, table, part))
            findings += problems
            if not problems:
                intact.setdefault(table, []).append(part)
    return findings + list(_check_rows(dataset, intact))


# --- rows ----------------------------------------------------------------------------------------------------------


def _check_rows(dataset: Dataset, intact: Mapping[str, list[Part]]) -> Iterator[Finding]:
    """Check the rows of the parts whose files are intact."""
    sequences_are_intact = all(_is_intact(dataset, intact, table) for table in ("documents", "sequences"))
    sequences = _scan(dataset, intact["sequences"]) if sequences_are_intact else None
    for name, parts in intact.items():
        if name not in TABLES:
            continue
        for part in parts:
            yield from _catch_read_errors(part.path, _check_part(dataset, TABLES[name], part, sequences))
        if _is_intact(dataset, intact, name):
            yield from _catch_read_errors(name, _check_table(dataset, TABLES[name], intact))


def _catch_read_errors(part: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield the findings; an error while reading the rows becomes a finding too."""
    try:
        yield from findings
    except READING_ERRORS as error:
        yield Finding(part, "unreadable", first_line(error))


def _is_intact(dataset: Dataset, intact: Mapping[str, list[Part]], table: str) -> bool:
    """Whether the table has parts and all of them are intact."""
    parts = dataset.parts(table) if table in dataset.tables else []
    return bool(parts) and len(intact.get(table, [])) == len(parts)


def _scan(dataset: Dataset, parts: Iterable[Part]) -> pl.LazyFrame:
    return scan_parts(dataset.storage, parts).with_columns(cs.categorical().cast(pl.String))


def _check_part(dataset: Dataset, table: Table, part: Part, sequences: pl.LazyFrame | None) -> Iterator[Finding]:
    frame = _scan(dataset, [part])
    checks = [*_value_checks(table, frame), *_order_checks(table, frame)]
    is_per_sequence = "sequence_id" in table.schema().names and table.kind != "plan"
    yield from _violations(
        part, frame.with_row_index(_ROW), checks + ([] if is_per_sequence else _rule_checks(table, frame))
    )
    if sequences is None:
        return
    match = _SHARD.search(part.path)
    shard = int(match.group(1)) if match else -1
    planned = sequences.filter(pl.col("shard") == shard)
    if is_per_sequence:
        frame = _with_sequence(dataset, frame, planned)
        yield from _violations(part, frame, [*_sequence_checks(dataset, table, frame), *_rule_checks(table, frame)])
        if table.kind == "dense":
            yield from _check_completeness(dataset, table, part, frame, planned)
    elif "shard" in table.schema().names:
        yield from _violations(part, frame, [Check("shard", pl.col("shard") != shard, f"a shard other than {shard}")])


def _violations(part: Part, frame: pl.LazyFrame, checks: list[Check]) -> Iterator[Finding]:
    """Findings on the rows that break each rule, counted in one pass."""
    counts = frame.select(
        pl.len().alias("rows"), *(c.bad.fill_null(False).sum().alias(str(i)) for i, c in enumerate(checks))
    ).collect(engine="streaming")
    for i, check in enumerate(checks):
        bad = counts[str(i)][0]
        if bad:
            rows = counts["rows"][0]
            yield Finding(part.path, check.name, f"{check.message} in {bad} of {plural(rows, 'row')}")


def _value_checks(table: Table, frame: pl.LazyFrame) -> list[Check]:
    """Checks for nulls, NaN, infinities and numeric bounds."""
    present = set(frame.collect_schema().names())
    checks = []
    for column in (c for c in table.columns if c.name in present):
        name = column.name
        if (
            column in table.keys
            and column.bounds == (None, None)
            and column.dtype.startswith("int")
            and not column.signed
        ):
            checks.append(Check("bounds", pl.col(name) < 0, f"{name} is below 0"))
        if not column.nullable:
            checks.append(Check("null", pl.col(name).is_null(), f"{name} is null, which the contract rules out"))
        if column.dtype in ("float32", "float64"):
            checks.append(Check("not finite", ~pl.col(name).is_finite(), f"{name} is NaN or infinite"))
        low, high = column.bounds
        exact = column.dtype not in ("float32", "float64")
        if isinstance(low, (int, float)):
            checks.append(_bound(name, pl.lit(float(low)), "below", f"{low:g}", exact=exact))
        if isinstance(high, (int, float)):
            checks.append(_bound(name, pl.lit(float(high)), "above", f"{high:g}", exact=exact))
    return checks


def _bound(name: str, bound: pl.Expr, side: str, text: str, *, exact: bool) -> Check:
    slack = pl.lit(0.0) if exact else BOUND_TOLERANCE * pl.max_horizontal(bound.abs(), pl.lit(1.0))
    value = pl.col(name).cast(pl.Float64)
    bad = value < bound - slack if side == "below" else value > bound + slack
    return Check("bounds", bad, f"{name} is {side} {text}")


def _order_checks(table: Table, frame: pl.LazyFrame) -> list[Check]:
    """Checks that keys are unique and rows sorted; names (stack, site, profile) may come in any order, each in a single run."""
    keys = [c.name for c in table.keys]
    schema = frame.collect_schema()
    unsorted, same = pl.lit(False), pl.lit(True)
    for i, name in enumerate(table.order):
        changed = pl.col(name) != pl.col(name).shift(1)
        if schema[name] == pl.String:
            # a run of a name that has already occurred under the same leading columns
            again = pl.col(_ROW) > pl.col(_ROW).min().over(table.order[: i + 1])
            unsorted = unsorted | (same & changed & again)
        else:
            unsorted = unsorted | (same & (pl.col(name) < pl.col(name).shift(1)))
        same = same & ~changed
    return [
        Check("keys", pl.struct(keys).is_duplicated(), f"the same {' × '.join(keys)} again"),
        Check("order", unsorted, f"not sorted by {', '.join(table.order)}"),
    ]


def _with_sequence(dataset: Dataset, frame: pl.LazyFrame, planned: pl.LazyFrame) -> pl.LazyFrame:
    """Add the columns of the sequence that rules may use: `n`, its number of tokens, and `of_tokens`."""
    facts = planned.select("sequence_id", n=pl.col("tokens").cast(pl.Float64), of=pl.col("document_id"))
    return frame.join(facts, on="sequence_id", how="left").with_columns(of_tokens=_is_of_tokens(dataset))


def _sequence_checks(dataset: Dataset, table: Table, frame: pl.LazyFrame) -> list[Check]:
    return [
        Check("links", pl.col("n").is_null(), "a sequence that is not one of the shard's"),
        Check("links", pl.col("of") != pl.col("document_id"), "another document than the sequence's own"),
        *_symbolic_bounds(dataset, table, frame.collect_schema().names()),
    ]


def _symbolic_bounds(dataset: Dataset, table: Table, present: Collection[str]) -> list[Check]:
    """Bounds in terms of the sequence's length n and the stream's width d, for stacks whose queries and keys are tokens."""
    of_tokens = pl.col("of_tokens")  # a stack that merges tokens changes its width too
    n = pl.when(of_tokens).then(pl.col("n"))
    outcomes = pl.lit(0.0)
    if table.outcome is not None and table.outcome in present:
        outcomes = pl.col(table.outcome).is_not_null().cast(pl.Float64)
    width = section(dataset.manifest, "model").get("width")
    d = pl.when(of_tokens).then(float(width)) if isinstance(width, int) else pl.lit(None, dtype=pl.Float64)
    symbols = {
        "n": n,
        "n−1": n - 1,
        "−(n−1)": 1 - n,
        "1/n": pl.when(outcomes == 0).then(1 / n),
        "ln n": (n + outcomes).log(),
        "d": d,
        "d−1": d - 1,
        "√d": d.sqrt(),
    }
    checks = []
    for column in (c for c in table.facts if c.name in present):
        exact = column.dtype not in ("float32", "float64")
        for bound, side in zip(column.bounds, ("below", "above"), strict=True):
            if isinstance(bound, str) and bound in symbols:
                checks.append(_bound(column.name, symbols[bound], side, bound, exact=exact))
    return checks


def _is_of_tokens(dataset: Dataset) -> pl.Expr:
    """Whether queries and keys are the tokens of the sequence, not windows, pooled states or latents."""
    stacks = section(dataset.manifest, "model").get("stacks") or []
    return pl.col("stack").is_in([stack["stack"] for stack in stacks if stack.get("of_tokens")])


def _check_completeness(
    dataset: Dataset, table: Table, part: Part, frame: pl.LazyFrame, planned: pl.LazyFrame
) -> Iterator[Finding]:
    """Check that every sequence of the shard has a row for every head (or site) of the model."""
    counts = frame.select(
        rows=pl.len(), sequences=pl.col("sequence_id").n_unique(), places=pl.struct(table.places).n_unique()
    ).collect(engine="streaming")
    rows, with_rows, distinct = counts.row(0)
    expected = planned.select(pl.len()).collect().item()
    if with_rows != expected:
        yield Finding(part.path, "row count", f"{plural(expected, 'sequence')} in the shard, rows of {with_rows}")
    if rows != with_rows * distinct:
        product = f"{plural(with_rows, 'sequence')} × {plural(distinct, 'place')}"
        yield Finding(part.path, "row count", f"{product}, but {plural(rows, 'row')}")
    layers = section(dataset.manifest, "model", "layout").get("attention") or []
    heads = [layer.get("heads") for layer in layers]
    if "head" in table.places and layers and None not in heads and distinct != sum(heads):
        in_model = f"{plural(sum(heads), 'head')} in {plural(len(layers), 'layer')} of the model"
        yield Finding(part.path, "row count", f"{in_model}, {plural(distinct, 'head')} in the part")


# --- the rules of the tables ---------------------------------------------------------------------------------------


def _rule_checks(table: Table, frame: pl.LazyFrame) -> list[Check]:
    """The table's rules whose columns are all present."""
    present = set(frame.collect_schema().names())
    rules = [(rule, pl.sql_expr(rule.wrong)) for rule in table.rules]
    return [Check(r.name, wrong, r.message) for r, wrong in rules if set(wrong.meta.root_names()) <= present]


def _check_table(dataset: Dataset, table: Table, intact: Mapping[str, list[Part]]) -> Iterator[Finding]:
    """Check the table as a whole, and against other tables."""
    frame = _scan(dataset, intact[table.name])
    if table.counted_by is not None:
        yield from _check_numbering(table.name, table.counted_by, frame)
    yield from _check_corpus_totals(dataset, table, frame)
    for agreement in table.agreements:
        if _is_intact(dataset, intact, agreement.table):
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
    this, that = (_scan(dataset, parts).filter(pl.sql_expr(agreement.only)) for parts in (these, those))
    this = this.filter(pl.sql_expr(agreement.where)).group_by(by).agg(this=pl.sql_expr(agreement.this))
    that = that.group_by(by).agg(that=pl.sql_expr(agreement.that))
    both = that.join(this, on=by, how="full", coalesce=True).select(
        this=pl.col("this").cast(pl.Float64).fill_null(0), that=pl.col("that").cast(pl.Float64)
    )
    slack = agreement.tolerance * pl.max_horizontal(pl.col("that").abs(), pl.lit(1.0))
    agrees = (pl.col("this") - pl.col("that")).abs() <= slack
    bad = both.select((~agrees.fill_null(False)).sum()).collect(engine="streaming").item()
    if bad:
        yield Finding(where, agreement.name, f"{agreement.message}: {bad}")
