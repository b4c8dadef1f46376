"""What of a comparison is worth telling somebody: heads, sites and layers that have changed, and defects that are new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from attlas.analysis.compare import CHANGED, OF_MATCH, Comparison
from attlas.analysis.dataset import Dataset
from attlas.analysis.judge import judge
from attlas.analysis.row_texts import place_name

_EXAMPLES = 5  # places that a summary names, and rows that the details have: those with the largest effects
_PLACE = ("stack", "layer", "head", "site")
_SHOWN = ("column", "a", "b", "difference", "low", "high", "q")


@dataclass(frozen=True)
class Drift:
    """One thing that is not as it was: its name, which is the same whenever it is found, a sentence, and numbers as JSON has them."""

    name: str
    summary: str
    details: Mapping[str, Any] = field(default_factory=dict)


def find_drift(comparison: Comparison, baseline: Dataset, current: Dataset) -> list[Drift]:
    """The drift of a dataset against its baseline: one for heads, sites and layers each, and one for each rule of defects that finds more.

    comparison: of the baseline (a) with the current dataset (b). Raises Refusal for a damaged dataset.
    """
    return [*_changed_places(comparison.rows), *_new_defects(baseline, current)]


def _changed_places(rows: pl.DataFrame) -> Iterator[Drift]:
    place = [name for name in (*_PLACE, *OF_MATCH) if name in rows.columns]
    is_head, is_site = pl.col("head").is_not_null(), pl.col("site").is_not_null()
    for what, chosen in {"heads": is_head, "sites": is_site, "layers": ~is_head & ~is_site}.items():
        of_kind = rows.filter(chosen)
        changed = of_kind.filter(verdict=CHANGED)
        if changed.is_empty():
            continue
        places = changed.group_by(place, maintain_order=True).len("columns").to_dicts()
        more = f" and {len(places) - _EXAMPLES:,} more" if len(places) > _EXAMPLES else ""
        named = ", ".join(
            f"{place_name(p, several_stacks=True)} ({p['columns']:,} columns)" for p in places[:_EXAMPLES]
        )
        summary = f"{len(places):,} of {of_kind.select(place).n_unique():,} {what} changed: {named}{more}"
        largest = changed.head(_EXAMPLES).select(*place, *_SHOWN).fill_nan(None).to_dicts()
        yield Drift(f"drift: {what}", summary, {"places": places, "largest": largest})


def _new_defects(baseline: Dataset, current: Dataset) -> Iterator[Drift]:
    before = _defects(baseline)
    for rule, found in _defects(current).items():
        if found > before.get(rule, 0):
            summary = f"{rule}: {found:,}, in the baseline {before.get(rule, 0):,}"
            yield Drift(f"defect: {rule}", summary, {"found": found})


def _defects(dataset: Dataset) -> dict[str, int]:
    """How much each rule of defects finds."""
    return {row["name"]: row["found"] or 0 for row in judge(dataset).rules.filter(type="defect").to_dicts()}
