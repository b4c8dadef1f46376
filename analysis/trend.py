"""Statistics of every head, site and layer through a series of datasets, with what changed from one to the next marked.

Each dataset is tested against the one before it and against the first, as `compare` tests two: document by document where they
have the same documents, else as two samples. All tests of the series are corrected together (Benjamini & Hochberg 1995).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import polars as pl

from attlas.analysis.alerts import ALERT, COLLAPSE, find_alerts
from attlas.analysis.comparability import (
    Columns,
    common_columns,
    hidden_cells,
    name_some,
    same_documents,
    setting_differences,
)
from attlas.analysis.compare import (
    CHANGED,
    ROW,
    TESTED,
    check_alpha,
    count_verdicts,
    differences_at_places,
    margins_of,
    tested,
    with_verdicts,
)
from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD
from attlas.analysis.inference import CONFIDENCE, estimates
from attlas.analysis.kinds import POSITIONAL, head_kinds
from attlas.analysis.manifest import section
from attlas.analysis.margins import Margin
from attlas.analysis.naming import corpus_title, model_title
from attlas.analysis.report.numbers import count
from attlas.analysis.series import Member, Series, open_series
from attlas.analysis.summaries import summaries
from attlas.extract.store import Location
from attlas.extract.tables import Column

# entropy collapse and growing logits first: what goes wrong in training shows there
DEFAULT_COLUMNS = (
    "entropy_nats",
    "entropy_normalized",
    "score_max",
    "mass_first",
    "output_norm",
    "update_ratio",
    "update_ratio_median",
)
ALL = "all"
PLACE = {"stack": pl.String, "layer": pl.Int16, "head": pl.Int16, "site": pl.String}
_PAIR = {
    "step": pl.Int64,
    "dataset": pl.String,
    "from_step": pl.Int64,
    "from_dataset": pl.String,
    "is_paired": pl.Boolean,
}
VALUE = {
    "step": pl.Int64,
    "dataset": pl.String,
    **PLACE,
    "column": pl.String,
    "estimate": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "documents": pl.Int64,
    "difference": pl.Float64,
    "q": pl.Float64,
    "change": pl.String,
    "change_from_first": pl.String,
}
CHANGE = {**_PAIR, **ROW}
PLACE_AND_COLUMN = (*PLACE, "column")


@dataclass(frozen=True)
class Trend:
    """Means through a series, and what changed.

    rows: VALUE, one row for each place, column and dataset. `difference`, `q` and `change` (a verdict of `compare`) are against the
    dataset before, `change_from_first` is against the first.
    changes: CHANGE, one row for each test, the largest effects first: every dataset against the one before it, and the others
    against the first. alerts: see `alerts`. Intervals have the confidence 1 − alpha. notes: what is followed, how, and what can't be.
    """

    rows: pl.DataFrame
    changes: pl.DataFrame
    alerts: pl.DataFrame
    series: Series
    columns: tuple[str, ...]
    notes: tuple[str, ...]
    alpha: float

    @property
    def steps(self) -> list[int]:
        """The steps of the series, in order."""
        return [member.step for member in self.series.members]

    @property
    def has_drift(self) -> bool:
        """Whether anything changed between the last two datasets."""
        return CHANGED in set(self.changes_to(-1)["verdict"])

    def changes_to(self, member: int, *, from_first: bool = False) -> pl.DataFrame:
        """The tests of a member of the series against the one before it, or against the first."""
        steps = self.steps
        before = steps[0] if from_first else steps[member - 1]
        return self.changes.filter(step=steps[member], from_step=before)

    def counts(self, changes: pl.DataFrame) -> dict[str, int]:
        """The number of tests with each verdict."""
        return count_verdicts(changes)


def trend(
    datasets: str | Sequence[Location | Dataset],
    *,
    columns: str | Sequence[str] | None = None,
    margins: Iterable[str] | Mapping[str, float] = (),
    alpha: float = 1 - CONFIDENCE,
    min_documents: int = 1,
) -> Trend:
    """Follow columns through training checkpoints, or through nights, and mark what changed.

    datasets: finished datasets of the same layers and heads, or a pattern such as `runs/*`; in the order of their training steps if
    they say these, else as given. columns: names, or `all`; by default those of DEFAULT_COLUMNS that all datasets have. margins,
    alpha: as of `compare`. min_documents: as of `open_dataset`, of datasets that are not open yet. Raises Refusal.
    """
    check_alpha(alpha)
    series = open_series(datasets, min_documents=min_documents)
    chosen = _columns(series, columns)
    given = margins_of(margins, chosen)
    followed = {table: of_table for table, of_table in chosen.common.items() if of_table}
    pairs = list(_pairs(series.members))
    frames = [_tests(pair, table, followed[table], given, alpha) for pair in pairs for table in followed]
    tests = pl.concat(frames, how="diagonal") if frames else pl.DataFrame(schema=_PAIR | TESTED)
    changes = with_verdicts(tests, alpha, keys=_PAIR)
    values = [_values(member, table, list(followed[table]), alpha) for member in series.members for table in followed]
    names = tuple(dict.fromkeys(name for of_table in followed.values() for name in of_table))
    rows = _marked(_concat(values), changes, series.members, names)
    notes = (*_descriptions(series), *series.notes, *_notes(series, chosen, pairs))
    alerts = _without_positional(find_alerts(rows), series)
    return Trend(rows, changes, alerts, series, names, notes, alpha)


def _without_positional(alerts: pl.DataFrame, series: Series) -> pl.DataFrame:
    """Alerts without the collapse of heads that have become previous-, next- or self-token heads, which are sharp by nature."""
    steps = set(alerts.filter(alert=COLLAPSE)["step"])
    schema = {name: ALERT[name] for name in ("step", *HEAD)}
    at = pl.DataFrame(schema=schema)
    for member in series.members:
        if member.step in steps:
            kinds = head_kinds(member.dataset).filter(pl.col("awake").is_in(POSITIONAL))
            places = kinds.with_columns(step=pl.lit(member.step))
            at = at.vstack(places.select(pl.col(name).cast(kind) for name, kind in schema.items()))
    of_collapse = at.with_columns(alert=pl.lit(COLLAPSE))
    return alerts.join(of_collapse, on=["alert", "step", *HEAD], how="anti", maintain_order="left")


def _columns(series: Series, names: str | Sequence[str] | None) -> Columns:
    """The columns to follow, and which of the default ones a dataset lacks. Raises Refusal."""
    datasets = {member.name: member.dataset for member in series.members}
    if names == ALL or (isinstance(names, Sequence) and not isinstance(names, str) and ALL in names):
        return common_columns(datasets)
    if names is not None:
        return common_columns(datasets, [names] if isinstance(names, str) else names)
    found = common_columns(datasets)
    common = {t: {n: of_table[n] for n in DEFAULT_COLUMNS if n in of_table} for t, of_table in found.common.items()}
    only = {d: [n for n in names if n.rpartition(".")[2] in DEFAULT_COLUMNS] for d, names in found.only.items()}
    return Columns(common, only)


@dataclass(frozen=True)
class _Pair:
    """Two datasets that are compared. same: how it is known that they have the same documents; None for two samples."""

    a: Member
    b: Member
    same: str | None

    @property
    def keys(self) -> dict[str, object]:
        a, b = self.a, self.b
        return {
            "step": b.step,
            "dataset": b.name,
            "from_step": a.step,
            "from_dataset": a.name,
            "is_paired": self.same is not None,
        }


def _pairs(members: Sequence[Member]) -> Iterator[_Pair]:
    """Every dataset after the one before it, and those from the third on after the first."""
    for a, b in (*pairwise(members), *((members[0], member) for member in members[2:])):
        yield _Pair(a, b, same_documents(a.dataset, b.dataset))


def _tests(
    pair: _Pair, table: str, columns: Mapping[str, Column], given: Mapping[str, Margin], alpha: float
) -> pl.DataFrame:
    found = differences_at_places(pair.a.dataset, pair.b.dataset, table, list(columns), is_paired=pair.same is not None)
    rows = tested(*found, columns, given, alpha=alpha)
    return rows.with_columns(pl.lit(value, _PAIR[name]).alias(name) for name, value in pair.keys.items())


def _values(member: Member, table: str, columns: Sequence[str], alpha: float) -> pl.DataFrame:
    """Means and intervals of a dataset, from its summaries."""
    by = member.dataset.table(table).places
    found = estimates(
        summaries(member.dataset, table, columns), by, confidence=1 - alpha, min_documents=member.dataset.min_documents
    )
    return found.with_columns(step=pl.lit(member.step), dataset=pl.lit(member.name)).collect()


def _concat(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    frame = pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame(schema=VALUE)
    absent = [pl.lit(None, kind).alias(name) for name, kind in VALUE.items() if name not in frame.columns]
    return frame.with_columns(absent).select(pl.col(name).cast(kind) for name, kind in VALUE.items())


def _marked(
    values: pl.DataFrame, changes: pl.DataFrame, members: Sequence[Member], columns: Sequence[str]
) -> pl.DataFrame:
    """The values with what changed against the dataset before, and against the first."""
    on = ["step", *PLACE_AND_COLUMN]
    before = {member.step: earlier.step for earlier, member in pairwise(members)}
    is_next = pl.col("from_step") == pl.col("step").replace_strict(before, default=None, return_dtype=pl.Int64)
    is_first = pl.col("from_step") == members[0].step
    of_next = changes.filter(is_next).select(*on, "difference", "q", change="verdict")
    of_first = changes.filter(is_first).select(*on, change_from_first="verdict")
    order = pl.col("column").replace_strict({n: i for i, n in enumerate(columns)}, default=None, return_dtype=pl.Int32)
    return (
        values.drop("difference", "q", "change", "change_from_first")
        .join(of_next, on=on, how="left", nulls_equal=True)
        .join(of_first, on=on, how="left", nulls_equal=True)
        .select(*VALUE)
        .sort(order, "stack", "layer", "head", "site", "step")
    )


def _descriptions(series: Series) -> Iterator[str]:
    """What the datasets are of."""
    first, last = series.members[0], series.members[-1]
    models = list(dict.fromkeys(model_title(member.dataset.manifest) for member in series.members))
    corpora = list(dict.fromkeys(corpus_title(member.dataset.manifest) for member in series.members))
    span = f"steps {count(first.step)} to {count(last.step)}" if series.has_steps else f"{first.name} to {last.name}"
    tokens = section(first.dataset.manifest, "corpus").get("tokens")
    yield (
        f"{len(series.members)} datasets, {span}: {' and '.join(name_some(models))} on {' and '.join(name_some(corpora))}, "
        f"{tokens:,} tokens in the first"
    )


def _notes(series: Series, chosen: Columns, pairs: Sequence[_Pair]) -> Iterator[str]:
    """How the datasets are compared and ordered, and what can't be."""
    ways = {pair.same for pair in pairs}
    if None not in ways:
        yield f"Compared document by document: all have {' or '.join(sorted(way for way in ways if way))}."
    elif ways == {None}:
        yield "Compared as two samples: they are not known to be of the same documents."
    else:
        samples = [f"{pair.a.name} and {pair.b.name}" for pair in pairs if pair.same is None]
        yield (
            "Compared document by document, and as two samples where documents are not known to be the same: "
            f"{'; '.join(name_some(samples))}."
        )
    if not series.has_steps:
        yield "In the order in which they are given: not all of them say a training step."
    for a, b in pairwise(series.members):
        for difference in setting_differences(a.dataset, b.dataset):
            yield f"{a.name} and {b.name} differ in {difference}."
    for dataset, names in chosen.only.items():
        if names:
            yield f"Not followed, because not all datasets have what {dataset} has: {', '.join(names)}."
    yield from hidden_cells(max(member.dataset.min_documents for member in series.members))
