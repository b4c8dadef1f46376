"""What a model is made of, as values: attention calls, norms, and the sites of its residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


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


@dataclass(frozen=True)
class Site:
    """One place of the residual stream: x, F and x', and the norm that reads x (pre-norm) or x' (post-norm)."""

    name: str
    layer: int
    after: Tap
    stream: Tap | None = None
    update: Tap | None = None
    norm: Norm | None = None


@dataclass(frozen=True)
class Attention:
    """One attention call: its layer, its heads and, where found, the module that is its output projection."""

    stack: str
    layer: int
    heads: int
    projection: str | None = None


@dataclass(frozen=True)
class Layout:
    """What `capture` watches, and what it expects to see in every forward pass."""

    attentions: tuple[Attention, ...]
    sites: tuple[Site, ...]
    residual_refusal: str | None  # why `residual` is not measured, or None
    width: int | None

    @property
    def described(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "attention": [
                {"stack": a.stack, "layer": a.layer, "heads": a.heads, "projection": a.projection}
                for a in self.attentions
            ],
            "sites": [
                {
                    "site": s.name,
                    "layer": s.layer,
                    "after": _name(s.after),
                    "stream": _name(s.stream),
                    "update": _name(s.update),
                    "norm": None if s.norm is None else f"{s.norm.module}#{s.norm.call} ({s.norm.kind})",
                }
                for s in self.sites
            ],
        }


def _name(tap: Tap | None) -> str | None:
    return None if tap is None else f"{tap.module}#{tap.call} {tap.side}"
