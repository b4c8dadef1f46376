"""Is a dataset what its manifest and its schema say? Every part that is wrong is named, with what is wrong in it."""

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

BOUND_TOLERANCE = 1e-4  # of float32 means, relative beyond 1
_ROW = "|row"
# Polars panics, outside of Exception, where Rust code meets what it holds to be impossible
READING_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, OSError, MemoryError)
_SHARD = re.compile(r"shard-(\d+)\.parquet$")


@dataclass(frozen=True)
class Check:
    """A rule that rows keep; `bad` marks the rows that break it."""

    name: str
    bad: pl.Expr
    message: str


def verify(location: Location) -> list[Finding]:
    """Everything that is wrong with a dataset; an empty list for a sound one. Refusal where there is no dataset."""
    return findings_in(Dataset.open(location))


def findings_in(dataset: Dataset) -> list[Finding]:
    """Everything that is wrong with an open dataset."""
    findings = list(find_stray_files(dataset))
    always = [table.name for table in TABLES.values() if table.is_always_written]
    lacking = [table for table in always if table not in dataset.tables]
    if lacking:
        findings.append(
            Finding(MANIFEST, "tables", f"every dataset has {', '.join(always)}; {', '.join(lacking)} missing")
        )
    sound: dict[str, list[Part]] = {table: [] for table in always}
    for table in dataset.tables:
        findings += check_row_counts(dataset, table)
        for part in dataset.parts(table):  # refuses parts outside the dataset
            wrong = list(check_file(dataset, table, part))
            findings += wrong
            if not wrong:
                sound.setdefault(table, []).append(part)
    return findings + list(_contents(dataset, sound))


# --- rows ----------------------------------------------------------------------------------------------------------


def _contents(dataset: Dataset, sound: Mapping[str, list[Part]]) -> Iterator[Finding]:
    """Checks of the rows of the parts whose files are sound."""
    linked = all(_whole(dataset, sound, table) for table in ("documents", "sequences"))
    sequences = _scan(dataset, sound["sequences"]) if linked else None
    for name, parts in sound.items():
        if name not in TABLES:
            continue
        for part in parts:
            yield from _readable(part.path, _part_findings(dataset, TABLES[name], part, sequences))
        if _whole(dataset, sound, name):
            yield from _readable(name, _whole_findings(dataset, TABLES[name], sound))


