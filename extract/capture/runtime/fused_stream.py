"""The residual stream on a GPU: one launch for a site, and nothing that waits for the device before the pass is over."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attlas.extract.capture.layout import WHOLE_LAYER, Site, Update
from attlas.extract.capture.runtime.stream import Stream, stack_columns
from attlas.extract.engines.stream_profiles import SiteSums
from attlas.extract.engines.triton import layers
from attlas.extract.engines.triton.layers import LayerResults
from attlas.extract.engines.triton.residual import COLUMNS, IDENTITY, MAKES, SiteResults, SiteTensors


class _MeasuredSite(NamedTuple):
    """A site whose results wait for the end of the pass, as the n-th of `results`, with what torch has computed."""

    site: Site
    results: SiteResults
    number: int
    roundoff: float
    in_torch: dict[str, Tensor | None]


class _Likeness(NamedTuple):
    """What the states of sites have in common whose results lie side by side."""

    stack: str
    states: int
    width: int
    device: torch.device


class _MeasuredLayer(NamedTuple):
    """A layer whose results wait for the end of the pass, as the n-th of `results`."""

    layer: Site
    results: LayerResults
    number: int


class FusedStream(Stream):
    """The residual sites and layers of one forward pass, measured by Triton kernels; in torch where they do not support the tensors.

    They are handed to the observer in `finish`, except those that are measured in torch.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # columns that the kernels do not compute, with their functions in plain torch
        self._torch_columns = {name: compute for name, compute in self.columns.items() if name not in MAKES}
        self._makes_all = tuple(self.columns) == COLUMNS
        self._results: dict[_Likeness, SiteResults] = {}
        self._measured: list[_MeasuredSite] = []
        self._layers_by_torch = not {*layers.COLUMNS}.issuperset(self._observer.needs.layer_names)
        self._layer_results: dict[_Likeness, LayerResults] = {}
        self._measured_layers: list[_MeasuredLayer] = []

    def finish(self) -> None:
        made = {results: results.columns() for results in self._results.values() if results.measured}
        columns = {results: rows.unbind() for results, rows in made.items()}
        counts = self._norm_counts()
        for site, results, number, _, in_torch in self._measured:
            values = self._chosen(columns[results][number], in_torch)
            self._observer.residual(site, SiteSums(values, counts[results][number] if counts else None))
        self._hand_over_layers()
        identities = {results: _identities(rows) for results, rows in made.items()}
        for site, results, number, roundoff, _ in self._measured:
            if site.update is not None:
                self._identities.append((site, roundoff, identities[results][number]))
        super().finish()

    def _hand_over_layers(self) -> None:
        names = self._observer.needs.layer_names
        made = {results: results.columns() for results in self._layer_results.values() if results.measured}
        values = {results: torch.stack([columns[name] for name in names], 1) for results, columns in made.items()}
        for layer, results, number in self._measured_layers:
            self._observer.layer(layer, SiteSums(values[results][number]))

    def _norm_counts(self) -> dict[SiteResults, Float[Tensor, "site 1 bin"]]:
        """Counts of tokens by the norms of their states, of all sites, if they are asked for."""
        if not self._observer.needs.stream_profiles:
            return {}
        return {results: results.norm_counts()[:, None] for results in self._results.values() if results.measured}

    def _observe_site(self, site: Site) -> None:
        results = self._results_of(site)
        tensors = self._site_tensors(site, results)
        if tensors is None or not _measure(site, tensors, results):
            super()._observe_site(site)
            return
        in_torch: dict[str, Tensor | None] = {}
        if self._torch_columns or self._observer.needs.states:
            observation = self._observation(site, results.axis, tensors.contexts)
            in_torch = self._observe_states(site, observation, self._torch_columns)
        if site.attention is not None:
            self._contexts.pop(site.attention, None)
        self._measured.append(_MeasuredSite(site, results, results.measured - 1, self._roundoff(site), in_torch))

    def _observe_layer(self, layer: Site) -> None:
        assert layer.before is not None and layer.after is not None, "a layer has both"
        results = None if self._layers_by_torch else self._results_of_layer(layer)
        ends = (self._in_batch_shape(layer, self._tensors[point]) for point in (layer.before, layer.after))
        if results is None or not results.measure(*ends):
            super()._observe_layer(layer)
            return
        self._measured_layers.append(_MeasuredLayer(layer, results, results.measured - 1))

    def _results_of_layer(self, layer: Site) -> LayerResults:
        """Where the results of layers go whose states are like this layer's."""
        key = self._likeness(layer)
        if key not in self._layer_results:
            number = sum(other.stack == layer.stack and other.name == WHOLE_LAYER for other in self._watched)
            self._layer_results[key] = LayerResults(self._axis(layer), key.width, key.device, layers=number)
        return self._layer_results[key]

    def _results_of(self, site: Site) -> SiteResults:
        """Where the results of sites go whose states are like this site's."""
        key = self._likeness(site)
        if key not in self._results:
            sites = sum(other.stack == site.stack for other in self.sites)
            self._results[key] = SiteResults(
                self._axis(site),
                key.width,
                key.device,
                sites=sites,
                counts_norms=self._observer.needs.stream_profiles,
            )
        return self._results[key]

    def _likeness(self, site: Site) -> _Likeness:
        state = self._first_state(site)
        return _Likeness(site.stack, self._state_count(site), state.shape[-1], state.device)

    def _site_tensors(self, site: Site, results: SiteResults) -> SiteTensors | None:
        """The site's tensors as the kernels read them; None if they have no place for what the site adds up."""
        tensors = self._tensors
        after = None if site.after is None else self._in_shape(site, tensors[site.after], results)
        before = beside = update = gain = read = wrote = None
        if site.before is not None and site.update is not None:
            before = self._in_shape(site, tensors[site.before], results)
            update = self._in_shape(site, tensors[site.update.point], results)
            gain = None if site.update.gain is None else self._gains[site.update.gain]
            if site.parallel:
                other, *further = site.parallel
                if further or not _is_plain(other):
                    return None
                beside = self._in_shape(site, tensors[other.point], results)
        if site.norm is not None:
            read = self._in_shape(site, tensors[site.norm.input], results)
            wrote = self._in_shape(site, tensors[site.norm.output], results)
        return SiteTensors(after, before, beside, update, read, wrote, gain, self._peek_contexts(site, results))

    def _in_shape(self, site: Site, tensor: Tensor, results: SiteResults) -> Float[Tensor, "batch token width"]:
        """The tensor in the batch's own shape, in its own type."""
        if tensor.shape == results.shape and not site.token_first:
            return tensor
        return self._in_batch_shape(site, tensor)

    def _peek_contexts(self, site: Site, results: SiteResults) -> Tensor | None:
        """The contexts, if they are over the tokens of the stream; they stay where they are."""
        if site.attention is None:
            return None
        tokens, contexts = self._contexts.get(site.attention, (0, None))
        return contexts if tokens == results.axis.tokens else None

    def _chosen(self, made: Tensor, in_torch: dict[str, Tensor | None]) -> Float[Tensor, "column batch"]:
        """The columns that are asked for, of those that the kernels and torch made."""
        made = made[: IDENTITY.start]
        if self._makes_all:
            return made
        values = {**dict(zip(COLUMNS, made.unbind(), strict=True)), **in_torch}
        return stack_columns(values, tuple(self.columns), made[0])


def _measure(site: Site, tensors: SiteTensors, results: SiteResults) -> bool:
    factor = 1.0 if site.update is None else site.update.factor
    if site.norm is None:
        return results.measure(tensors, factor=factor)
    return results.measure(tensors, factor=factor, kind=site.norm.kind, epsilon=site.norm.epsilon)


def _is_plain(update: Update) -> bool:
    return update.factor == 1 and update.gain is None


def _identities(results: Float[Tensor, "site row batch"]) -> tuple[Tensor, ...]:
    """‖x' − x − F‖ and ‖x'‖ + ‖x‖ of each site, over the batch."""
    off, after, before = results[:, IDENTITY].sum(-1).sqrt().unbind(1)
    return torch.stack([off, after + before], 1).unbind()
