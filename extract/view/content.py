"""What a page shows, as plain values: axes of tokens, packed patterns, and the norms of the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from attlas.extract.engines.patches import Grid


@dataclass(frozen=True)
class Axis:
    """The tokens of one side of a pattern, as they are shown.

    `continues` marks pieces of a word after its first, `special` the tokens that belong to no text.
    """

    kind: str  # tokens, patches or positions
    labels: tuple[str, ...]
    continues: tuple[bool, ...]
    special: tuple[bool, ...]
    grid: Grid | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class LayerPatterns:
    """The patterns of one attention layer. A layer that attends in windows has several for each head.

    `weights` are the compressed codes [window, query, key] of each head. Row and key quantities are NaN where undefined.
    """

    stack: str
    layer: int
    windows: int
    queries: Axis
    keys: Axis
    weights: tuple[bytes, ...]
    thumbnails: UInt8[np.ndarray, "head cell_row cell_key"]
    entropy: Float[np.ndarray, "head window query"]
    received: Float[np.ndarray, "head window key"]
    sink: Float[np.ndarray, "head window query"] | None = None

    @property
    def heads(self) -> int:
        return len(self.weights)


@dataclass(frozen=True)
class StreamSite:
    """Norms of the residual stream after a sublayer, and of what it added, per token; NaN where there is no update."""

    stack: str
    layer: int
    site: str
    axis: Axis
    norms: Float[np.ndarray, " token"]
    updates: Float[np.ndarray, " token"]


@dataclass(frozen=True)
class Content:
    """Everything on a page about one input."""

    digits: int  # significant digits of weights from 0.0001 on
    layers: tuple[LayerPatterns, ...]
    sites: tuple[StreamSite, ...] = ()
    notes: tuple[str, ...] = ()
    picture: bytes | None = None  # the image as the model reads it, as PNG

    @property
    def weights(self) -> int:
        """The number of weights in all patterns."""
        return sum(layer.heads * layer.windows * len(layer.queries) * len(layer.keys) for layer in self.layers)
