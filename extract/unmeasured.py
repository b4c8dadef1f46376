"""Statistics that were asked for by name and that this model, or this corpus, can't give: said once, before the run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from attlas.extract.capture.layout import INTERCEPTED, Layout
from attlas.extract.engines.quantities import ROW_QUANTITIES, Fact
from attlas.extract.engines.sums import head_quantity
from attlas.extract.instrument import Instrument
from attlas.extract.tables import TABLES, Column, Table, statistics_named
from attlas.extract.tables.heads import quantities_of

_WHY: dict[Fact, str] = {
    "positions": "queries and keys of its attention are different tokens, without a distance",
    "scores": "only patterns are seen of its attention, no scores",
    "queries": "its attention is seen without queries and keys",
    "values": "its attention is seen without values",
    "token_ids": "there are no token ids",
    "classes": "there are no token classes",
    "projection": "no output projection was found",
    "grid": "it has no grid of patches",
    "stream": "its residual stream can't be read",
}


def notes_on_statistics(statistics: str | Collection[str], instrument: Instrument) -> list[str]:
    """A note for each reason why statistics that are asked for by name will be null in every row."""
    layout = instrument.measured_model.layout
    absent = _absent_facts(instrument)
    reasons: dict[str, list[str]] = {}
    for table, column in _asked(statistics):
        for reason in _reasons(table, column, layout, absent):
            reasons.setdefault(reason, []).append(column.name)
    return [f"{', '.join(names)} will be null: {reason}" for reason, names in reasons.items()]


def _asked(statistics: str | Collection[str]) -> Iterator[tuple[Table, Column]]:
    """The columns that are asked for by their own names."""
    names = set(statistics_named(statistics))
    for table in TABLES.values():
        for column in table.facts:
            if names & {column.name, f"{table.name}.{column.name}"}:
                yield table, column


def _absent_facts(instrument: Instrument) -> set[Fact]:
    """What no attention call of the model has."""
    layout, images = instrument.measured_model.layout, instrument.measured_model.images
    attentions = layout.attentions
    has: dict[Fact, bool] = {
        "positions": any(not a.is_cross_attention for a in attentions),
        "scores": layout.methods != {"replay"},
        "queries": bool(layout.methods & INTERCEPTED),
        "token_ids": instrument.classes is not None,
        "classes": instrument.classes is not None,
        "projection": any(a.projection is not None for a in attentions),
        "grid": images is not None and bool(images.grids),
        "stream": layout.residual_refusal is None,
    }
    return {fact for fact in has if not has[fact]}


def _reasons(table: Table, column: Column, layout: Layout, absent: Collection[Fact]) -> Iterable[str]:
    if table.name == "heads":
        return [_WHY[fact] for fact in _facts_of(column) if fact in absent]
    norms = [site.norm for site in layout.sites if site.norm is not None]
    if column.name == "norm_mean" and norms and all(norm.kind == "rms" for norm in norms):
        return ["its norms subtract no mean (RMSNorm)"]
    of_attention = [site for site in layout.sites if site.attention is not None]
    if column.name == "mixing_ratio_norm" and not any(site.is_post_norm for site in of_attention):
        return ["no norm reads what attention has added (pre-norm)"]
    return []


def _facts_of(column: Column) -> set[Fact]:
    """What an attention call must have for a column of `heads`."""
    quantities = [head_quantity(name) for name in quantities_of((column,))]
    rows = {row for quantity in quantities for row in quantity.rows}
    facts: set[Fact] = {fact for quantity in quantities for fact in quantity.facts}
    return facts.union(*(ROW_QUANTITIES[row].needs for row in rows))
