"""The page: content as JSON and compressed blocks, and the script that draws them, in one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from attlas.extract.errors import Refusal
from attlas.extract.files import write_atomically
from attlas.extract.printable import printable
from attlas.extract.view.content import Axis, Content, LayerPatterns

_HERE = Path(__file__).parent
_SCRIPTS = ("data", "colours", "heads", "matrix", "lines", "picture", "stream", "page")
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_EXCERPT = 280
# larger pages make notebooks slow to open and to save
_LARGEST_IN_NOTEBOOK = 40_000_000


@dataclass(frozen=True)
class View:
    """One input and every head of a model, as an HTML page: shown by notebooks, written by `save`."""

    content: Content
    model: str
    given: str  # the text, the name of the image, or a description of the tensors

    @cached_property
    def page(self) -> bytes:
        """The page, in UTF-8."""
        return render(self).encode()

    def save(self, path: Path | str) -> Path:
        """Write the page to a file, whole or not at all, and return its path."""
        if Path(path).is_dir():
            raise Refusal(f"a page is a file; {path} is a folder; give the name of a file in it")
        write_atomically(Path(path), self.page)
        return Path(path)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that neither its style nor its script reaches the notebook."""
        if len(self.page) > _LARGEST_IN_NOTEBOOK:
            return f"<p>{html.escape(repr(self))}: large for a notebook; write it with <code>.save(path)</code></p>"
        document = html.escape(self.page.decode(), quote=True)
        return (
            f'<iframe title="attlas: {html.escape(printable(self.model))}" sandbox="allow-scripts" srcdoc="{document}" '
            'style="width: 100%; height: 880px; border: 0"></iframe>'
        )

    def __repr__(self) -> str:
        return f"View of {printable(self.model)}: {_facts(self.content)}, {len(self.page) / 1e6:.1f} MB"


def render(view: View) -> str:
    """The page as HTML."""
    style = (_HERE / "style.css").read_text("utf-8")
    script = "".join((_HERE / f"{name}.js").read_text("utf-8") for name in _SCRIPTS)
    values = {
        "model": _text(view.model),
        "input": _text(_excerpt(view.given), limit=4 * _EXCERPT),
        "facts": _text(_facts(view.content), limit=240),
        "digits": {3: "3", 4: "4"}[view.content.digits],
        "style": f"\n{style}",
        "script": f"\n{script}",
        "style_digest": _digest(f"\n{style}"),
        "script_digest": _digest(f"\n{script}"),
        "data": _script_safe_json(_data(view.content)),
        "blocks": "\n".join(_blocks(view.content)),
    }
    template = (_HERE / "page.html").read_text("utf-8")
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _text(value: str, *, limit: int = 80) -> str:
    """Text from outside as HTML: on one line, control characters visible, markup escaped."""
    return html.escape(printable(" ".join(value.split()), limit=limit))


def _excerpt(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}…"


def _digest(source: str) -> str:
    """The digest by which the page's policy admits a script or style and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _facts(content: Content) -> str:
    facts = []
    for stack in dict.fromkeys(layer.stack for layer in content.layers):
        layers = [layer for layer in content.layers if layer.stack == stack]
        heads = sorted({layer.heads for layer in layers})
        several = f"{heads[0]}–{heads[-1]}" if len(heads) > 1 else str(heads[0])
        facts.append(f"{stack}: {len(layers)} layers × {several} heads")
    axis = content.layers[0].queries
    size = f"{len(axis):,} {'positions' if axis.kind == 'positions' else 'tokens'}"
    patches = [] if axis.grid is None else [f"{axis.grid.rows} × {axis.grid.columns} patches"]
    return " · ".join([size, *patches, *facts])


def _script_safe_json(data: Any) -> str:
    """JSON in ASCII without the characters that could end a script element or begin a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _data(content: Content) -> dict[str, Any]:
    """What the script reads first: axes, the shapes of layers and sites, and notes."""
    axes: dict[Axis, int] = {}
    layers = [_layer(layer, axes) for layer in content.layers]
    sites = [{"stack": s.stack, "layer": s.layer, "site": s.site, "axis": _number(s.axis, axes)} for s in content.sites]
    picture = None if content.picture is None else f"data:image/png;base64,{_base64(content.picture)}"
    return {
        "digits": content.digits,
        "axes": [_axis(axis) for axis in axes],
        "layers": layers,
        "sites": sites,
        "notes": [printable(note) for note in content.notes],
        "picture": picture,
    }


def _number(axis: Axis, axes: dict[Axis, int]) -> int:
    """The number of an axis among those of the page; equal ones are stored once."""
    return axes.setdefault(axis, len(axes))


def _layer(layer: LayerPatterns, axes: dict[Axis, int]) -> dict[str, Any]:
    return {
        "stack": layer.stack,
        "layer": layer.layer,
        "heads": layer.heads,
        "windows": layer.windows,
        "queries": _number(layer.queries, axes),
        "keys": _number(layer.keys, axes),
        "cells": list(layer.thumbnails.shape[1:]),
        "sink": layer.sink is not None,
    }


def _axis(axis: Axis) -> dict[str, Any]:
    grid = axis.grid
    return {
        "kind": axis.kind,
        "labels": list(axis.labels),
        "continues": [n for n, continues in enumerate(axis.continues) if continues],
        "special": [n for n, special in enumerate(axis.special) if special],
        "grid": None if grid is None else {"rows": grid.rows, "columns": grid.columns, "prefix": grid.prefix},
    }


def _blocks(content: Content) -> Iterator[str]:
    """The binary data, one inert script element each: thumbnails, quantities of rows, norms, and the weights of each head."""
    yield _block("thumbnails", zlib.compress(b"".join(layer.thumbnails.tobytes() for layer in content.layers)))
    rows = [array for layer in content.layers for array in (layer.entropy, layer.received, layer.sink)]
    yield _block("rows", _floats(array for array in rows if array is not None))
    yield _block("norms", _floats(array for site in content.sites for array in (site.norms, site.updates)))
    heads = (weights for layer in content.layers for weights in layer.weights)
    yield from (_block(f"head{number}", weights) for number, weights in enumerate(heads))


def _floats(arrays: Iterable[np.ndarray]) -> bytes:
    return zlib.compress(b"".join(np.ascontiguousarray(array, "<f4").tobytes() for array in arrays))


def _block(name: str, data: bytes) -> str:
    return f'<script type="application/octet-stream" id="{name}">{_base64(data)}</script>'


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
