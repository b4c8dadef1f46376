"""Highlights of the report: what stands out, in sentences with numbers and intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from attlas.analysis.comparability import hidden_cells
from attlas.analysis.heads import HEAD
from attlas.analysis.inference import simultaneous
from attlas.analysis.kinds import FIRM_AGREEMENT, KINDS, MIXED
from attlas.analysis.manifest import section
from attlas.analysis.report.content import NO_KIND, Content, dropped_by_reason, has_values
from attlas.analysis.report.numbers import count, estimate, format_number, interval, percent, plural

_CLASS_NAMES = {
    "mass_bos": "the sequence's opening token",
    "mass_separator": "separator tokens",
    "mass_special": "other special tokens",
    "mass_whitespace": "white space",
    "mass_punctuation": "punctuation and symbols",
    "mass_number": "numbers",
    "mass_word_start": "words and their first pieces",
    "mass_subword": "later pieces of words",
}


@dataclass(frozen=True)
class Highlight:
    """What stands out: its topic, its key figure and a sentence; `head` is the id of the head it is about, if any."""

    topic: str
    figure: str
    sentence: str
    head: int | None = None


def highlights(content: Content) -> list[Highlight]:
    """What stands out, beginning with the extreme heads among those that are not at rest."""
    topics = (
        _entropy_extremes,
        _distance_extremes,
        _main_destinations,
        _sharpest_layer,
        _sinks,
        _largest_update,
        _massive_activations,
        _defects,
    )
    return [highlight for topic in topics for highlight in topic(content)]


def _estimate_and_interval(row: dict, column: str, *, share: bool = False) -> tuple[str, str]:
    """A column's value with as many digits as its interval allows, and the interval as text."""
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return estimate(row[column], low, high, share=share), interval(low, high, share=share)


def _extreme_head(content: Content, column: str, *, largest: bool) -> dict[str, Any] | None:
    """The head with the extreme mean among those that are not at rest, with an interval that holds for all of these together."""
    heads = content.awake.filter(pl.col(column).is_not_null())
    if not heads.height:
        return None
    found = simultaneous(content.estimates.filter(pl.col("column") == column), comparisons=heads.height)
    intervals = found.select(*HEAD, pl.col("low").alias(f"{column}_low"), pl.col("high").alias(f"{column}_high"))
    ordered = heads.drop(f"{column}_low", f"{column}_high").sort(column, descending=largest, maintain_order=True)
    return ordered.head(1).join(intervals, on=HEAD, how="left").row(0, named=True) | {"of": heads.height}


def _entropy_extremes(content: Content) -> Iterator[Highlight]:
    for topic, largest in (("sharpest head", False), ("broadest head", True)):
        head = _extreme_head(content, "entropy_normalized", largest=largest)
        if head is None:
            return
        value, range_ = _estimate_and_interval(head, "entropy_normalized", share=True)
        yield Highlight(
            topic,
            head["label"],
            f"Its entropy is {value} of what the visible keys permit ({range_}{_together(head['of'], 'head')}): "
            f"as if it attended evenly to {format_number(head['attended_keys'])} keys.",
            head["id"],
        )


def _together(number: int, noun: str) -> str:
    """That an interval holds together with those of the others, among which it is the extreme."""
    return f", simultaneous over {plural(number, noun)}" if number > 1 else ""


def _distance_extremes(content: Content) -> Iterator[Highlight]:
    for topic, largest in (("nearest head", False), ("farthest head", True)):
        head = _extreme_head(content, content.distance, largest=largest)
        if head is None:
            return
        value, range_ = _estimate_and_interval(head, content.distance)
        unit = "patches of the image" if content.distance == "distance_patches" else "tokens"
        against = ""
        if head["distance_vs_uniform"] is not None and unit == "tokens":
            against = f", {format_number(head['distance_vs_uniform'])} times what an even head would"
        yield Highlight(
            topic,
            head["label"],
            f"It looks {value} {unit} away on average ({range_}{_together(head['of'], 'head')}){against}.",
            head["id"],
        )


