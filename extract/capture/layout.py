"""The layout of a model as plain values: its attention layers, its norms and the sites of its residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

# How an attention call is captured: through torch's function, through transformers' attention interface, from a softmax
# that the model computes itself, or by running the module again with one-hot values. Written to the manifest.
CaptureMethod = Literal["sdpa", "interface", "softmax", "replay"]
# those that intercept the call itself, with its queries and keys, before it is made
INTERCEPTED: frozenset[CaptureMethod] = frozenset({"sdpa", "interface"})


class HookPoint(NamedTuple):
    """A place in the forward pass: the input or the output of a module at its n-th call."""

    module: str
    call: int
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Norm:
    """A normalisation layer of the residual stream, at one call. `width` is that of the states that it normalises."""

    module: str
    call: int
    kind: Literal["layer", "rms"]
    epsilon: float
    width: int

    @property
    def input(self) -> HookPoint:
        return HookPoint(self.module, self.call, "input")

    @property
    def output(self) -> HookPoint:
        return HookPoint(self.module, self.call, "output")


class Update(NamedTuple):
    """What a sublayer adds to the stream: a module's output, times a constant or a parameter if the model scales it."""

    point: HookPoint
    factor: float = 1.0
    gain: str | None = None


@dataclass(frozen=True)
class Site:
    """One residual update: x (`before`), F (`update`), x' (`after`), and the norm that reads x (pre-norm) or x' (post-norm).

    Parallel sublayers are measured as if they ran one after the other. Each after the first lists the updates before it in
    `parallel`, and its x includes them. Only the last has an `after`: the model never computes the sums in between.
    """

    name: str
    layer: int
    after: HookPoint | None
    stack: str = "encoder"
    before: HookPoint | None = None
    update: Update | None = None
    norm: Norm | None = None
    parallel: tuple[Update, ...] = ()
    attention: tuple[str, int] | None = None  # stack and layer of the attention call whose contexts F is made of
    token_first: bool = False  # the stream is [token, batch, width]
    overwritten: frozenset[HookPoint] = frozenset()  # points whose tensor the model modifies in place later

    @property
    def updates(self) -> tuple[Update, ...]:
        """Everything added to the stream, this site's own update last."""
        return self.parallel if self.update is None else (*self.parallel, self.update)

    @property
    def is_post_norm(self) -> bool:
        """Whether a norm reads x', what the site has added to the stream."""
        return self.norm is not None and self.norm.input == self.after

    @cached_property
    def sum_points(self) -> tuple[HookPoint, ...]:
        """Where x', x and F are read."""
        points = (self.after, self.before, *(update.point for update in self.updates))
        return tuple(point for point in points if point is not None)

    @cached_property
    def hook_points(self) -> tuple[HookPoint, ...]:
        """Every point that is read."""
        return self.sum_points if self.norm is None else (*self.sum_points, self.norm.input, self.norm.output)


WHOLE_LAYER = "layer"  # the name of a site that stands for all sublayers of a layer


@dataclass(frozen=True)
class SitePoints:
    """Which sites need which hook points, worked out once for all passes.

    `of_site` are the distinct points of each site, `sites_at` the numbers of the sites that need a point, and `calls` the input
    and output of each call of a module, None if no site needs it.
    """

    of_site: tuple[tuple[HookPoint, ...], ...]
    sites_at: Mapping[HookPoint, tuple[int, ...]]
    calls: Mapping[str, tuple[tuple[HookPoint | None, HookPoint | None], ...]]
    overwritten: frozenset[HookPoint]
    gains: frozenset[str]

    @classmethod
    def of(cls, sites: tuple[Site, ...]) -> SitePoints:
        of_site = tuple(tuple(dict.fromkeys(site.hook_points)) for site in sites)
        sites_at: dict[HookPoint, tuple[int, ...]] = {}
        for number, points in enumerate(of_site):
            for point in points:
                sites_at[point] = (*sites_at.get(point, ()), number)
        last_call: dict[str, int] = {}
        for point in sites_at:
            last_call[point.module] = max(point.call, last_call.get(point.module, 0))
        calls = {
            module: tuple(
                tuple(p if (p := HookPoint(module, call, side)) in sites_at else None for side in ("input", "output"))
                for call in range(last + 1)
            )
            for module, last in last_call.items()
        }
        return cls(
            of_site,
            sites_at,
            calls,  # pyright: ignore[reportArgumentType] - pairs
            frozenset(point for site in sites for point in site.overwritten),
            frozenset(update.gain for site in sites for update in site.updates if update.gain is not None),
        )


class ReplaySpec(NamedTuple):
    """Which submodules of a replayed module compute its values, and which one reads its contexts.

    Without a reader, the contexts are the module's output.
    """

    values: tuple[str, ...]
    reader: str | None
    token_first: bool  # values are [token, batch, width]

    @property
    def readers(self) -> tuple[str, ...]:
        """The reader as a tuple, empty if there is none."""
        return () if self.reader is None else (self.reader,)


class InputMap(NamedTuple):
    """Where queries, keys or values come from: a linear module, and which of its outputs each head gets, in order.

    They are these outputs times `factor`, apart from a bias, and rotated if the model rotates queries and keys. Heads that
    share keys and values name the same outputs. `weight` is the parameter, [output, input], of a module that multiplies by it
    in a function of torch; otherwise the map is what the module returns, see `linear_map`.
    """

    module: str
    shape: tuple[int, int]  # input × output
    columns: tuple[range | tuple[int, ...], ...]  # of each head
    factor: float = 1.0
    weight: str | None = None


