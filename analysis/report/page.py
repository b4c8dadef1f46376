"""Rendering of the report's content as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from markupsafe import Markup, escape

from attlas.analysis.documents import OUTLIER_SCORE
from attlas.analysis.heads import HEAD
from attlas.analysis.info import describe
from attlas.analysis.kinds import MIN_TOKENS, kinds_table
from attlas.analysis.manifest import section
from attlas.analysis.naming import corpus_title, heading, model_title
from attlas.analysis.report import highlights
from attlas.analysis.report.charts import NOTICE, chart_style, content_security_policy, runtime, shared_data
from attlas.analysis.report.content import Content, dropped_by_reason
from attlas.analysis.report.figure import STEPS, palette_styles
from attlas.analysis.report.head_columns import first_column, heads_frame, shown_columns
from attlas.analysis.report.head_figures import distance_figures, kind_maps, maps, rest_figures
from attlas.analysis.report.layer_figures import entropy_figures, residual_columns, residual_figures
from attlas.analysis.report.numbers import count, format_number, interval, plural
from attlas.analysis.report.pruning_figures import pruning_section
from attlas.analysis.report.similarity_figures import similarity_figures, similarity_sentence
from attlas.extract.printable import printable
from attlas.extract.tables import TABLES

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent
_MOST_DOCUMENTS = 40
_SECTIONS = {
    "highlights": "Highlights",
    "map": "Map",
    "kinds": "Kinds",
    "distance": "Distance",
    "entropy": "Entropy",
    "residual": "Residual",
    "similarity": "Similarity",
    "pruning": "Pruning",
    "documents": "Documents",
    "table": "All heads",
    "defects": "Defects",
    "findings": "Findings",
    "how": "How",
}


def render(content: Content) -> str:
    """The report as an HTML page."""
    return page_environment().get_template("page.html").render(_context(content))


def page_environment() -> Environment:
    """Templates in which everything from the data is escaped, control characters included."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(_HERE),
        undefined=StrictUndefined,
        finalize=_escape_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(name=_isolate_direction, lines=escape)
    return environment