def _main_destinations(content: Content) -> Iterator[Highlight]:
    for row in content.overall.iter_rows(named=True):
        masses = {name: row[name] for name in _CLASS_NAMES if row[name] is not None}
        if len(masses) < 2:
            continue
        first, second = sorted(masses, key=lambda name: masses[name], reverse=True)[:2]
        value, range_ = _estimate_and_interval(row, first, share=True)
        where = f", {row['stack']}" if len(content.stacks) > 1 else ""
        yield Highlight(
            f"where attention goes{where}",
            value,
            f"Over the heads that are not at rest, this share of the attention goes to {_CLASS_NAMES[first]} ({range_}); "
            f"next come {_CLASS_NAMES[second]} with {percent(row[second])}.",
        )


def _sharpest_layer(content: Content) -> Iterator[Highlight]:
    measured = content.layers.filter(pl.col("entropy_normalized").is_not_null())
    for (stack,), layers in measured.group_by("stack", maintain_order=True):
        if layers.height < 2:
            continue
        ordered = layers.sort("entropy_normalized")
        low, high = ordered.row(0, named=True), ordered.row(-1, named=True)
        where = f", {stack}" if len(content.stacks) > 1 else ""
        value, range_ = _estimate_and_interval(low, "entropy_normalized", share=True)
        yield Highlight(
            f"sharpest layer{where}",
            f"Layer {low['layer']}",
            f"Its heads, without those at rest, use {value} of the entropy they could ({range_}{_together(layers.height, 'layer')}); "
            f"layer {high['layer']} is the broadest with {percent(high['entropy_normalized'])}.",
        )


def _sinks(content: Content) -> Iterator[Highlight]:
    for row in _found(content, "attention sink"):
        where = f", {row['stack']}" if len(content.stacks) > 1 else ""
        yield Highlight(f"attention at rest{where}", percent(row["value"]), f"{_sentence(row)} This is normal.")


def _found(content: Content, name: str) -> list[dict[str, Any]]:
    return content.judgement.found.filter(pl.col("name") == name).rows(named=True)


def _sentence(row: Mapping[str, Any]) -> str:
    text = row["evidence"]
    return f"{text[:1].upper()}{text[1:]}."


def _largest_update(content: Content) -> Iterator[Highlight]:
    column = "update_ratio_median" if has_values(content.residual, "update_ratio_median") else "update_ratio"
    of = (
        "the median token's stream"
        if column == "update_ratio_median"
        else "the stream it is added to, mean over tokens"
    )
    updates = content.residual.filter(pl.col(column).is_not_null()) if column in content.residual.columns else None
    if updates is None or not updates.height:
        return
    found = simultaneous(content.site_estimates.filter(pl.col("column") == column), comparisons=updates.height)
    row = found.filter(pl.col("estimate").is_not_null()).sort("estimate", maintain_order=True).row(-1, named=True)
    value = estimate(row["estimate"], row["low"], row["high"])
    where = f", {row['stack']}" if updates["stack"].n_unique() > 1 else ""
    yield Highlight(
        f"largest update{where}",
        f"L{row['layer']} {row['site'].replace('_', ' ')}",
        f"It writes {value} times the norm of {of} ({interval(row['low'], row['high'])}{_together(updates.height, 'site')}).",
    )


def _massive_activations(content: Content) -> Iterator[Highlight]:
    rows = _found(content, "massive activation")
    if rows:
        row = max(rows, key=lambda r: r["value"])
        more = f" There are {len(rows) - 1} more." if len(rows) > 1 else ""
        yield Highlight("massive activation", row["place"], f"{_sentence(row)}{more} This is normal.")


def _defects(content: Content) -> Iterator[Highlight]:
    rules = content.judgement.rules.filter(pl.col("type") == "defect").select("name", "found").rows()
    broken = [f"{name} ({count(number)})" for name, number in rules if number]
    not_checked = [name for name, number in rules if number is None]
    suffix = f" Not checked: {', '.join(not_checked)}." if not_checked else ""
    checked = plural(len(rules) - len(not_checked), "rule")
    if broken:
        yield Highlight(
            "defects", count(len(broken)), f"Of {checked} checked, these found one: {', '.join(broken)}.{suffix}"
        )
    else:
        yield Highlight("defects", "None", f"None of {checked} checked found one.{suffix}")


