"""What changed between two datasets, head by head and site by site: differences with intervals, and verdicts.

Datasets of the same documents are compared document by document (paired), others as two samples. Every difference is tested, and the
tests are corrected together for the false discovery rate (Benjamini & Hochberg 1995). A verdict is

* changed: q < alpha, and the difference is beyond the margin;
* unchanged: two one-sided tests at level alpha put the difference within the margin (Schuirmann 1987);
* undecided: neither, also where there is no interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from attlas.analysis.comparability import (
    Columns,
    columns_to_compare,
    descriptions,
    hidden_cells,
    model_and_corpus,
    same_documents,
    setting_differences,
)
from attlas.analysis.dataset import Dataset
from attlas.analysis.inference import CONFIDENCE, MEANS, Differences, benjamini_hochberg, two_sample
from attlas.analysis.margins import Margin, default_margin, margins_named
from attlas.analysis.matching import MATCHES, Match, means_by_depth, means_of_heads_alike, stack_pairs
from attlas.analysis.pairing import paired_differences
from attlas.analysis.report.numbers import plural
from attlas.analysis.summaries import means_of, places
from attlas.extract.store import Location, Refusal
from attlas.extract.tables import Column

CHANGED, UNCHANGED, UNDECIDED = "changed", "unchanged", "undecided"
VERDICTS = (CHANGED, UNDECIDED, UNCHANGED)
ROW = {
    "stack": pl.String,
    "layer": pl.Int16,
    "head": pl.Int16,
    "site": pl.String,
    "column": pl.String,
    "a": pl.Float64,
    "b": pl.Float64,
    "difference": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "q": pl.Float64,
    "verdict": pl.String,
    "margin": pl.Float64,
    "effect": pl.Float64,
    "documents": pl.Int64,
}


# of rows before they are corrected together
TESTED = {**ROW, "p": pl.Float64, "is_within": pl.Boolean}
# of places that are not the same in both
OF_MATCH = {"depth": pl.Float64, "other_layer": pl.Int16, "other_head": pl.Int16}


@dataclass(frozen=True)
class Comparison:
    """Rows with the columns of ROW, the largest effects first; `effect` is |difference| ÷ margin.

    Compared by depth, rows have `depth` in place of a layer; heads that are alike have `other_layer` and `other_head`, those of b.

    Intervals have the confidence 1 − alpha. names: of model and corpus, of a and of b. notes: what is compared, how, and what can't
    be, as sentences.
    """

    rows: pl.DataFrame
    is_paired: bool
    names: tuple[tuple[str, str], tuple[str, str]]
    notes: tuple[str, ...]
    alpha: float

    @property
    def has_drift(self) -> bool:
        """Whether anything changed."""
        return bool((self.rows["verdict"] == CHANGED).any())

    def counts(self) -> dict[str, int]:
        """The number of rows with each verdict."""
        return count_verdicts(self.rows)


def count_verdicts(rows: pl.DataFrame) -> dict[str, int]:
    """The number of rows with each verdict, in the order of VERDICTS."""
    return {verdict: int((rows["verdict"] == verdict).sum()) for verdict in VERDICTS}


def compare(
    a: Location | Dataset,
    b: Location | Dataset,
    *,
    columns: Sequence[str] | None = None,
    margins: Iterable[str] | Mapping[str, float] = (),
    alpha: float = 1 - CONFIDENCE,
    match: str | None = None,
    min_documents: int = 1,
) -> Comparison:
    """Compare every head, site and layer of two datasets.

    columns: those to compare, by name; all that both have by default. margins: by column, numbers in its unit, or texts
    `COLUMN=VALUE`. match: what is compared with what; by default the same places of models that have the same heads, and bands
    of relative depth of others. min_documents: as of `open_dataset`, of datasets that are not open yet. Raises Refusal for datasets
    that can't be compared, unknown columns and bad margins.
    """
    first, second = (d if isinstance(d, Dataset) else Dataset.open(d, min_documents=min_documents) for d in (a, b))
    check_alpha(alpha)
    chosen = columns_to_compare(first, second, columns)
    given = margins_of(margins, chosen)
    used = _match(first, second, match)
    how = same_documents(first, second) if used == "place" else None
    frames = []
    for table, of_table in chosen.common.items():
        found = (
            _differences(first, second, table, list(of_table), match=used, is_paired=how is not None)
            if of_table
            else None
        )
        if found is not None:
            frames.append(tested(*found, of_table, given, alpha=alpha))
    rows = pl.concat(frames, how="diagonal") if frames else pl.DataFrame(schema=TESTED)
    notes = (*descriptions(first, second), *_notes(first, second, chosen, how, match=used))
    names = (model_and_corpus(first), model_and_corpus(second))
    return Comparison(with_verdicts(rows, alpha), how is not None, names, notes, alpha)


def check_alpha(alpha: float) -> None:
    """Raise Refusal unless it is the level of a test."""
    if not 0 < alpha < 0.5:
        raise Refusal(f"alpha is a probability below 0.5; got {alpha:g}; use 0.05, for example")


def _match(a: Dataset, b: Dataset, name: str | None) -> Match:
    if name is not None and name not in MATCHES:
        raise Refusal(f"match is one of {', '.join(MATCHES)}; got {name!r}; choose one of them")
    match = MATCHES.get(name or "")
    are_same = places(a, "heads").equals(places(b, "heads"))
    if match == "place" and not are_same:
        raise Refusal(
            "heads are compared one by one if both models have the same; b has other layers or heads than a; "
            "compare by depth, or heads that are alike: --match depth or heads"
        )
    if match != "place" and not are_same and not stack_pairs(a, b):
        raise Refusal(
            "stacks are compared that have the same name, or the only ones; these models have several, all of other names; "
            "measure the same stacks of both (--stacks)"
        )
    return match or ("place" if are_same else "depth")


def margins_of(margins: Iterable[str] | Mapping[str, float], chosen: Columns) -> dict[str, Margin]:
    """Margins from numbers in their columns' units, or from texts. Raises Refusal."""
    columns = {name: column for of_table in chosen.common.values() for name, column in of_table.items()}
    texts = [f"{name}={value!r}" for name, value in margins.items()] if isinstance(margins, Mapping) else margins
    return margins_named(texts, columns)


