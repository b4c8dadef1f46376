"""Find the sites of the residual streams in the trace of a probe: follow the stream through the sums it is made of.

A stack's stream is the path of states, each x' = x + F(x) or a norm of the one before, that goes through most of its
attention calls: QK-norms and sums inside a sublayer lie on no such path. What is added with an attention call inside is
that layer's `attention` or `cross_attention`, what is added without one its `mlp`.

The norm of a site is the one that reads x (pre-norm, sandwich), or that makes the next x of x' (post-norm). In a sandwich
F is what the second norm wrote: that is what is added. Parallel sublayers, x' = x + F + G, are measured as if one came
after the other: `attention` from x to x + F, a state that the model never makes, and `mlp` from there to x'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn

from attlas.extract.capture.discovery.derivations import Added, Step
from attlas.extract.capture.discovery.module_tree import Lists, common_prefix_length
from attlas.extract.capture.discovery.state_graph import Path, Streams
from attlas.extract.capture.discovery.sublayers import Member, members_of, width_of
from attlas.extract.capture.discovery.trace import Event, Trace
from attlas.extract.capture.layout import Attention, Norm, Site, Tap, Update


class _Refused(Exception):
    """Why a stack's stream is not measured."""


class _Part(NamedTuple):
    """An update of a step, the site that it is, and its layer."""

    added: Added
    site: str
    member: Member


def find_sites(
    trace: Trace, attentions: Sequence[Attention], modules: Mapping[str, nn.Module]
) -> tuple[tuple[Site, ...], dict[str, str]]:
    """The sites of every stack in the order in which they are complete, and of each stack that has none the reason."""
    lists = Lists(trace.calls, modules)
    known: dict[int, Streams] = {}
    found: list[tuple[int, Site]] = []
    refusals: dict[str, str] = {}
    for stack, members in members_of(trace, attentions).items():
        try:
            sites, left_out = _sites_of_stack(trace, stack, members, modules, lists, known)
            found += sites
            if left_out is not None:
                refusals[stack] = left_out
        except _Refused as refused:
            refusals[stack] = str(refused)
    return tuple(site for _, site in sorted(found, key=lambda timed: timed[0])), refusals


def one_refusal(sites: Sequence[Site], refusals: Mapping[str, str]) -> str | None:
    """Why nothing is measured; None where something is."""
    if sites:
        return None
    reasons = dict.fromkeys(refusals.values())
    return next(iter(reasons)) if len(reasons) == 1 else "; ".join(f"{k}: {v}" for k, v in refusals.items())


def _sites_of_stack(
    trace: Trace,
    stack: str,
    members: list[Member],
    modules: Mapping[str, nn.Module],
    lists: Lists,
    known: dict[int, Streams],
) -> tuple[list[tuple[int, Site]], str | None]:
    """A stack whose width changes on its way, as between stages, has a stream of each width."""
    widths = [width_of(trace, member) for member in members]
    found: list[tuple[int, Site]] = []
    for width, part in groupby(zip(widths, members, strict=True), key=lambda pair: pair[0]):
        if width is None:
            raise _Refused("no output projection was found, so the stream's width is not known")
        if width not in known:
            known[width] = Streams(trace, modules, width)
        stream = _Stream(trace, stack, [member for _, member in part], known[width], lists)
        found = [timed for timed in found if timed[1].name != "final_norm"]  # of a stage, not of the stack
        found += stream.sites(begins=not found)
    return _without_nameless(found)


def _without_nameless(found: list[tuple[int, Site]]) -> tuple[list[tuple[int, Site]], str | None]:
    """The sites without those of layers that add more to the stream than the catalogue has names for, and what is left out."""
    counts = Counter((site.name, site.layer) for _, site in found)
    repeated = {key for key, count in counts.items() if count > 1}
    refused = [f"{name} of layer {layer}" for name, layer in sorted(repeated, key=lambda key: key[1]) if name != "mlp"]
    if refused:
        raise _Refused(f"more than one update was found for {_some(refused)}")
    if not repeated:
        return found, None
    layers = sorted(layer for _, layer in repeated)
    note = f"what layers {layers} add besides attention is left out: it is more than one update"
    return [(when, site) for when, site in found if (site.name, site.layer) not in repeated], note


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}"


