"""Checks of the rows of one part: values within bounds, sorted, complete, and by the rules of the table."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import polars as pl
import polars.selectors as cs

from attlas.analysis.dataset import Dataset
from attlas.analysis.integrity import Finding
from attlas.analysis.manifest import section
from attlas.analysis.report.numbers import plural
from attlas.analysis.scanning import scan_parts
from attlas.extract.store import Part
from attlas.extract.tables import Table
from attlas.extract.tables.column import BOUND_TOLERANCE

_ROW = "|row"
_SHARD = re.compile(r"shard-(\d+)(?:\.[0-9a-f]+)?\.parquet$")


@dataclass(frozen=True)
class Check:
    """A rule for rows; `bad` selects the rows that break it."""

    name: str
    bad: pl.Expr
    message: str


def check_part(dataset: Dataset, table: Table, part: Part, sequences: pl.LazyFrame | None) -> Iterator[Finding]:
    """Check the rows of a part; against the planned sequences of its shard, unless these are damaged."""
    frame = scan_rows(dataset, [part])
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


def _rule_checks(table: Table, frame: pl.LazyFrame) -> list[Check]:
    """The table's rules whose columns are all present."""
    present = set(frame.collect_schema().names())
    rules = [(rule, pl.sql_expr(rule.wrong)) for rule in table.rules]
    return [Check(r.name, wrong, r.message) for r, wrong in rules if set(wrong.meta.root_names()) <= present]


def scan_rows(dataset: Dataset, parts: Iterable[Part]) -> pl.LazyFrame:
    """The rows of parts, names as strings."""
    return scan_parts(dataset.storage, parts).with_columns(cs.categorical().cast(pl.String))