def _differences(
    a: Dataset, b: Dataset, table: str, columns: Sequence[str], *, match: Match, is_paired: bool
) -> tuple[pl.DataFrame, Differences] | None:
    """Keys, `a`, `b`, `difference` and `documents` of a table's columns; None where its places are not matched."""
    if match == "depth":
        return _unpaired(*means_by_depth(a, b, table, columns))
    if match == "heads":
        return _unpaired(*means_of_heads_alike(a, b, columns)) if table == "heads" else None
    return differences_at_places(a, b, table, columns, is_paired=is_paired)


def differences_at_places(
    a: Dataset, b: Dataset, table: str, columns: Sequence[str], *, is_paired: bool
) -> tuple[pl.DataFrame, Differences]:
    """Keys, `a`, `b`, `difference` and `documents` of a table's columns, at the places that both have."""
    if is_paired:
        rows = paired_differences(a, b, table, columns)
        arrays = (rows[name].cast(pl.Float64).to_numpy() for name in ("difference", "se", "freedom"))
        return rows.drop("se", "freedom"), Differences(*arrays)
    return _unpaired(*(means_of(dataset, table, columns) for dataset in (a, b)))


def _unpaired(x: pl.DataFrame, y: pl.DataFrame) -> tuple[pl.DataFrame, Differences]:
    """Differences of the means of two samples, at the places that both have."""
    by = [name for name in x.columns if name not in MEANS]
    common = x.select(by).join(y.select(by), on=by, nulls_equal=True).sort(by)
    x, y = (common.join(found, on=by, nulls_equal=True, how="left", maintain_order="left") for found in (x, y))
    rows = common.with_columns(
        a=x["estimate"],
        b=y["estimate"],
        difference=y["estimate"] - x["estimate"],
        documents=x["documents"] + y["documents"],
    )
    return rows, two_sample(x, y)


