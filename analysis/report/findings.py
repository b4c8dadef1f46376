"""What stands out, in sentences with numbers and intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from attlas.analysis.kinds import KINDS
from attlas.analysis.manifest import section
from attlas.analysis.report.content import Content
from attlas.analysis.report.numbers import count, estimate, interval, percent, plural, shown

FIRM = 0.95
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
    """A finding: what it is about, the number, and the sentence; `head` is the id of the head it is about."""

    topic: str
    figure: str
    sentence: str
    head: int | None = None


def highlights(content: Content) -> list[Highlight]:
    """The findings of the report, the heads' extremes first."""
    finders = (_entropy, _distance, _destinations, _depth, _residual, _defects)
    return [highlight for find in finders for highlight in find(content)]


def _of(row: dict, column: str, *, share: bool = False) -> tuple[str, str]:
    """The value of a column to the digits it has, and its interval in words."""
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return estimate(row[column], low, high, share=share), interval(low, high, share=share)


def _extreme(content: Content, column: str, *, largest: bool) -> dict | None:
    known = content.heads.filter(pl.col(column).is_not_null())
    return known.sort(column, descending=largest).row(0, named=True) if known.height else None


def _entropy(content: Content) -> Iterator[Highlight]:
    for topic, largest in (("sharpest head", False), ("broadest head", True)):
        head = _extreme(content, "entropy_normalized", largest=largest)
        if head is None:
            return
        value, range_ = _of(head, "entropy_normalized", share=True)
        yield Highlight(
            topic,
            head["label"],
            f"Its entropy is {value} of what the visible keys permit ({range_}): "
            f"as if it attended evenly to {shown(head['attended_keys'])} keys.",
            head["id"],
        )


def _distance(content: Content) -> Iterator[Highlight]:
    for topic, largest in (("nearest head", False), ("farthest head", True)):
        head = _extreme(content, content.distance, largest=largest)
        if head is None:
            return
        value, range_ = _of(head, content.distance)
        unit = "patches of the image" if content.distance == "distance_patches" else "tokens"
        against = ""
        if head["distance_vs_uniform"] is not None and unit == "tokens":
            against = f", {shown(head['distance_vs_uniform'])} times what an even head would"
        yield Highlight(
            topic,
            head["label"],
            f"It looks {value} {unit} away on average ({range_}){against}.",
            head["id"],
        )


def _destinations(content: Content) -> Iterator[Highlight]:
    for row in content.overall.iter_rows(named=True):
        known = {name: row[name] for name in _CLASS_NAMES if row[name] is not None}
        if len(known) < 2:
            continue
        first, second = sorted(known, key=lambda name: known[name], reverse=True)[:2]
        value, range_ = _of(row, first, share=True)
        where = f", {row['stack']}" if len(content.stacks) > 1 else ""
        yield Highlight(
            f"where attention goes{where}",
            value,
            f"Over all heads, this share of the attention goes to {_CLASS_NAMES[first]} ({range_}); "
            f"next come {_CLASS_NAMES[second]} with {percent(row[second])}.",
        )


def _depth(content: Content) -> Iterator[Highlight]:
    known = content.layers.filter(pl.col("entropy_normalized").is_not_null())
    for (stack,), layers in known.group_by("stack", maintain_order=True):
        if layers.height < 2:
            continue
        ordered = layers.sort("entropy_normalized")
        low, high = ordered.row(0, named=True), ordered.row(-1, named=True)
        where = f", {stack}" if len(content.stacks) > 1 else ""
        value, range_ = _of(low, "entropy_normalized", share=True)
        yield Highlight(
            f"sharpest layer{where}",
            f"Layer {low['layer']}",
            f"Its heads use {value} of the entropy they could ({range_}); "
            f"layer {high['layer']} is the broadest with {percent(high['entropy_normalized'])}.",
        )


def _residual(content: Content) -> Iterator[Highlight]:
    known = content.residual.filter(pl.col("update_ratio").is_not_null())
    if not known.height:
        return
    row = known.sort("update_ratio").row(-1, named=True)
    value, range_ = _of(row, "update_ratio")
    where = f", {row['stack']}" if known["stack"].n_unique() > 1 else ""
    yield Highlight(
        f"largest update{where}",
        f"L{row['layer']} {row['site'].replace('_', ' ')}",
        f"It writes {value} times the norm of the stream it is added to ({range_}).",
    )


def _defects(content: Content) -> Iterator[Highlight]:
    found = [(name, number) for name, number in content.rules.select("defect", "found").rows() if number]
    blind = [name for name, number in content.rules.select("defect", "found").rows() if number is None]
    unseen = f" Not measured: {', '.join(blind)}." if blind else ""
    looked = plural(content.rules.height - len(blind), "rule")
    if found:
        named = ", ".join(f"{name} ({count(number)})" for name, number in found)
        yield Highlight("defects", count(len(found)), f"Of {looked} looked at, these are broken: {named}.{unseen}")
    else:
        yield Highlight("defects", "None", f"None of {looked} looked at is broken.{unseen}")


def kind_counts(content: Content) -> list[tuple[str, int, str]]:
    """Kind, number of heads and meaning, the commonest first."""
    meanings = {k.name: k.meaning for k in KINDS}
    counts = content.heads["kind"].value_counts(sort=True).sort("count", "kind", descending=[True, False])
    return [(kind, number, meanings.get(kind, "no one thing dominates")) for kind, number in counts.rows()]


def kind_sentence(content: Content) -> str:
    """How many heads have a kind, and how firmly."""
    named = content.heads.filter(pl.col("kind") != "mixed")
    total = content.heads.height
    known = content.heads["agreement"].drop_nulls()
    if not len(known):
        return f"{named.height} of {plural(total, 'head')} have a kind; with fewer than 2 documents none can be called firm."
    firm = int((known >= FIRM).sum())
    return (
        f"{named.height} of {plural(total, 'head')} have a kind by the thresholds below; the classification of {firm} is "
        f"firm: at least {percent(FIRM)} of the bootstrap replicates over documents agree."
    )


def notes(content: Content) -> list[str]:
    """What a reader must know before comparing numbers."""
    low, high = content.sequence_tokens
    told = []
    if content.documents < 2:
        told.append("Fewer than 2 documents were measured: estimates stand without intervals.")
    elif content.documents < 10:
        told.append(f"Only {plural(content.documents, 'document')} were measured: intervals are wide, and rough.")
    if high > 1.5 * low:
        told.append(
            f"Sequences hold {count(low)} to {plural(high, 'token')}. A short sequence bounds entropy in nats and distance in "
            "tokens; the normalised columns and the strata by length compare like with like."
        )
    dropped = section(content.manifest, "corpus").get("dropped") or {}
    if dropped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items()))
        told.append(f"Documents left out: {reasons}.")
    told += [f"{note}." for note in section(content.manifest, "tokenizer").get("notes") or []]
    residual = section(content.manifest, "model").get("residual")
    if residual not in (None, "measured"):
        told.append(f"The residual stream was not measured: {residual}.")
    return [*told, *content.damage]
