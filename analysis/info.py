"""A manifest as sections of text for people to read, or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from attlas.analysis.manifest import section
from attlas.analysis.naming import model_title
from attlas.analysis.report.numbers import plural
from attlas.extract.printable import shorten

FORMATS = ("text", "json")
_SHOWN_ABOVE = ("model", "corpus", "engine", "device", "dtype", "schema_version", "own_statistics")
_MAX_LENGTH = 400
Section = tuple[str, list[tuple[str, str]]]


def describe(manifest: Mapping[str, Any]) -> list[Section]:
    """Sections of (label, value) pairs: the model, the corpus, the measurement, the tables and the software."""
    sections = [
        ("Model", _model(manifest)),
        ("Corpus", _corpus(section(manifest, "corpus"))),
        ("Generation", _generation(section(manifest, "generation"))),
        ("Measurement", _measurement(manifest)),
        ("Your own statistics", _own_statistics(manifest)),
        ("Tables", _tables(section(manifest, "tables"))),
        ("Software", [(n, format_value(version)) for n, version in sorted(section(manifest, "software").items())]),
    ]
    return [(title, rows) for title, rows in sections if rows]


def facts_as_json(manifest: Mapping[str, Any]) -> str:
    """The manifest as JSON, with the number of parts of each table and their bytes instead of their names and checksums."""
    tables = {
        name: {**table, "parts": len(table["parts"]), "bytes": sum(part["bytes"] for part in table["parts"])}
        for name, table in section(manifest, "tables").items()
    }
    return json.dumps({**manifest, "tables": tables}, indent=2)


def format_value(value: Any) -> str:
    """A value as text: integers with thousands separators, long texts shortened in the middle."""
    if isinstance(value, bool) or value is None:
        return "—" if value is None else "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return shorten(", ".join(format_value(part) for part in value), _MAX_LENGTH) or "—"
    if isinstance(value, int):
        return shorten(f"{value:,}".replace(",", " "), _MAX_LENGTH)
    return f"{value:g}" if isinstance(value, float) else shorten(str(value), _MAX_LENGTH)


def format_size(bytes_: int) -> str:
    """A number of bytes with a binary unit, such as 2.0 KiB."""
    value, units = float(bytes_), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _model(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = section(manifest, "model")
    names = [("name", format_value(model_title(manifest)))] if model.get("name") or model.get("title") else []
    names += _labelled_rows(model, ("revision", "architecture"))
    rows = [*names, *_stacks(model), *_labelled_rows(model, ("width", "parameters", "weights_digest", "residual"))]
    refusals = section(model, "layout", "residual_refusals")
    rows += [(f"residual of {stack}", format_value(why)) for stack, why in refusals.items()]
    if name := section(manifest, "tokenizer").get("name"):
        rows.append(("tokenizer", format_value(name)))
    return rows + _images(section(manifest, "images"))


def _labelled_rows(facts: Mapping[str, Any], labels: Sequence[str]) -> list[tuple[str, str]]:
    return [(label.replace("_", " "), format_value(facts[label])) for label in labels if facts.get(label) is not None]


def _stacks(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Layers and heads of each stack and how its attention was captured; then the layers without a pattern."""
    layout = section(model, "layout")
    rows = []
    for facts in model.get("stacks") or []:
        layers = [layer for layer in layout.get("attention") or [] if layer["stack"] == facts["stack"]]
        texts = [_layers_and_heads(facts, layers)]
        ways = sorted({layer["way"] for layer in layers if layer.get("way")})
        if ways:
            texts.append(f"seen by {' and '.join(ways)}")
        rows.append((f"stack {facts['stack']}", format_value(", ".join(text for text in texts if text) or None)))
    without_pattern = layout.get("without_pattern") or []
    return rows + ([("layers without a pattern", format_value(without_pattern))] if without_pattern else [])


def _layers_and_heads(stack: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str:
    """`6 layers × 12 heads`, or `2–4 heads` if layers differ; parts that the manifest lacks are left out."""
    counts = [layer.get("heads") for layer in layers] or [stack.get("heads")]
    heads = sorted({count for count in counts if count is not None})
    heads_text = "–".join(map(str, heads)) + (" head" if heads == [1] else " heads") if heads else ""
    layers_text = plural(stack["layers"], "layer") if stack.get("layers") is not None else ""
    return " × ".join(text for text in (layers_text, heads_text) if text)


def _images(images: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = _labelled_rows(images, ("preprocessor",))
    if images.get("pixels"):
        shape = f"{' × '.join(map(str, images['pixels']))} pixels"
        tokens = images.get("tokens")
        rows.append(("image", shape if tokens is None else f"{shape}, {plural(tokens, 'token')}"))
    return rows + [
        (f"patches of {stack}", f"{grid['rows']} × {grid['columns']}")
        for stack, grid in (images.get("grids") or {}).items()
        if grid.get("rows") is not None and grid.get("columns") is not None
    ]


def _corpus(corpus: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = _labelled_rows(corpus, ("name", "documents", "sequences", "tokens", "content_tokens", "digest"))
    if corpus.get("files"):
        rows.append(("files", format_value(len(corpus["files"]))))
    dropped = corpus.get("dropped") or {}
    rows += [(f"dropped: {reason}", format_value(count)) for reason, count in sorted(dropped.items())]
    return rows


def _generation(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a dataset that has grown."""
    labels = ("number", "added", "changed", "removed", "measured_shards")
    return _labelled_rows(facts, labels) if facts.get("number", 1) > 1 else []


def _measurement(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = _labelled_rows(manifest, ("engine", "device", "dtype"))
    waste = manifest.get("padding_waste")
    if waste is not None:
        rows.append(("padded positions", f"{waste:.1%}"))
    run = {name: value for name, value in section(manifest, "run").items() if name not in _SHOWN_ABOVE}
    return rows + [(f"run: {name.replace('_', ' ')}", format_value(value)) for name, value in sorted(run.items())]


def _own_statistics(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    columns = manifest.get("own_statistics") or []
    return [(f"{c['table']}.{c['name']}", format_value(f"{c['formula']}, by {c['origin']}")) for c in columns]


def _tables(tables: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, table in tables.items():
        parts = table["parts"]
        size = format_size(sum(part["bytes"] for part in parts))
        rows.append((name, f"{plural(table.get('rows') or 0, 'row')}, {plural(len(parts), 'part')}, {size}"))
    return rows