def kind_counts(content: Content) -> list[tuple[str, int, str]]:
    """(kind, number of heads, meaning) of every kind that occurs, most frequent first."""
    meanings = {k.name: k.meaning for k in KINDS} | {NO_KIND: content.no_kinds or ""}
    counts = content.heads["kind"].value_counts(sort=True).sort("count", "kind", descending=[True, False])
    return [(kind, number, meanings.get(kind, "no one thing dominates")) for kind, number in counts.rows()]


def awake_counts(content: Content) -> list[tuple[str, int]]:
    """(kind, number) of what heads at rest do awake, most frequent first, without mixed."""
    resting = content.heads.filter(pl.col("is_at_rest") & (pl.col("awake") != MIXED))
    counts = resting["awake"].value_counts(sort=True).sort("count", "awake", descending=[True, False])
    return counts.rows()


def kind_sentence(content: Content) -> str:
    """How many heads have a kind, how many firmly, and what those at rest do awake."""
    if content.no_kinds:
        return f"Heads have no kinds here: {content.no_kinds}."
    named = content.heads.filter(pl.col("kind") != MIXED)
    total = content.heads.height
    awake = ", ".join(f"{kind} ({count(number)})" for kind, number in awake_counts(content))
    at_rest = f" Awake, the heads at rest are {awake}; the others are mixed." if awake else ""
    agreement = content.heads["agreement"].drop_nulls()
    has = f"{named.height} of {plural(total, 'head')} have a kind by the thresholds below"
    if not len(agreement):
        return f"{has}; with fewer than 2 documents none can be called firm.{at_rest}"
    firm = int((agreement >= FIRM_AGREEMENT).sum())
    return (
        f"{has}; the classification of {firm} is firm: at least {percent(FIRM_AGREEMENT)} of the replicates of the means agree. "
        f"Firm speaks of documents like these, not of sequences of other lengths.{at_rest}"
    )


def _notes_on_generated_corpus(run: Mapping[str, Any], *, tokens: int) -> Iterator[str]:
    """What the corpora `random-repeats` and `needle` permit to conclude; nothing for other corpora."""
    if "blocks" not in run or not tokens:
        return
    if "depths" in run:
        yield (
            "The corpus is needle: made-up sentences of few words. Same-token and induction are measured on their "
            "repetitions; retrieval_score says which heads look at the needle while the answer is read."
        )
        return
    half = percent(run["length"] / tokens)
    yield (
        "The corpus is random-repeats: every block of random tokens comes twice, so that the kinds same-token and induction "
        f"are measured where they are defined. Only the second copy follows an earlier one: mass_induction can reach {half} of "
        "a head's attention, and so can mass_same_token where tokens do not see later ones; of the attention awake, which such "
        f"a head has mostly in the second copy, they can reach all. An even head would have less than {percent(1 / tokens)} "
        "of either, by chance."
    )


def notes(content: Content) -> list[str]:
    """Caveats for the reader of the numbers."""
    low, high = content.sequence_tokens
    texts = []
    if content.documents < 2:
        texts.append("Fewer than 2 documents were measured: estimates have no intervals.")
    elif content.documents < 10:
        texts.append(f"Only {plural(content.documents, 'document')} were measured: intervals are wide and approximate.")
    if high > 1.5 * low:
        texts.append(
            f"Sequences hold {count(low)} to {plural(high, 'token')}. A short sequence bounds entropy in nats and distance in "
            "tokens; the normalised columns and the strata by length compare like with like."
        )
    texts += _notes_on_generated_corpus(section(content.manifest, "run"), tokens=high)
    dropped = dropped_by_reason(content)
    if dropped:
        texts.append(f"Documents left out: {dropped}.")
    texts += hidden_cells(content.min_documents)
    texts += [f"{note}." for note in section(content.manifest, "tokenizer").get("notes") or []]
    residual = section(content.manifest, "model").get("residual")
    if residual not in (None, "measured"):
        texts.append(f"The residual stream was not measured: {residual}.")
    return [*texts, *content.damage]