class _Stream:
    """A stack's stream while its width is the same."""

    def __init__(self, trace: Trace, stack: str, members: list[Member], streams: Streams, lists: Lists) -> None:
        self.trace, self.stack, self.members = trace, stack, members
        self.streams, self.lists = streams, lists

    def sites(self, *, begins: bool) -> list[tuple[int, Site]]:
        """The sites with the moments at which they are complete; the embedding where the stack begins with this stream."""
        paths = sorted(self.streams.paths(self.members), key=lambda path: path.members[0].moment)
        self._refuse_uncovered(paths)
        found: list[Site] = []
        for path in paths:
            steps = list(self._steps(path))
            sites = [site for number, parts in steps for site in self._sites_of_step(path, number, parts)]
            self._refuse_unfinished(path, sites)
            if begins and path is paths[0]:
                sites.insert(0, self._embedding(self.streams.steps[steps[0][0]]))
            if path is paths[-1]:
                sites += self._final_norm(path)
            token_first = self._is_token_first(path)
            found += [replace(site, token_first=token_first, overwritten=self._overwritten(site)) for site in sites]
        return [(max(self.streams.moment_of[tap] for tap in site.taps), site) for site in found]

    def _refuse_uncovered(self, paths: Sequence[Path]) -> None:
        found = [member for path in paths for member in path.members]
        absent = [member for member in self.members if member not in found]
        if not absent:
            return
        for bundle in self.streams.bundles(self.members):
            if absent[0] in bundle:
                raise _Refused(
                    f"the attention calls of layers {sorted({m.layer for m in bundle})} have one update together"
                )
        raise _Refused(f"x' = x + F(x) was not found for {_some([f'{m.site} of layer {m.layer}' for m in absent])}")

    def _steps(self, path: Path) -> Iterator[tuple[int, list[_Part]]]:
        """The sums on the way and what they are; none of embeddings that are added up, nor of layers without a pattern."""
        begun = False
        for number in path.states:
            step = self.streams.steps[number]
            if step is None or not step.updates or number == path.states[0]:
                continue
            inside = self.streams.inside(number, path.members)
            parts = self._parts(step, inside)
            begun = begun or bool(inside) or any(self.lists.member(self._module(p.added)) for p in parts)
            if not begun or not (inside or any(self.lists.attends(self._module(p.added)) for p in parts)):
                continue
            if step.skip != 1:
                where = _some([f"{p.site} of layer {p.member.layer}" for p in parts])
                raise _Refused(f"x is multiplied by {step.skip:.4g} before F(x) is added to it, at {where}")
            yield number, parts

    def _parts(self, step: Step, inside: Sequence[Member]) -> list[_Part]:
        """Each attention call has the update of a module nearest to it; the others are the layer's mlp."""
        left = sorted(step.updates, key=lambda added: self.streams.states[added.state].first)
        parts = []
        for member in inside:
            after = [u for u in left if self.streams.states[u.state].first > member.moment]
            if not after:
                raise _Refused(f"x' = x + F(x) was not found for {member.site} of layer {member.layer}")
            nearest = max(after, key=lambda u: common_prefix_length(self._module(u), member.call.inside[-1]))
            left.remove(nearest)
            parts.append(_Part(nearest, member.site, member))
        return [*parts, *(_Part(added, "mlp", self._owner(added)) for added in left)]

    def _owner(self, added: Added) -> Member:
        """The layer of an update without attention: the one before it, unless it stands nearer to the next."""
        when = self.streams.states[added.state].first
        before = [member for member in self.members if member.moment < when]
        after = [member for member in self.members if member.moment > when]
        if not before or not after:
            return before[-1] if before else after[0]
        near, next_ = (common_prefix_length(self._module(added), m.call.inside[-1]) for m in (before[-1], after[0]))
        return after[0] if next_ > near else before[-1]

    def _module(self, added: Added) -> str:
        return self._update(added).tap.module

    def _update(self, added: Added) -> Update:
        tap = self.streams.states[added.state].output
        assert tap is not None, "an update is what a module wrote"
        return Update(tap, added.factor, added.gain)

    def _sites_of_step(self, path: Path, number: int, parts: Sequence[_Part]) -> Iterator[Site]:
        step, states = self.streams.steps[number], self.streams.states
        assert step is not None
        updates = [self._update(part.added) for part in parts]
        for place, part in enumerate(parts):
            yield Site(
                name=part.site,
                layer=part.member.layer,
                after=states[number].tap if place == len(parts) - 1 else None,
                stack=self.stack,
                stream=states[step.base].tap,
                update=updates[place],
                norm=self._norm_of(path, number, part.added, first=place == 0),
                beside=tuple(updates[:place]),
                heads=None if part.site == "mlp" else (part.member.attention.stack, part.member.attention.layer),
            )

    def _norm_of(self, path: Path, number: int, added: Added, *, first: bool) -> Norm | None:
        """The norm that makes the next x of x', else the one that read x nearest to the update; in a row, the last does."""
        following = path.states[path.states.index(number) + 1 :][:1]
        if following:
            post = self.streams.norm_to(following[0])
        else:
            post = next(iter(self.streams.readers(number)), None) if self._is_post_norm(path) else None
        if post is not None:
            return post
        step = self.streams.steps[number]
        assert step is not None
        before = self.streams.readers(step.base, before=self.streams.states[added.state].first)
        ordered = before if first else before[::-1]
        return max(ordered, key=lambda norm: common_prefix_length(norm.module, self._module(added)), default=None)

    def _is_post_norm(self, path: Path) -> bool:
        """Whether what an attention call or an mlp is added to is what a norm has made of a sum."""
        begin = next(n for n, number in enumerate(path.states) if self.streams.inside(number, path.members))
        return any(self.streams.norm_to(number) is not None for number in path.states[begin:])

    def _embedding(self, first: Step | None) -> Site:
        """The stream as the first sublayer finds it; where a norm of the embeddings makes it, what that norm reads."""
        assert first is not None, "an update is added to a state"
        maker = self.streams.norm_to(first.base)
        after = self.streams.states[first.base].tap if maker is None else maker.read
        return Site("embedding", 0, after=after, stack=self.stack, norm=maker)

    def _final_norm(self, path: Path) -> list[Site]:
        """The norm that reads what the last layer leaves, where it is not the layer's own."""
        end = path.states[-1]
        if self._is_post_norm(path) and self.streams.norm_to(end) is None:
            own = next(iter(self.streams.readers(end)), None)
            if own is None:
                return []
            end = self.streams.number_of[own.wrote]
        final = next(iter(self.streams.readers(end)), None)
        if final is None:
            return []
        return [Site("final_norm", path.members[-1].layer, after=final.read, stack=self.stack, norm=final)]

    def _refuse_unfinished(self, path: Path, sites: Sequence[Site]) -> None:
        """A path goes to the end of its last layer: to what the modules around the attention call wrote, or to its mlp."""
        last, end = path.members[-1], path.states[-1]
        if any(site.name == "mlp" and site.layer == last.layer for site in sites):
            return
        ends = {end, *(self.streams.number_of[norm.wrote] for norm in self.streams.readers(end))}
        around = [name for name in last.call.inside if self.lists.member(name) is not None]
        wrote = {n for name in around if (n := self._wrote(name, last)) is not None}
        updated = next(n for n in path.states if last in self.streams.inside(n, path.members))
        if not {n for n in wrote if n >= updated} <= {*ends, *path.states}:
            raise _Refused(f"x' = x + F(x) was not found for what follows attention in layer {last.layer}")

    def _wrote(self, module: str, member: Member) -> int | None:
        event = next((e for e in self.trace.events if e.module == module and e.time > member.call.time), None)
        return None if event is None else self.streams.number_of.get(Tap(module, event.call, "output"))

    def _is_token_first(self, path: Path) -> bool:
        """Whether a stream is [token, batch, width]; refuses one whose rows are not the batch's sequences and tokens."""
        call, batch = path.members[0].call, self.trace.batch
        tokens = call.contexts.shape[1]  # what the model pads by itself included
        state = self.streams.states[path.states[-1]]
        if call.batch == batch and len(state.tensor) != batch * tokens:
            raise _Refused(f"the stream has {len(state.tensor)} states for {batch * tokens} tokens that attention sees")
        shape = state.shape
        if len(shape) == 3 and shape[0] != batch and shape[:2] == (tokens, batch):
            return True
        rows = shape[0] if len(shape) > 2 else call.batch
        if rows % batch:
            raise _Refused(f"states of the stream are {list(shape)}, whose rows are not the batch's {batch} sequences")
        return False

    def _overwritten(self, site: Site) -> frozenset[Tap]:
        found = set()
        for tap in site.taps:
            event = self._events[tap.module, tap.call]
            kept, later = (event.read, event.later_read) if tap.side == "input" else (event.wrote, event.later_wrote)
            if kept is not None and later is not None and not torch.equal(kept, later.to(kept.dtype)):
                found.add(tap)
        return frozenset(found)

    @cached_property
    def _events(self) -> dict[tuple[str, int], Event]:
        return {(event.module, event.call): event for event in self.trace.events}
