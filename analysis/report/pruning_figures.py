"""Candidates for pruning: what proxies say, and what removing heads changes, where that was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import polars as pl

from attlas.analysis.heads import HEAD
from attlas.analysis.pruning import EFFECTS, PROXIES
from attlas.analysis.report.charts import TIP, chart_fragment
from attlas.analysis.report.content import Content, has_values
from attlas.analysis.report.figure import NARROW, Figure, python
from attlas.analysis.report.head_figures import KIND_COLOUR, chosen_head, of_stacks
from attlas.analysis.report.numbers import estimate, format_number, half_width, percent

if TYPE_CHECKING:
    import altair as alt

MOST_ROWS = 15
_NAMES = {
    "output_share": "share of the layer's written norm",
    "rest": "share at rest",
    "redundancy": "similarity to the nearest head",
    "mean_rank": "mean rank by the proxies",
    "final_change": "change of the last states without it",
    "loss_change_nats": "change of the loss without it, nats",
}


def pruning_section(content: Content) -> dict[str, Any] | None:
    """The figures, a sentence, and the first rows of a table; None if less than two proxies are known."""
    candidates = content.candidates.join(
        content.heads.select(*HEAD, "id", "label", "kind"), on=HEAD, maintain_order="left"
    )
    known = [name for name in (*PROXIES, *EFFECTS) if has_values(candidates, name)]
    if sum(name in PROXIES for name in known) < 2:
        return None
    rows = [
        (row["id"], row["label"], [_cell(row, name) for name in ("mean_rank", *known)])
        for row in candidates.head(MOST_ROWS).iter_rows(named=True)
    ]
    return {
        "figures": list(_figures(content, candidates, known)),
        "sentence": _sentence(content, known),
        "header": ["head", *(_NAMES[name] for name in ("mean_rank", *known))],
        "rows": rows,
    }


def _cell(row: dict[str, Any], name: str) -> str:
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is not None:
        return f"{estimate(value, low, high)} {half_width(low, high)}"
    return percent(value) if name == "output_share" else format_number(value)


def _sentence(content: Content, known: list[str]) -> str:
    proxies = [_NAMES[name] for name in PROXIES if name in known]
    text = (
        f"Heads without which little seems to be lost, by {len(proxies)} proxies: {', '.join(proxies)}. A proxy is not an effect: "
        "only removing heads shows what they do together."
    )
    if content.correlations is None:
        return f"{text} What removing each head changes was not measured; --statistics ablations --ablate heads measures it."
    found = content.correlations.filter((pl.col("effect") == "final_change") & pl.col("spearman").is_not_null())
    ranks = [f"{format_number(row['spearman'])} for the {_NAMES[row['proxy']]}" for row in found.iter_rows(named=True)]
    if not ranks:
        return text
    return f"{text} Spearman's rank correlation with what removing the head alone changes in the last states is {'; '.join(ranks)}."


def _figures(content: Content, candidates: pl.DataFrame, known: list[str]) -> Iterator[Figure]:
    """Each proxy against the effect of removing the head, or, if that was not measured, against the other proxies."""
    effects = [name for name in EFFECTS if name in known]
    proxies = [name for name in PROXIES if name in known]
    pairs = [(proxy, effects[-1]) for proxy in proxies] if effects else [(proxies[0], other) for other in proxies[1:]]
    for across, up in pairs:
        for stack, where, name in of_stacks(content, f"pruning-{across}-{up}".replace("_", "-")):
            rows = candidates.filter(
                (pl.col("stack") == stack) & pl.col(across).is_not_null() & pl.col(up).is_not_null()
            )
            if rows.height:
                frame = rows.select("id", "label", "kind", "mean_rank", across, up)
                title = f"{_NAMES[up]} against {_NAMES[across]}{where}"
                yield Figure(
                    name,
                    title[0].upper() + title[1:],
                    "",
                    chart_fragment(
                        _scatter(across, up),
                        {"rows": frame},
                        label=f"{title}, a dot for each head",
                        name=name,
                        tips={"label": "head", "kind": "kind"} | {of: _NAMES[of] for of in (across, up, "mean_rank")},
                    ),
                    python(
                        "from attlas.analysis.pruning import pruning_candidates", rows="pruning_candidates(dataset)"
                    ),
                )


def _scatter(across: str, up: str) -> alt.TopLevelMixin:
    import altair as alt

    base = (
        alt.Chart(alt.NamedData("rows"))
        .transform_calculate(colour=KIND_COLOUR)
        .encode(
            x=alt.X(f"{across}:Q", title=_NAMES[across], axis=alt.Axis(tickCount=5)).scale(zero=False, padding=8),
            y=alt.Y(f"{up}:Q", title=_NAMES[up], axis=alt.Axis(tickCount=5)).scale(zero=False, padding=8),
        )
    )
    dots = base.mark_circle(size=36, opacity=0.85, tooltip=TIP).encode(color=alt.Color("colour:N", scale=None))
    chosen = base.transform_filter("datum.id == chosen").mark_point(size=150, stroke="var(--accent)", strokeWidth=2.5)
    return alt.layer(dots, chosen).properties(width=NARROW, height=220).add_params(chosen_head())