class InputMaps(NamedTuple):
    """The maps of an attention layer's queries, keys and values, or why there are none.

    `scale` is what the call multiplies scores by. `is_self`: queries and keys are of the same tokens.
    """

    query: InputMap | None = None
    key: InputMap | None = None
    value: InputMap | None = None
    scale: float | None = None
    is_self: bool = True
    no_query_key: str | None = None
    no_value: str | None = None


_NO_MAPS = InputMaps()


@dataclass(frozen=True)
class Attention:
    """An attention layer: one attention call of a forward pass.

    `queries` and `keys` name the model input whose tokens they are, None if they are something else, such as patches, frames
    or latents. `projection` is the output projection, `shape` its shape as contexts × stream, and `no_projection` the reason
    if there is none. `inputs` says the same of queries, keys and values. `module` is the innermost module with weights around
    the call.
    """

    stack: str
    layer: int
    heads: int
    projection: str | None = None
    method: CaptureMethod = "sdpa"
    module: str = ""
    queries: str | None = "input_ids"
    keys: str | None = "input_ids"
    is_cross_attention: bool = False
    batch_last: bool = (
        False  # rows are windows of sequences: the first window of each sequence, then the second of each, …
    )
    dim_order: str = ""  # of a manual softmax with unusual dimensions, see `ManualAttention`
    replay: ReplaySpec | None = None
    in_pieces: bool = False  # its module may make one call for every window or image of a sequence
    shape: tuple[int, int] | None = None
    no_projection: str | None = None
    inputs: InputMaps = _NO_MAPS


@dataclass(frozen=True)
class Layout:
    """What every forward pass of a model must show, in order of execution."""

    attentions: tuple[Attention, ...]
    sites: tuple[Site, ...]
    residual_refusal: str | None  # why `residual` is not measured, or None
    width: int | None
    ignored_calls: frozenset[int] = frozenset()  # numbers of calls that are not attention over positions
    without_pattern: tuple[str, ...] = ()  # layers without attention: recurrent, convolutional
    mixed: bool = False  # some calls are over rows that are neither sequences of the batch nor windows of them
    residual_refusals: Mapping[str, str] = field(default_factory=dict)  # stacks that `residual` leaves out, and why
    imports_attention: bool = True  # a module calls torch's attention function by a name of its own

    @cached_property
    def points(self) -> SitePoints:
        """The hook points of the sites."""
        return SitePoints.of(self.sites)

    @cached_property
    def layer_sites(self) -> tuple[Site, ...]:
        """A site for each layer: x before its first update, x' after its last, nothing between."""
        updates: dict[tuple[str, int], list[Site]] = {}
        for site in self.sites:
            if site.update is not None:
                updates.setdefault((site.stack, site.layer), []).append(site)
        ends = ((of_layer[0], of_layer[-1]) for of_layer in updates.values())
        return tuple(
            Site(
                WHOLE_LAYER,
                first.layer,
                last.after,
                first.stack,
                first.before,
                token_first=first.token_first,
                overwritten=first.overwritten | last.overwritten,
            )
            for first, last in ends
            if first.before is not None and last.after is not None
        )

    @cached_property
    def points_with_layers(self) -> SitePoints:
        """The hook points of the sites, then of the layers."""
        return SitePoints.of(self.sites + self.layer_sites)

    @property
    def methods(self) -> frozenset[CaptureMethod]:
        return frozenset(attention.method for attention in self.attentions)

    @property
    def stacks(self) -> tuple[str, ...]:
        """In the order in which they begin."""
        return tuple(dict.fromkeys(attention.stack for attention in self.attentions))

    def of(self, stack: str) -> tuple[Attention, ...]:
        return tuple(attention for attention in self.attentions if attention.stack == stack)

    @property
    def description(self) -> dict[str, Any]:
        """The layout as the manifest has it."""
        return {
            "attention": [_describe_attention(attention) for attention in self.attentions],
            "sites": [_describe_site(site) for site in self.sites],
            "without_pattern": list(self.without_pattern),
            "residual_refusals": dict(self.residual_refusals),
        }


def _describe_attention(attention: Attention) -> dict[str, Any]:
    return {
        "stack": attention.stack,
        "layer": attention.layer,
        "heads": attention.heads,
        "way": attention.method,
        "module": attention.module,
        "projection": attention.projection,
        **({} if attention.no_projection is None else {"no_projection": attention.no_projection}),
        **_describe_inputs(attention.inputs),
    }


def _describe_inputs(inputs: InputMaps) -> dict[str, Any]:
    """The modules that make queries, keys and values, and why there are none."""
    maps = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    reasons = {"no_query_key": inputs.no_query_key, "no_value": inputs.no_value}
    return {name: _describe_map(found) for name, found in maps.items()} | {
        name: reason for name, reason in reasons.items() if reason is not None
    }


def _describe_map(found: InputMap | None) -> str | None:
    return None if found is None else ".".join(part for part in (found.module, found.weight) if part)


def _describe_site(site: Site) -> dict[str, Any]:
    return {
        "stack": site.stack,
        "site": site.name,
        "layer": site.layer,
        "after": _describe_point(site.after),
        "stream": _describe_point(site.before),
        "update": None if site.update is None else _describe_update(site.update),
        "norm": None if site.norm is None else f"{site.norm.module}#{site.norm.call} ({site.norm.kind})",
    }


def _describe_update(update: Update) -> str:
    factor = "" if update.factor == 1 else f"{update.factor:g} × "
    return f"{factor}{_describe_point(update.point)}{f' × {update.gain}' if update.gain else ''}"


def _describe_point(point: HookPoint | None) -> str | None:
    return None if point is None else f"{point.module}#{point.call} {point.side}"
