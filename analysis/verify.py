"""Is a dataset what its manifest and its schema say? Every part that is wrong is named, with what is wrong in it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import polars.selectors as cs
import pyarrow as pa

from analysis.dataset import Dataset
from analysis.integrity import Finding as Finding
from analysis.integrity import integrity, strays, totals
from analysis.manifest import section
from analysis.parts import first_line
from analysis.report.numbers import plural
from analysis.scanning import scan_parts
from extract.schema import CLASS_MASSES, TABLES, Table
from extract.store import MANIFEST, Location, Part, name_of

ALWAYS = ("documents", "sequences", "heads", "profiles")  # residual needs a model whose stream can be seen
MASS_TOLERANCE = 1e-4
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
    findings = list(strays(dataset))
    lacking = [table for table in ALWAYS if table not in dataset.tables]
    if lacking:
        findings.append(
            Finding(MANIFEST, "tables", f"every dataset has {', '.join(ALWAYS)}; {', '.join(lacking)} missing")
        )
    sound: dict[str, list[Part]] = {table: [] for table in ALWAYS}
    for table in dataset.tables:
        findings += totals(dataset, table)
        for part in dataset.parts(table):  # refuses parts outside the dataset
            wrong = list(integrity(dataset, table, part))
            findings += wrong
            if not wrong:
                sound.setdefault(table, []).append(part)
    return findings + list(_contents(dataset, sound))


# --- rows ----------------------------------------------------------------------------------------------------------


def _contents(dataset: Dataset, sound: Mapping[str, list[Part]]) -> Iterator[Finding]:
    """Checks of the rows of the parts whose files are sound."""
    linked = all(_whole(dataset, sound, table) for table in ("documents", "sequences"))
    sequences = _scan(dataset, sound["sequences"]) if linked else None
    for table, parts in sound.items():
        if table not in TABLES:
            continue
        for part in parts:
            yield from _readable(part.path, _part_findings(dataset, TABLES[table], part, sequences))
    if sequences is not None:
        links = _links(dataset, _scan(dataset, sound["documents"]), sequences)
        yield from _readable("documents, sequences", links)
    if all(_whole(dataset, sound, table) for table in ("heads", "profiles")):
        profiles = {name_of(part.path): part for part in sound["profiles"]}
        for heads in sound["heads"]:
            beside = profiles.get(name_of(heads.path))
            if beside is None:
                yield Finding(heads.path, "profile sums", "no profiles of the same shard")
            else:
                yield from _readable(beside.path, _profile_sums(dataset, heads, beside))


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
    yield from _broken(part, frame.with_row_index(_ROW), [*_value_checks(table, frame), *_order_checks(table, frame)])
    if sequences is None:
        return
    match = _SHARD.search(part.path)
    shard = int(match.group(1)) if match else -1
    own = sequences.filter(pl.col("shard") == shard)
    present = frame.collect_schema().names()
    if "sequence_id" in table.schema().names and table.name != "sequences":
        yield from _broken(part, _with_sequence(frame, own), _sequence_checks(dataset, table, present))
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
        if column in table.keys and column.bounds == (None, None) and column.dtype.startswith("int") and name != "bin":
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


def _with_sequence(frame: pl.LazyFrame, own: pl.LazyFrame) -> pl.LazyFrame:
    facts = own.select("sequence_id", n=pl.col("tokens").cast(pl.Float64), of=pl.col("document_id"))
    return frame.join(facts, on="sequence_id", how="left")


def _sequence_checks(dataset: Dataset, table: Table, present: Collection[str]) -> list[Check]:
    classes = [c for c in CLASS_MASSES if c in present]
    checks = [
        Check("links", pl.col("n").is_null(), "a sequence that is not one of the shard's"),
        Check("links", pl.col("of") != pl.col("document_id"), "another document than the sequence's own"),
        *_symbolic_bounds(dataset, table),
    ]
    return checks + _mass_checks(dataset, classes) if table.name == "heads" else checks


def _symbolic_bounds(dataset: Dataset, table: Table) -> list[Check]:
    """Bounds in terms of the sequence's length n and the stream's width d; only where n counts keys and queries."""
    known = _is_of_tokens(dataset)  # what merges tokens changes its width as well
    n = pl.when(known).then(pl.col("n"))
    sink = pl.col("mass_sink").is_not_null().cast(pl.Float64) if table.name == "heads" else pl.lit(0.0)
    width = section(dataset.manifest, "model").get("width")
    d = pl.when(known).then(float(width)) if isinstance(width, int) else pl.lit(None, dtype=pl.Float64)
    symbols = {
        "n": n,
        "n−1": n - 1,
        "−(n−1)": 1 - n,
        "1/n": pl.when(sink == 0).then(1 / n),
        "ln n": (n + sink).log(),
        "d": d,
        "d−1": d - 1,
        "√d": d.sqrt(),
    }
    checks = []
    for column in table.facts:
        exact = column.dtype not in ("float32", "float64")
        for bound, side in zip(column.bounds, ("below", "above"), strict=True):
            if isinstance(bound, str) and bound in symbols:
                checks.append(_bound(column.name, symbols[bound], side, bound, exact=exact))
    return checks


def _is_of_tokens(dataset: Dataset) -> pl.Expr:
    """Whether queries and keys are the tokens of the sequence; windows, pooled states and latents are others."""
    stacks = section(dataset.manifest, "model").get("stacks") or []
    return pl.col("stack").is_in([stack["stack"] for stack in stacks if stack.get("of_tokens")])


def _mass_checks(dataset: Dataset, columns: Sequence[str]) -> list[Check]:
    sink = pl.col("mass_sink").fill_null(0)
    measured = pl.col("query_rows") > 0
    classes = pl.sum_horizontal([pl.col(c).cast(pl.Float64) for c in columns], ignore_nulls=False) + sink
    sides = pl.col("mass_self").cast(pl.Float64) + pl.col("mass_backward") + pl.col("mass_forward") + sink
    checks = [
        Check("class masses", measured & ((classes - 1).abs() > MASS_TOLERANCE), "the token classes do not sum to 1"),
        Check("masses", measured & ((sides - 1).abs() > MASS_TOLERANCE), "self, backward and forward do not sum to 1"),
    ]
    rows = pl.sum_horizontal(pl.col("query_rows", "masked_rows", "nonfinite_rows").cast(pl.Float64))
    miscounted = _is_of_tokens(dataset) & (rows != pl.col("n"))
    return [*checks, Check("rows", miscounted, "measured, masked and non-finite rows are not the tokens")]


def _rectangle(dataset: Dataset, table: Table, part: Part, frame: pl.LazyFrame, own: pl.LazyFrame) -> Iterator[Finding]:
    """Every sequence of the shard has every head (or site), as many as the model has."""
    places = [c.name for c in table.keys if c.name not in ("sequence_id", "document_id")]
    found = frame.select(
        rows=pl.len(), sequences=pl.col("sequence_id").n_unique(), places=pl.struct(places).n_unique()
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
    if table.name == "heads" and layers and None not in heads and distinct != sum(heads):
        of_model = f"{plural(sum(heads), 'head')} in {plural(len(layers), 'layer')} of the model"
        yield Finding(part.path, "row count", f"{of_model}, {plural(distinct, 'head')} in the part")


# --- across tables -------------------------------------------------------------------------------------------------


def _links(dataset: Dataset, documents: pl.LazyFrame, sequences: pl.LazyFrame) -> Iterator[Finding]:
    windows = sequences.group_by("document_id").agg(
        found=pl.len(), gaps=(pl.col("window").max() + 1 != pl.len()) | (pl.col("window").n_unique() != pl.len())
    )
    joined = documents.join(windows, on="document_id", how="full", coalesce=True).with_columns(
        pl.col("found").fill_null(0)
    )
    dropped = pl.col("dropped_reason").is_not_null()
    facts = joined.select(
        orphans=pl.col("sequences").is_null().sum(),
        miscounted=(pl.col("sequences") != pl.col("found")).sum(),
        unexplained=(dropped == (pl.col("found") > 0)).sum(),
        gaps=pl.col("gaps").sum(),
    ).collect()
    messages = {
        "orphans": "sequences of a document that documents does not have",
        "miscounted": "documents with another number of sequences than they say",
        "unexplained": "documents that give sequences and a dropped_reason, or neither",
        "gaps": "documents whose windows are not 0, 1, 2, …",
    }
    for name, message in messages.items():
        if facts[name][0]:
            yield Finding("documents, sequences", "links", f"{message}: {facts[name][0]}")
    yield from _numbering("documents", "document_id", documents)
    yield from _numbering("sequences", "sequence_id", sequences)
    yield from _corpus_counts(dataset, documents, sequences)


def _numbering(table: str, key: str, frame: pl.LazyFrame) -> Iterator[Finding]:
    facts = frame.select(
        bad=(pl.col(key) != pl.int_range(pl.len(), dtype=pl.Int64)).sum(), duplicates=pl.len() - pl.col(key).n_unique()
    ).collect()
    if facts["bad"][0] or facts["duplicates"][0]:
        yield Finding(
            table, "keys", f"{key} does not count 0, 1, 2, … over the parts ({plural(facts['bad'][0], 'row')} off)"
        )


def _corpus_counts(dataset: Dataset, documents: pl.LazyFrame, sequences: pl.LazyFrame) -> Iterator[Finding]:
    corpus = section(dataset.manifest, "corpus")
    counts = {
        "documents": documents.select(pl.len()).collect().item(),
        "sequences": sequences.select(pl.len()).collect().item(),
        "tokens": sequences.select(pl.col("tokens").cast(pl.Int64).sum()).collect().item(),
        "content_tokens": documents.select(pl.col("tokens").sum()).collect().item(),
    }
    for name, count in counts.items():
        if corpus.get(name) not in (None, count):
            yield Finding(MANIFEST, "corpus", f"{name}: {corpus[name]} in the manifest, {count} in the tables")


def _profile_sums(dataset: Dataset, heads: Part, profiles: Part) -> Iterator[Finding]:
    """What the profiles of a shard add up to, against the rows of its heads."""
    head = ["stack", "layer", "head"]
    rows = pl.col("query_rows").cast(pl.Float64)
    self_attention = pl.col("stack") != "cross"
    totals = (
        _scan(dataset, [heads])
        .group_by(head)
        .agg(
            rows=rows.sum(),
            mass=(rows * (1 - pl.col("mass_sink").fill_null(0))).sum(),
            entropy=(rows * pl.col("entropy_nats")).sum(),
            distance=(rows * pl.col("distance_tokens")).sum(),
        )
    )
    wanted = {
        ("offset", "sum"): ("mass", self_attention),
        ("received_by_position", "sum"): ("mass", pl.lit(True)),
        ("max_weight", "count"): ("rows", pl.lit(True)),
        ("entropy_by_position", "count"): ("rows", pl.lit(True)),
        ("entropy_by_position", "sum"): ("entropy", pl.lit(True)),
        ("distance_by_position", "sum"): ("distance", self_attention),
    }
    sums = (
        _scan(dataset, [profiles])
        .group_by(*head, "profile")
        .agg(pl.col("sum").sum(), pl.col("count").sum())
        .join(totals, on=head, how="full", coalesce=True)
    )
    checks = [
        Check(
            "profile sums",
            (pl.col("profile") == profile)
            & applies
            & (
                (pl.col(column) - pl.col(target)).abs()
                > MASS_TOLERANCE * pl.max_horizontal(pl.col(target).abs(), pl.lit(1.0))
            ),
            f"the {column}s of {profile} do not add up to the {target} of {heads.path}",
        )
        for (profile, column), (target, applies) in wanted.items()
    ]
    checks.append(Check("profile sums", pl.col("profile").is_null(), f"no profile of a head of {heads.path}"))
    checks.append(Check("profile sums", pl.col("rows").is_null(), f"a head that is not in {heads.path}"))
    yield from _broken(profiles, sums, checks)
