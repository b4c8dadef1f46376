"""The manifest, for people."""

from __future__ import annotations

from collections.abc import Mapping
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
    labels = ("name", "revision", "architecture", "stack", "layers", "heads", "width", "parameters", "weights_digest")
    rows = [(label.replace("_", " "), number(model[label])) for label in labels if model.get(label) is not None]
    if tokenizer.get("name"):
        rows.append(("tokenizer", str(tokenizer["name"])))
    return rows


def _corpus(corpus: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels = ("name", "documents", "sequences", "tokens", "content_tokens", "digest")
    rows = [(label.replace("_", " "), number(corpus[label])) for label in labels if corpus.get(label) is not None]
    dropped = corpus.get("dropped") or {}
    rows += [(f"dropped: {reason}", number(count)) for reason, count in sorted(dropped.items())]
    return rows


def _measurement(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (label, number(manifest[label])) for label in ("engine", "device", "dtype") if manifest.get(label) is not None
    ]
    waste = manifest.get("padding_waste")
    if isinstance(waste, (int, float)):
        rows.append(("padded positions", f"{waste:.1%}"))
    run = {name: value for name, value in (manifest.get("run") or {}).items() if name not in _SAID_ABOVE}
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