def _escape_controls(value: object) -> object:
    """Escape control characters in text from the data; leave markup and numbers unchanged."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _isolate_direction(text: object) -> Markup:
    """A name from the data, escaped and with its text direction isolated."""
    return Markup("<bdi>{}</bdi>").format(printable(text))


def _context(content: Content) -> dict[str, Any]:
    columns = shown_columns(content.heads, content.manifest)
    script = (_HERE / "page.js").read_text("utf-8")
    style = (_HERE / "style.css").read_text("utf-8") + chart_style() + palette_styles()
    parts = {
        "residual": list(residual_figures(content)),
        "likeness": list(similarity_figures(content)),
        "pruning": pruning_section(content),
    }
    absent = {"residual": not parts["residual"], "similarity": not parts["likeness"], "pruning": not parts["pruning"]}
    return {
        **parts,
        "model": heading(model_title(content.manifest)),
        "corpus": heading(corpus_title(content.manifest)),
        "policy": Markup(content_security_policy(script)),
        "style": Markup(style),
        "runtime": runtime(script),
        "notice": NOTICE,
        "sections": [(id, name) for id, name in _SECTIONS.items() if not absent.get(id)],
        "tiles": _tiles(content),
        "facts": _facts(content),
        "notes": highlights.notes(content),
        "highlights": highlights.highlights(content),
        "data": shared_data({"heads": heads_frame(content.heads, columns["name"].to_list()), "columns": columns}),
        "picker": _picker(columns),
        "first": first_column(columns),
        "likeness_sentence": similarity_sentence(content),
        "steps": STEPS,
        "maps": list(maps(content, columns)),
        "kind_sentence": highlights.kind_sentence(content),
        "kind_counts": highlights.kind_counts(content),
        "kinds": list(kind_maps(content)),
        "kinds_table": kinds_table().rows(named=True),
        "chance": content.chance.rows(named=True),
        "rest": list(rest_figures(content)),
        "distance": list(distance_figures(content)),
        "without_distance": [s for s in content.stacks if s not in set(content.offsets["stack"])],
        "entropy": list(entropy_figures(content)),
        "documents": _documents(content),
        "defects": _rule_sections(content, "defect"),
        "findings": _rule_sections(content, "finding"),
        "formulas": _formulas(content, columns),
        "provenance": describe(content.manifest),
    }


def _tiles(content: Content) -> list[tuple[str, str]]:
    corpus = section(content.manifest, "corpus")
    layers = content.heads.select(pl.struct("stack", "layer").n_unique()).item() if content.heads.height else 0
    numbers = {
        "layer": layers,
        "head": content.heads.height,
        "document": content.documents,
        "sequence": corpus.get("sequences") or 0,
        "token": corpus.get("tokens") or 0,
    }
    return [(count(number), noun if number == 1 else f"{noun}s") for noun, number in numbers.items()]


def _facts(content: Content) -> str:
    manifest = content.manifest
    parts = [section(manifest, "model").get("architecture"), manifest.get("dtype"), manifest.get("device")]
    engine = manifest.get("engine")
    return " · ".join([str(p) for p in parts if p] + ([f"engine {engine}"] if engine else []))


def _picker(columns: pl.DataFrame) -> list[tuple[str, list[str]]]:
    """Columns by their group in the dictionary."""
    groups = columns.group_by("group", maintain_order=True).agg("name")
    return groups.rows()


def _rule_sections(content: Content, type_: str) -> list[dict[str, Any]]:
    """The rules for defects or findings with what they found, those that found something first."""
    judgement = content.judgement
    ids = content.heads.select(*HEAD, "id")
    sections = []
    for rule in judgement.rules.filter(pl.col("type") == type_).iter_rows(named=True):
        found = judgement.found.filter(pl.col("name") == rule["name"])
        rows = found.join(ids, on=HEAD, how="left", maintain_order="left").iter_rows(named=True)
        places = [(row["place"], row["evidence"], _interval_or_nothing(row), row["id"]) for row in rows]
        sections.append({**rule, "places": places})
    return sorted(sections, key=lambda d: (d["found"] is None, not d["found"]))


def _interval_or_nothing(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else interval(row["low"], row["high"])


def _documents(content: Content) -> dict[str, Any]:
    """Documents that are outliers, a row for each, and what is said of those that were dropped."""
    scored = content.documents_scored.filter(pl.col("score").is_not_null())
    outliers = scored.filter("is_outlier")
    documents = outliers["document_id"].n_unique()
    sentences = [_outlier_sentence(content, checked=scored["document_id"].n_unique(), outliers=documents)]
    dropped = dropped_by_reason(content)
    sentences.append(f"Dropped before measuring: {dropped}." if dropped else "No document was dropped.")
    shown = outliers.unique(["stack", "document_id"], keep="first", maintain_order=True).head(_MOST_DOCUMENTS)
    several = len(content.stacks) > 1
    header = [("document", False), *([("stack", False)] if several else []), ("tokens", True), ("column", False)]
    header += [("mean", True), ("median of documents", True), ("score", True)]
    rows = [
        (
            row["source"] or f"document {row['document_id']}",
            *([row["stack"]] if several else []),
            count(row["content_tokens"]),
            row["column"],
            *(format_number(row[name]) for name in ("mean", "median", "score")),
        )
        for row in shown.iter_rows(named=True)
    ]
    caption = f"The farthest column of each, {count(len(rows))} of {count(documents)}." if rows else ""
    return {"sentences": sentences, "header": header, "rows": rows, "caption": caption}


def _outlier_sentence(content: Content, *, checked: int, outliers: int) -> str:
    if content.min_documents > 1:
        return f"No numbers of fewer than {content.min_documents:,} documents are shown, and so none of single ones."
    if not checked:
        return f"No document has {MIN_TOKENS} tokens or more, so none is compared with the others."
    return (
        f"Of {plural(checked, 'document')}, {count(outliers)} {'is' if outliers == 1 else 'are'} unlike the others in a mean over all heads: their modified z-score is "
        f"beyond ±{OUTLIER_SCORE:g} (Iglewicz & Hoaglin 1993). Compare lengths first: entropy and masses depend on them."
    )


def _formulas(content: Content, columns: pl.DataFrame) -> list[tuple[str, str, str, str, str]]:
    heads = [
        (f"heads.{name}", *rest)
        for name, *rest in columns.select("name", "formula", "unit", "meaning", "reference").rows()
    ]
    panels = {column for column, _, _ in residual_columns(content)}
    stream = [c for c in TABLES["residual"].facts if c.name in panels]
    own = [c for c in content.manifest.get("own_statistics", ()) if c["table"] != "heads"]
    return [
        *heads,
        *((f"residual.{c.name}", c.formula, c.unit, c.meaning, c.reference) for c in stream),
        *((f"{c['table']}.{c['name']}", c["formula"], c["unit"], c["meaning"], c["origin"]) for c in own),
    ]
