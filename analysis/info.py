"""The manifest, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attlas.analysis.manifest import section
from attlas.analysis.naming import model_title
from attlas.analysis.report.numbers import plural
from attlas.extract.printable import shortened

_SAID_ABOVE = ("model", "corpus", "engine", "device", "dtype", "schema_version")
_LONGEST = 400
Section = tuple[str, list[tuple[str, str]]]


def describe(manifest: Mapping[str, Any]) -> list[Section]:
    """Sections of (label, value) that say what was measured, with what, and what came out."""
    sections = [
        ("Model", _model(manifest)),
        ("Corpus", _corpus(section(manifest, "corpus"))),
        ("Measurement", _measurement(manifest)),
        ("Tables", _tables(section(manifest, "tables"))),
        ("Software", [(name, number(version)) for name, version in sorted(section(manifest, "software").items())]),
    ]
    return [(title, rows) for title, rows in sections if rows]


def number(value: Any) -> str:
    """A count with its thousands apart; anything else as it is, the middle of a long text left out."""
    if isinstance(value, bool) or value is None:
        return "—" if value is None else "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return shortened(", ".join(number(part) for part in value), _LONGEST) or "—"
    if isinstance(value, int):
        return shortened(f"{value:,}".replace(",", " "), _LONGEST)
    return f"{value:g}" if isinstance(value, float) else shortened(str(value), _LONGEST)


def size(octets: int) -> str:
    """Bytes in the unit that people use."""
    value, units = float(octets), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _model(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = section(manifest, "model")
    named = [("name", number(model_title(manifest)))] if model.get("name") or model.get("title") else []
    named += _named(model, ("revision", "architecture"))
    rows = [*named, *_stacks(model), *_named(model, ("width", "parameters", "weights_digest", "residual"))]
    refusals = section(model, "layout", "residual_refusals")
    rows += [(f"residual of {stack}", number(why)) for stack, why in refusals.items()]
    if name := section(manifest, "tokenizer").get("name"):
        rows.append(("tokenizer", number(name)))
    return rows + _images(section(manifest, "images"))


def _named(facts: Mapping[str, Any], labels: Sequence[str]) -> list[tuple[str, str]]:
    return [(label.replace("_", " "), number(facts[label])) for label in labels if facts.get(label) is not None]


def _stacks(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each stack's layers and heads, and in which way its attention was seen; then the layers without a pattern."""
    layout = section(model, "layout")
    rows = []
    for facts in model.get("stacks") or []:
        layers = [layer for layer in layout.get("attention") or [] if layer["stack"] == facts["stack"]]
        told = [_size_of(facts, layers)]
        ways = sorted({layer["way"] for layer in layers if layer.get("way")})
        if ways:
            told.append(f"seen by {' and '.join(ways)}")
        rows.append((f"stack {facts['stack']}", number(", ".join(text for text in told if text) or None)))
    silent = layout.get("without_pattern") or []
    return rows + ([("layers without a pattern", number(silent))] if silent else [])


def _size_of(stack: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str:
    """`6 layers × 12 heads`, or `2–4 heads` where layers differ; as far as the manifest knows."""
    found = [layer.get("heads") for layer in layers] or [stack.get("heads")]
    heads = sorted({count for count in found if count is not None})
    each = "–".join(map(str, heads)) + (" head" if heads == [1] else " heads") if heads else ""
    number_of = plural(stack["layers"], "layer") if stack.get("layers") is not None else ""
    return " × ".join(text for text in (number_of, each) if text)


def _images(images: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = _named(images, ("preprocessor",))
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
    rows = _named(corpus, ("name", "documents", "sequences", "tokens", "content_tokens", "digest"))
    if corpus.get("files"):
        rows.append(("files", number(len(corpus["files"]))))
    dropped = corpus.get("dropped") or {}
    rows += [(f"dropped: {reason}", number(count)) for reason, count in sorted(dropped.items())]
    return rows


def _measurement(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = _named(manifest, ("engine", "device", "dtype"))
    waste = manifest.get("padding_waste")
    if waste is not None:
        rows.append(("padded positions", f"{waste:.1%}"))
    run = {name: value for name, value in section(manifest, "run").items() if name not in _SAID_ABOVE}
    return rows + [(f"run: {name.replace('_', ' ')}", number(value)) for name, value in sorted(run.items())]


def _tables(tables: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, table in tables.items():
        parts = table["parts"]
        octets = size(sum(part["bytes"] for part in parts))
        rows.append((name, f"{plural(table.get('rows') or 0, 'row')}, {plural(len(parts), 'part')}, {octets}"))
    return rows
