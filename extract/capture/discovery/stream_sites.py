"""The sites of one stack's stream, over layers between which its width does not change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch

from attlas.extract.capture.discovery.derivations import Derivation
from attlas.extract.capture.discovery.module_tree import common_prefix_length
from attlas.extract.capture.discovery.state_graph import Path, StateGraph
from attlas.extract.capture.discovery.sublayers import Sublayer
from attlas.extract.capture.discovery.trace import Event, Trace
from attlas.extract.capture.layer_lists import LayerLists
from attlas.extract.capture.layout import HookPoint, Norm, Site, Update


class NoStream(Exception):
    """Why the stream of a stack is not measured."""


class _SiteUpdate(NamedTuple):
    """An update, the name of its site, and the attention sublayer to whose layer it belongs."""

    update: Update
    site: str
    sublayer: Sublayer


class StreamSites:
    """Finds the sites along the paths of a stream."""

    def __init__(
        self, trace: Trace, stack: str, sublayers: list[Sublayer], graph: StateGraph, lists: LayerLists
    ) -> None:
        self.trace, self.stack, self.sublayers = trace, stack, sublayers
        self.graph, self.lists = graph, lists

    def sites(self, *, with_embedding: bool) -> list[tuple[int, Site]]:
        """Return each site with the moment at which its last point has been read.

        Raises NoStream if an update is missing or can't be assigned.
        """
        paths = sorted(self.graph.paths(self.sublayers), key=lambda path: path.sublayers[0].moment)
        self._refuse_missing(paths)
        all_sites: list[Site] = []
        for path in paths:
            sums = list(self._sums(path))
            sites = [site for number, updates in sums for site in self._sites_of_sum(path, number, updates)]
            self._refuse_unfinished(path, sites)
            if with_embedding and path is paths[0]:
                sites.insert(0, self._embedding(self.graph.derivations[sums[0][0]]))
            if path is paths[-1]:
                sites += self._final_norm(path)
            token_first = self._is_token_first(path)
            all_sites += [
                replace(site, token_first=token_first, overwritten=self._overwritten_points(site)) for site in sites
            ]
        return [(max(self.graph.moment_of[point] for point in site.hook_points), site) for site in all_sites]

    def _refuse_missing(self, paths: Sequence[Path]) -> None:
        """Every attention sublayer must lie on a path."""
        on_paths = [sublayer for path in paths for sublayer in path.sublayers]
        missing = [sublayer for sublayer in self.sublayers if sublayer not in on_paths]
        if not missing:
            return
        for group in self.graph.merged_sublayers(self.sublayers):
            if missing[0] in group:
                raise NoStream(
                    f"the attention calls of layers {sorted({s.layer for s in group})} have one update together"
                )
        raise NoStream(
            f"x' = x + F(x) was not found for {name_some([f'{s.site} of layer {s.layer}' for s in missing])}"
        )

    def _sums(self, path: Path) -> Iterator[tuple[int, list[_SiteUpdate]]]:
        """The sums of a path with their updates. Sums of embeddings and of layers without a pattern are left out."""
        in_layers = False
        for number in path.states:
            derivation = self.graph.derivations[number]
            if derivation is None or not derivation.updates or number == path.states[0]:
                continue
            sublayers = self.graph.sublayers_at(number, path.sublayers)
            updates = self._assign(derivation, sublayers)
            modules = [each.update.point.module for each in updates]
            in_layers = in_layers or bool(sublayers) or any(self.lists.layer_of(module) for module in modules)
            if not in_layers or not (sublayers or any(self.lists.may_attend(module) for module in modules)):
                continue
            if derivation.base_factor != 1:
                where = name_some([f"{each.site} of layer {each.sublayer.layer}" for each in updates])
                raise NoStream(
                    f"x is multiplied by {derivation.base_factor:.4g} before F(x) is added to it, at {where}"
                )
            yield number, updates

    def _assign(self, derivation: Derivation, sublayers: Sequence[Sublayer]) -> list[_SiteUpdate]:
        """Give each attention sublayer the update of the module nearest to it. The others are the layer's mlp."""
        remaining = sorted(derivation.updates, key=self.graph.first_moment)
        assigned = []
        for sublayer in sublayers:
            later = [update for update in remaining if self.graph.first_moment(update) > sublayer.moment]
            if not later:
                raise NoStream(f"x' = x + F(x) was not found for {sublayer.site} of layer {sublayer.layer}")
            nearest = max(later, key=lambda u: common_prefix_length(u.point.module, sublayer.call.modules[-1]))
            remaining.remove(nearest)
            assigned.append(_SiteUpdate(nearest, sublayer.site, sublayer))
        return [*assigned, *(_SiteUpdate(update, "mlp", self._layer_of_mlp(update)) for update in remaining)]

    def _layer_of_mlp(self, update: Update) -> Sublayer:
        """The attention before an update without one, unless the update is nearer to the next in the module tree."""
        when = self.graph.first_moment(update)
        before = [sublayer for sublayer in self.sublayers if sublayer.moment < when]
        after = [sublayer for sublayer in self.sublayers if sublayer.moment > when]
        if not before or not after:
            return before[-1] if before else after[0]
        to_last, to_next = (
            common_prefix_length(update.point.module, sublayer.call.modules[-1]) for sublayer in (before[-1], after[0])
        )
        return after[0] if to_next > to_last else before[-1]

    def _sites_of_sum(self, path: Path, number: int, updates: Sequence[_SiteUpdate]) -> Iterator[Site]:
        derivation, states = self.graph.derivations[number], self.graph.states
        assert derivation is not None
        for index, (update, name, sublayer) in enumerate(updates):
            yield Site(
                name=name,
                layer=sublayer.layer,
                after=states[number].best_point if index == len(updates) - 1 else None,
                stack=self.stack,
                before=states[derivation.base].best_point,
                update=update,
                norm=self._norm_of(path, number, update, first=index == 0),
                parallel=tuple(other.update for other in updates[:index]),
                attention=None if name == "mlp" else (sublayer.attention.stack, sublayer.attention.layer),
            )

    def _norm_of(self, path: Path, number: int, update: Update, *, first: bool) -> Norm | None:
        """The norm that turns x' into the next x, else the reader of x nearest to the update, the last of several in a row."""
        next_states = path.states[path.states.index(number) + 1 :][:1]
        if next_states:
            post = self.graph.norm_to(next_states[0])
        else:
            post = next(iter(self.graph.readers(number)), None) if self._is_post_norm(path) else None
        if post is not None:
            return post
        derivation = self.graph.derivations[number]
        assert derivation is not None
        readers = self.graph.readers(derivation.base, before=self.graph.first_moment(update))
        ordered = readers if first else readers[::-1]
        return max(ordered, key=lambda norm: common_prefix_length(norm.module, update.point.module), default=None)

    def _is_post_norm(self, path: Path) -> bool:
        """Whether a norm turns sums into the next x anywhere from the first attention sublayer on."""
        numbers = enumerate(path.states)
        begin = next(n for n, number in numbers if self.graph.sublayers_at(number, path.sublayers))
        return any(self.graph.norm_to(number) is not None for number in path.states[begin:])

    def _embedding(self, first: Derivation | None) -> Site:
        """The stream before the first sublayer; what a norm of the embeddings reads, if one makes it."""
        assert first is not None, "an update is added to a state"
        norm = self.graph.norm_to(first.base)
        after = self.graph.states[first.base].best_point if norm is None else norm.input
        return Site("embedding", 0, after=after, stack=self.stack, norm=norm)

    def _final_norm(self, path: Path) -> list[Site]:
        """The norm that reads the output of the last layer, if there is one besides the layer's own."""
        end = path.states[-1]
        if self._is_post_norm(path) and self.graph.norm_to(end) is None:
            own_norm = next(iter(self.graph.readers(end)), None)
            if own_norm is None:
                return []
            end = self.graph.number_of[own_norm.output]
        norm = next(iter(self.graph.readers(end)), None)
        if norm is None:
            return []
        return [Site("final_norm", path.sublayers[-1].layer, after=norm.input, stack=self.stack, norm=norm)]

    def _refuse_unfinished(self, path: Path, sites: Sequence[Site]) -> None:
        """A path must reach the end of its last layer: its mlp, or what the modules around its attention wrote."""
        last, end = path.sublayers[-1], path.states[-1]
        if any(site.name == "mlp" and site.layer == last.layer for site in sites):
            return
        ends = {end, *(self.graph.number_of[norm.output] for norm in self.graph.readers(end))}
        around = [name for name in last.call.modules if self.lists.layer_of(name) is not None]
        outputs = {n for name in around if (n := self._output_state(name, last)) is not None}
        updated = next(n for n in path.states if last in self.graph.sublayers_at(n, path.sublayers))
        if not {n for n in outputs if n >= updated} <= {*ends, *path.states}:
            raise NoStream(f"x' = x + F(x) was not found for what follows attention in layer {last.layer}")

    def _output_state(self, module: str, sublayer: Sublayer) -> int | None:
        """The number of the state that a module around a sublayer wrote."""
        event = next((e for e in self.trace.events if e.module == module and e.time > sublayer.call.time), None)
        return None if event is None else self.graph.number_of.get(HookPoint(module, event.call, "output"))

    def _is_token_first(self, path: Path) -> bool:
        """Whether the stream is [token, batch, width]; raises NoStream if its rows are not sequences and tokens."""
        call, batch = path.sublayers[0].call, self.trace.batch
        tokens = call.contexts.shape[1]  # with any padding that the model adds by itself
        state = self.graph.states[path.states[-1]]
        if call.batch == batch and len(state.tensor) != batch * tokens:
            raise NoStream(f"the stream has {len(state.tensor)} states for {batch * tokens} tokens that attention sees")
        shape = state.shape
        if len(shape) == 3 and shape[0] != batch and shape[:2] == (tokens, batch):
            return True
        rows = shape[0] if len(shape) > 2 else call.batch
        if rows % batch:
            raise NoStream(f"states of the stream are {list(shape)}, whose rows are not the batch's {batch} sequences")
        return False

    def _overwritten_points(self, site: Site) -> frozenset[HookPoint]:
        overwritten = set()
        for point in site.hook_points:
            event = self._events[point.module, point.call]
            if point.side == "input":
                copy, tensor = event.input, event.input_tensor
            else:
                copy, tensor = event.output, event.output_tensor
            if copy is not None and tensor is not None and not torch.equal(copy, tensor.to(copy.dtype)):
                overwritten.add(point)
        return frozenset(overwritten)

    @cached_property
    def _events(self) -> dict[tuple[str, int], Event]:
        return {(event.module, event.call): event for event in self.trace.events}


def name_some(names: Sequence[str]) -> str:
    """The first four names, for messages."""
    return f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
