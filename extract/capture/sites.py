"""Find the sites of a residual stream in the trace of a probe: walk along the norms and name what is added between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from extract.capture.layout import Norm, Site, Tap
from extract.capture.probe import Event, Trace

if TYPE_CHECKING:
    from torch import Tensor


def _norms(trace: Trace, modules: Mapping[str, nn.Module], width: int) -> list[tuple[Event, Norm]]:
    """Every call of a module without children that normalises vectors of the stream's width, checked by doing it."""
    found = []
    for event in trace.events:
        module = modules[event.module]
        if next(module.children(), None) is not None or event.read is None or event.wrote is None:
            continue
        if event.read.shape[-1] != width or event.read.shape != event.wrote.shape:
            continue
        kind = _norm_kind(module, event.read, event.wrote)
        if kind is not None:
            found.append((event, Norm(event.module, event.call, kind, norm_epsilon(module))))
    return found


def norm_epsilon(module: nn.Module) -> float:
    """ε of a norm: its attribute under either of the two names in use; torch's RMSNorm without one uses the type's own."""
    for name in ("eps", "variance_epsilon"):
        if getattr(module, name, None) is not None:
            return float(getattr(module, name))
    return torch.finfo(torch.float32).eps


def _norm_kind(module: nn.Module, read: Tensor, wrote: Tensor) -> Literal["layer", "rms"] | None:
    parameters = dict(module.named_parameters(recurse=False))
    if any(p.dim() != 1 or p.shape[-1] != read.shape[-1] for p in parameters.values()):
        return None
    gain = parameters.get("weight", torch.ones(read.shape[-1])).to(read)
    bias = parameters.get("bias", torch.zeros(read.shape[-1])).to(read)
    epsilon = norm_epsilon(module)
    centred = read - read.mean(-1, keepdim=True)
    kinds: tuple[tuple[Literal["layer", "rms"], Tensor], ...] = (("layer", centred), ("rms", read))
    for kind, vector in kinds:
        unit = vector / (vector.square().mean(-1, keepdim=True) + epsilon).sqrt()
        # some families store γ − 1
        if _close(unit * gain + bias, wrote) or _close(unit * (1 + gain) + bias, wrote):
            return kind
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 2e-2 * b.norm())  # half precision rounds; another operation is far off


def find_sites(
    trace: Trace, modules: Mapping[str, nn.Module], width: int | None
) -> tuple[tuple[Site, ...], str | None]:
    """Walk along the norms and name what is added between them."""
    if width is None:
        return (), "no output projection was found, so the stream's width is not known"
    norms = _norms(trace, modules, width)
    if not norms:
        return (), f"no normalisation layer of the stream's width {width} was found"
    updates = [u for k in range(len(norms)) if (u := _update(trace, norms, k, trace.rounding)) is not None]
    if not updates:
        return (), "no place was found where x' = x + F(x) holds between norms"
    sites = [_embedding(norms, updates[0]), *updates]
    last = norms[-1][1]
    if updates[-1].after == last.read and updates[-1].norm != last:
        sites.append(Site("final_norm", len(trace.calls) - 1, after=last.read, norm=last))
    return tuple(sites), _missing(trace, sites)


class _State(NamedTuple):
    """A state of the stream: where it stands, and the norm that reads it (pre-norm) if one does."""

    time: int
    tensor: Tensor
    tap: Tap
    reader: Norm | None


class _Sum(NamedTuple):
    """A state and an update that add up to what a norm reads, and by how much they miss it."""

    error: float
    state: _State
    update: Event


def _embedding(norms: list[tuple[Event, Norm]], first: Site) -> Site:
    """The stream as the first sublayer finds it; where a norm of the embeddings makes it, what that norm reads."""
    assert first.stream is not None, "an update is added to a state"
    maker = next((norm for _, norm in norms if norm.wrote == first.stream), None)
    return Site("embedding", 0, after=first.stream if maker is None else maker.read, norm=maker)


def _update(trace: Trace, norms: list[tuple[Event, Norm]], k: int, rounding: float) -> Site | None:
    """What was added to the stream just before norm k reads it: the x and F for which its input is x + F."""
    event, norm = norms[k]
    sums = [found for state in _states(trace, norms, k) if (found := _added(trace, state, event, rounding)) is not None]
    if not sums:
        return None
    best = min(sums, key=lambda found: found.error)
    finished = [c for c in trace.calls if c.time <= best.update.time]
    inside = [c for c in finished if c.time > best.state.time]
    if not finished:
        return None  # embeddings added to each other
    return Site(
        name="attention" if inside else "mlp",
        layer=len(finished) - 1,
        after=norm.read,
        stream=best.state.tap,
        update=Tap(best.update.module, best.update.call, "output"),
        norm=best.state.reader or norm,
    )


def _states(trace: Trace, norms: list[tuple[Event, Norm]], k: int) -> Iterator[_State]:
    """Candidates for x before norm k: what the norms before it read and wrote; before the first, what any module wrote."""
    event = norms[k][0]
    for earlier, norm in norms[max(0, k - 4) : k]:
        if earlier.read is not None and earlier.wrote is not None:
            yield _State(earlier.time, earlier.read, norm.read, norm)
            yield _State(earlier.time, earlier.wrote, norm.wrote, None)
    if k == 0:
        for other in trace.events:
            if other.time < event.time and other.wrote is not None:
                yield _State(other.time, other.wrote, Tap(other.module, other.call, "output"), None)


def _added(trace: Trace, state: _State, event: Event, rounding: float) -> _Sum | None:
    """The module output that, added to the state, comes nearest to what the norm reads; None if none is near."""
    if event.read is None or state.tensor.shape != event.read.shape:
        return None
    added = event.read - state.tensor
    size = event.read.norm() + state.tensor.norm()
    nearest = None
    for candidate in trace.events:
        if (
            not state.time < candidate.time < event.time
            or candidate.wrote is None
            or candidate.wrote.shape != added.shape
        ):
            continue
        error = float((added - candidate.wrote).norm())
        near = error <= 4 * rounding * float(size) and error < 0.1 * float(candidate.wrote.norm())
        if near and (nearest is None or error < nearest.error):
            nearest = _Sum(error, state, candidate)
    return nearest


def _missing(trace: Trace, sites: list[Site]) -> str | None:
    have = [(s.layer, s.name) for s in sites]
    wanted = [(layer, name) for layer in range(len(trace.calls)) for name in ("attention", "mlp")]
    absent = [f"{name} of layer {layer}" for layer, name in wanted if (layer, name) not in have]
    repeated = sorted({f"{name} of layer {layer}" for layer, name in have if have.count((layer, name)) > 1})
    if absent:
        return f"x' = x + F(x) was not found for {', '.join(absent[:4])}{' …' if len(absent) > 4 else ''}"
    return f"more than one update was found for {', '.join(repeated[:4])}" if repeated else None
