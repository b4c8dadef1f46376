"""The manifest, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SAID_ABOVE = ("model", "corpus", "engine", "device", "dtype", "schema_version")
Section = tuple[str, list[tuple[str, str]]]


def describe(manifest: Mapping[str, Any]) -> list[Section]:
    """Sections of (label, value) that say what was measured, with what, and what came out."""
    sections = [
        ("Model", _model(manifest)),
        ("Corpus", _corpus(manifest.get("corpus", {}))),
        ("Measurement", _measurement(manifest)),
        ("Tables", _tables(manifest.get("tables", {}))),
        ("Software", [(name, str(version)) for name, version in sorted(manifest.get("software", {}).items())]),
    ]
    return [(title, rows) for title, rows in sections if rows]


def number(value: Any) -> str:
    """A count with its thousands apart; anything else as it is."""
    if isinstance(value, bool) or value is None:
        return "—" if value is None else "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(number(part) for part in value) or "—"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    return f"{value:g}" if isinstance(value, float) else str(value)


def size(octets: int) -> str:
    """Bytes in the unit that people use."""
    value, units = float(octets), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _model(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, tokenizer = manifest.get("model", {}), manifest.get("tokenizer", {})
    named = _named(model, ("name", "revision", "architecture"))
    rows = [*named, *_stacks(model), *_named(model, ("width", "parameters", "weights_digest", "residual"))]
    refusals = (model.get("layout") or {}).get("residual_refusals") or {}
    rows += [(f"residual of {stack}", str(why)) for stack, why in refusals.items()]
    if tokenizer.get("name"):
        rows.append(("tokenizer", str(tokenizer["name"])))
    return rows + _images(manifest.get("images") or {})


def _named(facts: Mapping[str, Any], labels: Sequence[str]) -> list[tuple[str, str]]:
    return [(label.replace("_", " "), number(facts[label])) for label in labels if facts.get(label) is not None]


def _stacks(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each stack's layers and heads, and in which way its attention was seen; then the layers without a pattern."""
    layout = model.get("layout") or {}
    rows = []
    for facts in model.get("stacks") or []:
        layers = [layer for layer in layout.get("attention", []) if layer["stack"] == facts["stack"]]
        heads = {layer["heads"] for layer in layers}
        of_layers = f"{facts['layers']} layer{'s' * (facts['layers'] != 1)} × {'–'.join(map(str, sorted(heads)))} heads"
        ways = sorted({layer["way"] for layer in layers})
        rows.append((f"stack {facts['stack']}", f"{of_layers}, seen by {' and '.join(ways)}"))
    silent = layout.get("without_pattern") or []
    return rows + ([("layers without a pattern", number(silent))] if silent else [])


def _images(images: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = _named(images, ("preprocessor",))
    if images.get("pixels"):
        rows.append(("image", f"{' × '.join(map(str, images['pixels']))} pixels, {images['tokens']} tokens"))
    return rows + [
        (f"patches of {stack}", f"{grid['rows']} × {grid['columns']}")
        for stack, grid in (images.get("grids") or {}).items()
    ]


def _corpus(corpus: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = _named(corpus, ("name", "documents", "sequences", "tokens", "content_tokens", "digest"))
    dropped = corpus.get("dropped") or {}
    rows += [(f"dropped: {reason}", number(count)) for reason, count in sorted(dropped.items())]
    return rows


def _measurement(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = _named(manifest, ("engine", "device", "dtype"))
    waste = manifest.get("padding_waste")
    if isinstance(waste, (int, float)):
        rows.append(("padded positions", f"{waste:.1%}"))
    run = {name: value for name, value in (manifest.get("run") or {}).items() if name not in _SAID_ABOVE}
    if run.get("corpus_files"):
        run["corpus_files"] = len(run["corpus_files"])
    return rows + [(f"run: {name.replace('_', ' ')}", number(value)) for name, value in sorted(run.items())]


def _tables(tables: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, table in tables.items():
        parts = table.get("parts", [])
        octets = size(sum(part["bytes"] for part in parts))
        rows.append(
            (name, f"{number(table.get('rows', 0))} rows, {len(parts)} part{'s' * (len(parts) != 1)}, {octets}")
        )
    return rows