def _readable(part: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings; one more where the rows can't be read to the end, whatever the reader raises of them."""
    try:
        yield from findings
    except READING_ERRORS as error:
        yield Finding(part, "unreadable", first_line(error))


def _whole(dataset: Dataset, sound: Mapping[str, list[Part]], table: str) -> bool:
    parts = dataset.parts(table) if table in dataset.tables else []
    return bool(parts) and len(sound.get(table, [])) == len(parts)


def _scan(dataset: Dataset, parts: Iterable[Part]) -> pl.LazyFrame:
    return scan_parts(dataset.storage, parts).with_columns(cs.categorical().cast(pl.String))


def _part_findings(dataset: Dataset, table: Table, part: Part, sequences: pl.LazyFrame | None) -> Iterator[Finding]:
    frame = _scan(dataset, [part])
    checks = [*_value_checks(table, frame), *_order_checks(table, frame)]
    of_sequences = "sequence_id" in table.schema().names and table.kind != "plan"
    yield from _broken(part, frame.with_row_index(_ROW), checks + ([] if of_sequences else _rule_checks(table, frame)))
    if sequences is None:
        return
    match = _SHARD.search(part.path)
    shard = int(match.group(1)) if match else -1
    own = sequences.filter(pl.col("shard") == shard)
    if of_sequences:
        frame = _with_sequence(dataset, frame, own)
        yield from _broken(part, frame, [*_sequence_checks(dataset, table, frame), *_rule_checks(table, frame)])
        if table.kind == "dense":
            yield from _rectangle(dataset, table, part, frame, own)
    elif "shard" in table.schema().names:
        yield from _broken(part, frame, [Check("shard", pl.col("shard") != shard, f"a shard other than {shard}")])


def _broken(part: Part, frame: pl.LazyFrame, checks: list[Check]) -> Iterator[Finding]:
    """Count the rows that break each rule, all in one pass."""
    counts = frame.select(
        pl.len().alias("rows"), *(c.bad.fill_null(False).sum().alias(str(i)) for i, c in enumerate(checks))
    ).collect(engine="streaming")
    for i, check in enumerate(checks):
        bad = counts[str(i)][0]
        if bad:
            rows = counts["rows"][0]
            yield Finding(part.path, check.name, f"{check.message} in {bad} of {plural(rows, 'row')}")


def _value_checks(table: Table, frame: pl.LazyFrame) -> list[Check]:
    """Nulls, NaN and infinities, and bounds that are numbers."""
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
    """Sorted by the table's order, keys unique. Names (stack, site, profile) may come in any order, each in one run."""
    keys = [c.name for c in table.keys]
    schema = frame.collect_schema()
    misplaced, same = pl.lit(False), pl.lit(True)
    for i, name in enumerate(table.order):
        changed = pl.col(name) != pl.col(name).shift(1)
        if schema[name] == pl.String:
            # a run of a name that begins after the name was seen already under the same leading columns
            again = pl.col(_ROW) > pl.col(_ROW).min().over(table.order[: i + 1])
            misplaced = misplaced | (same & changed & again)
        else:
            misplaced = misplaced | (same & (pl.col(name) < pl.col(name).shift(1)))
        same = same & ~changed
    return [
        Check("keys", pl.struct(keys).is_duplicated(), f"the same {' × '.join(keys)} again"),
        Check("order", misplaced, f"not sorted by {', '.join(table.order)}"),
    ]


def _with_sequence(dataset: Dataset, frame: pl.LazyFrame, own: pl.LazyFrame) -> pl.LazyFrame:
    """Rows with what rules may use of their sequence: `n`, its tokens, and `of_tokens`."""
    facts = own.select("sequence_id", n=pl.col("tokens").cast(pl.Float64), of=pl.col("document_id"))
    return frame.join(facts, on="sequence_id", how="left").with_columns(of_tokens=_is_of_tokens(dataset))


def _sequence_checks(dataset: Dataset, table: Table, frame: pl.LazyFrame) -> list[Check]:
    return [
        Check("links", pl.col("n").is_null(), "a sequence that is not one of the shard's"),
        Check("links", pl.col("of") != pl.col("document_id"), "another document than the sequence's own"),
        *_symbolic_bounds(dataset, table, frame.collect_schema().names()),
    ]


def _symbolic_bounds(dataset: Dataset, table: Table, present: Collection[str]) -> list[Check]:
    """Bounds in terms of the sequence's length n and the stream's width d; only where n counts keys and queries."""
    known = pl.col("of_tokens")  # what merges tokens changes its width as well
    n = pl.when(known).then(pl.col("n"))
    outcomes = pl.lit(0.0)
    if table.outcome is not None and table.outcome in present:
        outcomes = pl.col(table.outcome).is_not_null().cast(pl.Float64)
    width = section(dataset.manifest, "model").get("width")
    d = pl.when(known).then(float(width)) if isinstance(width, int) else pl.lit(None, dtype=pl.Float64)
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
    """Whether queries and keys are the tokens of the sequence; windows, pooled states and latents are others."""
    stacks = section(dataset.manifest, "model").get("stacks") or []
    return pl.col("stack").is_in([stack["stack"] for stack in stacks if stack.get("of_tokens")])


def _rectangle(dataset: Dataset, table: Table, part: Part, frame: pl.LazyFrame, own: pl.LazyFrame) -> Iterator[Finding]:
    """Every sequence of the shard has every head (or site), as many as the model has."""
    found = frame.select(
        rows=pl.len(), sequences=pl.col("sequence_id").n_unique(), places=pl.struct(table.places).n_unique()
    ).collect(engine="streaming")
    rows, with_rows, distinct = found.row(0)
    planned = own.select(pl.len()).collect().item()
    if with_rows != planned:
        planned = plural(planned, "sequence")
        yield Finding(part.path, "row count", f"{planned} in the shard, rows of {with_rows}")
    if rows != with_rows * distinct:
        places_of_each = f"{plural(with_rows, 'sequence')} × {plural(distinct, 'place')}"
        yield Finding(part.path, "row count", f"{places_of_each}, but {plural(rows, 'row')}")
    layers = section(dataset.manifest, "model", "layout").get("attention") or []
    heads = [layer.get("heads") for layer in layers]
    if "head" in table.places and layers and None not in heads and distinct != sum(heads):
        of_model = f"{plural(sum(heads), 'head')} in {plural(len(layers), 'layer')} of the model"
        yield Finding(part.path, "row count", f"{of_model}, {plural(distinct, 'head')} in the part")


# --- the tables' own rules -----------------------------------------------------------------------------------------


def _rule_checks(table: Table, frame: pl.LazyFrame) -> list[Check]:
    """The table's rules, as far as the columns that they are about are there."""
    present = set(frame.collect_schema().names())
    rules = [(rule, pl.sql_expr(rule.wrong)) for rule in table.rules]
    return [Check(r.name, wrong, r.message) for r, wrong in rules if set(wrong.meta.root_names()) <= present]


def _whole_findings(dataset: Dataset, table: Table, sound: Mapping[str, list[Part]]) -> Iterator[Finding]:
    """What is wrong with the table as a whole, or against another one."""
    frame = _scan(dataset, sound[table.name])
    if table.counted_by is not None:
        yield from _numbering(table.name, table.counted_by, frame)
    yield from _corpus_totals(dataset, table, frame)
    for agreement in table.agreements:
        if _whole(dataset, sound, agreement.table):
            yield from _disagreements(dataset, table, agreement, sound)


def _numbering(table: str, key: str, frame: pl.LazyFrame) -> Iterator[Finding]:
    facts = frame.select(
        bad=(pl.col(key) != pl.int_range(pl.len(), dtype=pl.Int64)).sum(), duplicates=pl.len() - pl.col(key).n_unique()
    ).collect()
    if facts["bad"][0] or facts["duplicates"][0]:
        yield Finding(
            table, "keys", f"{key} does not count 0, 1, 2, … over the parts ({plural(facts['bad'][0], 'row')} off)"
        )


def _corpus_totals(dataset: Dataset, table: Table, frame: pl.LazyFrame) -> Iterator[Finding]:
    """Facts of the corpus in the manifest against what the table's rows come to."""
    if not table.totals:
        return
    corpus = section(dataset.manifest, "corpus")
    counts = frame.select(pl.sql_expr(sql).cast(pl.Int64).alias(name) for name, sql in table.totals.items()).collect()
    for name in table.totals:
        if corpus.get(name) not in (None, counts[name][0]):
            yield Finding(
                MANIFEST, "corpus", f"{name}: {corpus[name]} in the manifest, {counts[name][0]} in the tables"
            )


def _disagreements(
    dataset: Dataset, table: Table, agreement: Agreement, sound: Mapping[str, list[Part]]
) -> Iterator[Finding]:
    """Where two tables disagree: shard by shard for what is written by shard, else over all of the rows."""
    if table.kind == "plan":
        yield from _compare(
            dataset, agreement, sound[table.name], sound[agreement.table], f"{table.name}, {agreement.table}"
        )
        return
    others = {name_of(part.path): part for part in sound[agreement.table]}
    for part in sound[table.name]:
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
