"""What a model is made of, as values: attention calls, norms, and the sites of its residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

# how a call shows itself: through torch's own function, through transformers' attention interface, as a softmax that the
# model makes itself and multiplies with values, or by running its module again with other values
CaptureMethod = Literal["sdpa", "interface", "softmax", "replay"]


class Tap(NamedTuple):
    """A place in the forward pass: what a module read or wrote at its n-th call."""

    module: str
    call: int
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Norm:
    """A normalisation layer of the stream, at one call."""

    module: str
    call: int
    kind: Literal["layer", "rms"]
    epsilon: float

    @property
    def read(self) -> Tap:
        return Tap(self.module, self.call, "input")

    @property
    def wrote(self) -> Tap:
        return Tap(self.module, self.call, "output")


class Update(NamedTuple):
    """What a sublayer adds to the stream: what a module wrote, times a number or a parameter where the model does so."""

    tap: Tap
    factor: float = 1.0
    gain: str | None = None


@dataclass(frozen=True)
class Site:
    """One place of the residual stream: x, F and x', and the norm that reads x (pre-norm) or x' (post-norm).

    Of parallel sublayers each after the first has the updates of those before it `beside` its own: its x is theirs
    included, and x' of all but the last, a state that the model never makes, is None. `heads` are the stack and layer of
    the attention call whose contexts F is made of.
    """

    name: str
    layer: int
    after: Tap | None
    stack: str = "encoder"
    stream: Tap | None = None
    update: Update | None = None
    norm: Norm | None = None
    beside: tuple[Update, ...] = ()
    heads: tuple[str, int] | None = None
    token_first: bool = False  # the stream is [token, batch, width]
    overwritten: frozenset[Tap] = frozenset()  # places whose tensor the model writes into later

    @property
    def updates(self) -> tuple[Update, ...]:
        """What is added to the stream, this site's own last."""
        return self.beside if self.update is None else (*self.beside, self.update)

    @property
    def sum(self) -> tuple[Tap, ...]:
        """The places of x', x and F."""
        return tuple(
            tap for tap in (self.after, self.stream, *(update.tap for update in self.updates)) if tap is not None
        )

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Every place that is read."""
        return self.sum if self.norm is None else (*self.sum, self.norm.read, self.norm.wrote)


class Replayed(NamedTuple):
    """What makes the values in a module that is run again, and what reads its contexts there: names within the module.

    Without a reader the contexts are what the module gives.
    """

    values: tuple[str, ...]
    reader: str | None
    token_first: bool  # values are [token, batch, width]

    @property
    def reading(self) -> tuple[str, ...]:
        """The modules of which must be known what they read."""
        return () if self.reader is None else (self.reader,)


@dataclass(frozen=True)
class Attention:
    """One attention call of a forward pass: its layer, its heads and, where found, its output projection.

    `shape` is that of the projection, contexts × stream, and `no_projection` why there is none. `queries` and `keys` name the model's input whose tokens they are, None where they are something else: patches,
    frames, latents. `module` is the innermost that was running.
    """

    stack: str
    layer: int
    heads: int
    projection: str | None = None
    way: CaptureMethod = "sdpa"
    module: str = ""
    queries: str | None = "input_ids"
    keys: str | None = "input_ids"
    is_cross_attention: bool = False
    batch_last: bool = False  # windows of sequences: the first of each sequence, then the second of each, …
    order: str = ""  # of a softmax that goes into an einsum: the letters of batch and head
    replayed: Replayed | None = None
    in_pieces: bool = False  # its module may call once for every window or image of a sequence
    shape: tuple[int, int] | None = None
    no_projection: str | None = None


@dataclass(frozen=True)
class Layout:
    """What `capture` watches, and what it expects to see in every forward pass, in the order in which it comes."""

    attentions: tuple[Attention, ...]
    sites: tuple[Site, ...]
    residual_refusal: str | None  # why `residual` is not measured, or None
    width: int | None
    others: frozenset[int] = frozenset()  # calls, counted among all of a pass, that are no attention over positions
    without_pattern: tuple[str, ...] = ()  # layers that have none: recurrent, convolutional
    mixed: bool = False  # some calls are over rows that are neither the batch's sequences nor windows of them
    residual_refusals: Mapping[str, str] = field(default_factory=dict)  # stacks that `residual` leaves out, and why

    @property
    def ways(self) -> frozenset[CaptureMethod]:
        return frozenset(a.way for a in self.attentions)

    @property
    def stacks(self) -> tuple[str, ...]:
        """In the order in which they begin."""
        return tuple(dict.fromkeys(a.stack for a in self.attentions))

    def of(self, stack: str) -> tuple[Attention, ...]:
        return tuple(a for a in self.attentions if a.stack == stack)

    @property
    def described(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "attention": [
                {
                    "stack": a.stack,
                    "layer": a.layer,
                    "heads": a.heads,
                    "way": a.way,
                    "module": a.module,
                    "projection": a.projection,
                    **({} if a.no_projection is None else {"no_projection": a.no_projection}),
                }
                for a in self.attentions
            ],
            "sites": [
                {
                    "stack": s.stack,
                    "site": s.name,
                    "layer": s.layer,
                    "after": _name(s.after),
                    "stream": _name(s.stream),
                    "update": None if s.update is None else _described(s.update),
                    "norm": None if s.norm is None else f"{s.norm.module}#{s.norm.call} ({s.norm.kind})",
                }
                for s in self.sites
            ],
            "without_pattern": list(self.without_pattern),
            "residual_refusals": dict(self.residual_refusals),
        }


def _described(update: Update) -> str:
    factor = "" if update.factor == 1 else f"{update.factor:g} × "
    return f"{factor}{_name(update.tap)}{f' × {update.gain}' if update.gain else ''}"


def _name(tap: Tap | None) -> str | None:
    return None if tap is None else f"{tap.module}#{tap.call} {tap.side}"
