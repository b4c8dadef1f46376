"""The observer of a pass for a page: it packs the patterns of each layer as they arrive, so that few are in memory at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt16
from torch import Tensor

from attlas.extract.capture.layout import Attention, Layout, Site
from attlas.extract.engines.needs import Needs
from attlas.extract.engines.observations import HeadObservation, ResidualObservation
from attlas.extract.engines.patches import Grid
from attlas.extract.engines.stream_profiles import SiteSums
from attlas.extract.engines.sums import HeadSums
from attlas.extract.errors import Refusal
from attlas.extract.view.content import Axis, Content, LayerPatterns, StreamSite
from attlas.extract.view.labels import grid_axis, position_axis
from attlas.extract.view.weight_codes import HIDDEN, WeightCodes, compress_codes, encode_pattern

# up to so many weights, they have 4 digits; with more of them, the page would be much larger for the fourth
_WEIGHTS_WITH_4_DIGITS = 8_000_000
# beyond, the page would be larger than browsers open with ease (about 200 MB)
MAX_WEIGHTS = 100_000_000


class _Patterns(NamedTuple):
    """The codes of one attention call, and its row quantities."""

    codes: UInt16[np.ndarray, "window head query key"]
    rows: dict[str, Float[np.ndarray, "window head place"]]


class ViewObserver:
    """Collects what a page shows of one sequence.

    `texts` are the axes of the inputs of token ids, `grids` the patch grids of stacks.
    """

    needs = Needs(rows=frozenset({"entropy", "received", "sink"}), patterns=True, states=True)

    def __init__(self, layout: Layout, texts: Mapping[str, Axis], grids: Mapping[str, Grid]) -> None:
        self._layout = layout
        self._texts = texts
        self._grid_axes = {stack: grid_axis(grid) for stack, grid in grids.items()}
        self._codes: WeightCodes | None = None
        self.drop()

    def drop(self) -> None:
        """Forget a pass that is made again."""
        self._layers: list[LayerPatterns] = []
        self._states: list[tuple[Site, np.ndarray, np.ndarray]] = []

    def settle(self) -> None:
        """The pass went through; everything is kept already."""

    def heads(self, attention: Attention, sums: HeadSums, calls: Sequence[HeadObservation]) -> None:  # noqa: ARG002
        codes = self._codes or self._choose_codes(calls)
        parts = [_patterns_of(call, codes) for call in calls]
        if len({part.codes.shape[1:] for part in parts}) > 1:
            raise Refusal(
                f"the pieces in which a layer attends must have one size to be shown; layer {attention.layer} of the "
                f"{attention.stack} has several; give an image of another shape"
            )
        joined = np.concatenate([part.codes for part in parts]).swapaxes(0, 1)
        rows = {name: np.concatenate([part.rows[name] for part in parts]).swapaxes(0, 1) for name in parts[0].rows}
        queries = self._axis(attention.stack, attention.queries, joined.shape[-2])
        is_cross = attention.is_cross_attention
        keys = self._axis("" if is_cross else attention.stack, attention.keys, joined.shape[-1])
        self._layers.append(
            LayerPatterns(
                stack=attention.stack,
                layer=attention.layer,
                windows=joined.shape[1],
                queries=queries,
                keys=keys,
                weights=tuple(compress_codes(of_head) for of_head in joined),
                thumbnails=codes.thumbnails(joined.max(1)),
                entropy=rows["entropy"],
                received=rows["received"],
                sink=rows.get("sink"),
            )
        )

    def residual(self, site: Site, sums: SiteSums) -> None:
        """No columns are asked for."""

    def layer(self, site: Site, sums: SiteSums) -> None:
        """No columns are asked for."""

    def state(self, site: Site, o: ResidualObservation) -> None:
        real = _array(o.real[0])
        norms = _array(o.after_norms[0]).astype(np.float32)[real]
        updates = np.full_like(norms, np.nan) if o.update_norms is None else _array(o.update_norms[0])[real]
        self._states.append((site, norms, updates.astype(np.float32)))

    def content(self, *, notes: Sequence[str] = (), picture: bytes | None = None) -> Content:
        """What the pass has shown."""
        assert self._codes is not None, "a layout has attention calls"
        sites = [
            StreamSite(site.stack, site.layer, site.name, self._stream_axis(site.stack, len(norms)), norms, updates)
            for site, norms, updates in self._states
        ]
        return Content(self._codes.digits, tuple(self._layers), tuple(sites), tuple(notes), picture)

    def _choose_codes(self, calls: Sequence[HeadObservation]) -> WeightCodes:
        """By the number of weights of all layers, if they are as large as the first."""
        of_head = sum(call.rows.measured[:, 0].numel() * call.visibility.keys.tokens for call in calls)
        weights = of_head * sum(a.heads for a in self._layout.attentions)
        if weights > MAX_WEIGHTS:
            tokens = calls[0].visibility.queries.tokens
            raise Refusal(
                f"a page holds every weight of every head, at most {MAX_WEIGHTS:,}; {tokens:,} tokens of this model have about "
                f"{weights:,}; give an input of at most {int(tokens * (MAX_WEIGHTS / weights) ** 0.5):,} tokens"
            )
        self._codes = WeightCodes(4 if weights <= _WEIGHTS_WITH_4_DIGITS else 3)
        return self._codes

    def _axis(self, stack: str, text: str | None, size: int) -> Axis:
        candidates = (self._texts.get(text or ""), self._grid_axes.get(stack))
        return next((axis for axis in candidates if axis is not None and len(axis) == size), position_axis(size))

    def _stream_axis(self, stack: str, size: int) -> Axis:
        """The axis of a stack's tokens: that of its queries, if it has as many."""
        queries = (layer.queries for layer in self._layers if layer.stack in (stack, "cross"))
        return next((axis for axis in queries if len(axis) == size), position_axis(size))


def _patterns_of(call: HeadObservation, codes: WeightCodes) -> _Patterns:
    """The patterns of a call without padding."""
    visibility, measured = call.visibility, _array(call.rows.measured)
    shape = (*measured.shape, visibility.keys.tokens)
    encoded = np.full(shape, HIDDEN, np.uint16)
    for block in call.blocks():
        encoded[:, :, block.rows, block.keys] = encode_pattern(
            codes, _array(block.pattern), _array(block.visible), _array(block.measured)
        )
    # without what is padding in every window
    queries, keys = (_array(axis.real.any(0)) for axis in (visibility.queries, visibility.keys))
    rows = {}
    for name, kept in (("entropy", queries), ("received", keys), ("sink", queries)):
        values = call.rows.get(name)
        if values is not None:
            of_axis = _array(values).astype(np.float32)
            rows[name] = (of_axis if name == "received" else np.where(measured, of_axis, np.nan))[..., kept]
    return _Patterns(encoded[:, :, queries][..., keys], rows)


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor in host memory, in float32 if it is of a shorter type."""
    on_host = tensor.detach().cpu()
    return (on_host.float() if on_host.is_floating_point() and on_host.element_size() < 4 else on_host).numpy()