def tested(
    rows: pl.DataFrame,
    differences: Differences,
    columns: Mapping[str, Column],
    given: Mapping[str, Margin],
    *,
    alpha: float,
) -> pl.DataFrame:
    """The rows with their margin, interval, `p`, and whether they are equivalent."""
    margin = pl.coalesce(
        pl.when(pl.col("column") == name).then((given.get(name) or default_margin(column)).of(pl.col("a"), pl.col("b")))
        for name, column in columns.items()
    )
    rows = rows.with_columns(margin=margin)
    low, high = differences.interval(1 - alpha)
    within = differences.are_within(rows["margin"].to_numpy(), alpha=alpha)
    return rows.with_columns(
        low=pl.Series(low, nan_to_null=True),
        high=pl.Series(high, nan_to_null=True),
        p=pl.Series(differences.p_values),
        is_within=pl.Series(within),
    )


def with_verdicts(rows: pl.DataFrame, alpha: float, *, keys: Mapping[str, Any] | None = None) -> pl.DataFrame:
    """The rows of ROW, the largest effect first, corrected together. keys: columns that are kept in front, with their types."""
    rows = rows.with_columns(
        q=pl.Series(benjamini_hochberg(rows["p"].to_numpy()), nan_to_null=True)
        if rows.height
        else pl.lit(None, pl.Float64),
        effect=pl.when(pl.col("difference") == 0).then(0.0).otherwise(pl.col("difference").abs() / pl.col("margin")),
    )
    changed = (pl.col("q") < alpha) & (pl.col("effect") > 1)
    verdict = (
        pl.when(changed.fill_null(False))
        .then(pl.lit(CHANGED))
        .when("is_within")
        .then(pl.lit(UNCHANGED))
        .otherwise(pl.lit(UNDECIDED))
    )
    absent = [
        pl.lit(None, kind).alias(name) for name, kind in ROW.items() if name not in rows.columns and name != "verdict"
    ]
    schema = {**(keys or {}), **ROW} | {name: kind for name, kind in OF_MATCH.items() if name in rows.columns}
    order = (*(keys or {}), "stack", "layer", "head", "site", "column")
    return (
        rows.with_columns(*absent, verdict=verdict)
        .select(pl.col(name).cast(kind) for name, kind in schema.items())
        .sort("effect", *order, descending=[True, *(False for _ in order)], nulls_last=True)
    )


def _notes(a: Dataset, b: Dataset, chosen: Columns, how: str | None, *, match: Match) -> list[str]:
    """How the datasets are compared, and what can't be."""
    notes = [_how(a, b, how, match), *(f"They differ in {difference}." for difference in setting_differences(a, b))]
    for letter, names in chosen.only.items():
        if names:
            notes.append(f"Not compared, because only {letter} has {plural(len(names), 'column')}: {', '.join(names)}.")
    return [*notes, *hidden_cells(max(a.min_documents, b.min_documents))]


def _how(a: Dataset, b: Dataset, documents: str | None, match: Match) -> str:
    """How the datasets are compared, as a sentence; `documents`: how it is known that they are of the same ones."""
    if match == "depth":
        have_other = not places(a, "heads").equals(places(b, "heads"))
        why = ": the models have other layers or heads" if have_other else ""
        return f"Compared in bands of relative depth, over all heads, as two samples{why}."
    if match == "heads":
        return "Every head of a is compared with the head of b that it is most like, as two samples."
    if documents is not None:
        return f"Compared document by document: both have {documents}."
    return "Compared as two samples: they are not known to be of the same documents."
