"""Rules that judge a dataset: what each looks for, what it needs, how serious it is, and a table of what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from attlas.analysis.evidence import Evidence
from attlas.extract.tables import TABLES

_MANY = 1e15  # larger numbers are written with an exponent
Severity = Literal["error", "warning", "normal"]
# `head` is set for rules of heads; `site`, `dimension` and `last_layer` for rules of the stream
SCHEMA = {
    "name": pl.String,
    "severity": pl.String,
    "place": pl.String,
    "stack": pl.String,
    "layer": pl.Int16,
    "last_layer": pl.Int16,
    "head": pl.Int16,
    "site": pl.String,
    "dimension": pl.Int64,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "evidence": pl.String,
    "source": pl.String,
}
RULES_SCHEMA = {
    "name": pl.String,
    "severity": pl.String,
    "rule": pl.String,
    "meaning": pl.String,
    "source": pl.String,
    "found": pl.Int64,
    "not_checked": pl.String,
}


@dataclass(frozen=True)
class Rule:
    """What a rule looks for, and a function that gives the rows of SCHEMA that it finds, without name, severity and source.

    needs: the columns, as TABLE.COLUMN of `heads` or `residual`, without which it cannot be checked. refuse: any other reason why not.
    """

    name: str
    severity: Severity
    rule: str
    meaning: str
    source: str
    needs: tuple[str, ...]
    find: Callable[[Evidence], pl.DataFrame]
    refuse: Callable[[Evidence], str | None] = lambda _: None


def apply(rules: Sequence[Rule], evidence: Evidence) -> pl.DataFrame:
    """A row of SCHEMA for everything that the rules find, in their order."""
    several = len({*evidence.heads["stack"], *evidence.residual["stack"]}) > 1
    frames = [pl.DataFrame(schema=SCHEMA)]
    for rule in rules:
        if reason_not_checked(rule, evidence) is not None:
            continue
        rows = rule.find(evidence)
        facts = {"name": rule.name, "severity": rule.severity, "source": rule.source}
        rows = rows.with_columns(pl.lit(value).alias(name) for name, value in facts.items() if name not in rows.columns)
        missing = [pl.lit(None, dtype).alias(name) for name, dtype in SCHEMA.items() if name not in rows.columns]
        rows = rows.with_columns(missing).cast(dict(SCHEMA.items()))
        frames.append(rows.with_columns(place=_place(several=several)).select(*SCHEMA))
    return pl.concat(frames)


def figures(value: pl.Expr, digits: int = 3) -> pl.Expr:
    """Numbers as text with so many significant digits."""
    rounded = value.cast(pl.Float64).round_sig_figs(digits)
    whole = rounded.clip(-_MANY, _MANY).cast(pl.Int64).cast(pl.String)
    power = rounded.abs().clip(_MANY).log10().floor().cast(pl.Int64)
    scientific = pl.format("{}e{}", (rounded / pl.lit(10.0).pow(power)).round(digits - 1), power)
    return (
        pl.when(rounded.abs() > _MANY)
        .then(scientific)
        .when(rounded.abs() >= 10 ** (digits - 1))
        .then(whole)
        .otherwise(rounded.cast(pl.String))
    )


def _place(*, several: bool) -> pl.Expr:
    """Where something was found: L4H10, L4 mlp, L11 to L28, or the whole stack."""
    layer, last = pl.format("L{}", "layer"), pl.format("L{}", "last_layer")
    name = (
        pl.when(pl.col("layer").is_null())
        .then(pl.lit("all heads"))
        .when(pl.col("head").is_not_null())
        .then(pl.format("L{}H{}", "layer", "head"))
        .when(pl.col("last_layer") > pl.col("layer"))
        .then(pl.concat_str(layer, pl.lit(" to "), last))
        .when(pl.col("site").is_not_null())
        .then(pl.concat_str(layer, pl.lit(" "), pl.col("site").str.replace_all("_", " ", literal=True)))
        .otherwise(layer)
    )
    return pl.concat_str("stack", pl.lit(" "), name) if several else name


def rules_table(rules: Sequence[Rule], evidence: Evidence, rows: pl.DataFrame) -> pl.DataFrame:
    """Every rule with the number of `rows` that it found; `found` is null if it was not checked, with the reason."""
    counts = dict(rows["name"].value_counts().rows())
    records = []
    for rule in rules:
        reason = reason_not_checked(rule, evidence)
        found = counts.get(rule.name, 0) if reason is None else None
        records.append((rule.name, rule.severity, rule.rule, rule.meaning, rule.source, found, reason))
    return pl.DataFrame(records, schema=RULES_SCHEMA, orient="row")


def reason_not_checked(rule: Rule, evidence: Evidence) -> str | None:
    """Why a rule cannot be checked on this dataset; None if it can."""
    unknown = [need for need in rule.needs if not is_measured(need, evidence)]
    if unknown:
        return not_measured(unknown)
    return rule.refuse(evidence)


def is_measured(need: str, evidence: Evidence) -> bool:
    """Whether the evidence has values of a column, given as TABLE.COLUMN."""
    table, name = need.split(".")
    frame = evidence.heads if table == "heads" else evidence.residual
    return name in frame.columns and bool(frame[name].is_not_null().any())


def not_measured(needs: Iterable[str]) -> str:
    """That columns were not measured, and the option that measures them."""
    columns = [next(c for c in TABLES[table].facts if c.name == name) for table, name in (n.split(".") for n in needs)]
    names = ", ".join(c.name for c in columns)
    on_request = [c.name for c in columns if not c.core]
    if not on_request:
        return f"not measured: {names} is not known for this model"
    return f"not measured: {names}; measure with --statistics {','.join(on_request)}"
