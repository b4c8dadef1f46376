"""The states of a residual stream as a probe has seen them: each tensor once, with every place where it stood."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.discovery.module_tree import around_of
from attlas.extract.capture.discovery.trace import Event, Trace
from attlas.extract.capture.layout import Norm, Tap

# rows and columns of a state that stand for the whole of it when sums are sought; what they find is checked on the whole
SAMPLED_ROWS, SAMPLED_COLUMNS = 32, 16


@dataclass
class State:
    """A tensor of the stream's width. `first` is the moment at which it was first seen: a module reads, then writes."""

    first: int
    tensor: Float[Tensor, "row width"]
    sample: np.ndarray
    shape: tuple[int, ...]
    made: bool  # by a module without children: it is no sum that the model itself has added up
    taps: list[tuple[int, Tap]] = field(default_factory=list)
    readers: list[tuple[int, Norm]] = field(default_factory=list)
    maker: Norm | None = None

    @property
    def output(self) -> Tap | None:
        """Where a module first wrote it."""
        return next((tap for _, tap in self.taps if tap.side == "output"), None)

    @property
    def tap(self) -> Tap:
        """Where it is best read: as a norm reads it, as a norm wrote it, or as it was first seen."""
        if self.readers:
            return self.readers[0][1].read
        return self.maker.wrote if self.maker is not None else self.taps[0][1]


def moment(time: int) -> int:
    """The trace's time, in which a module's reading and its writing have one number, as a moment of a state."""
    return 2 * time


def states_of(trace: Trace, modules: Mapping[str, nn.Module], width: int) -> list[State]:
    """Every state of this width in the order in which they were first seen."""
    states: list[State] = []
    known: dict[tuple[int, bytes], list[State]] = {}
    norms = {(norm.module, norm.call): norm for norm in norms_in(trace.events, modules, width)}
    for when, tap, tensor in sorted(_seen(trace), key=lambda seen: seen[0]):
        if tensor is None or tensor.shape[-1] != width:
            continue
        norm = norms.get((tap.module, tap.call))
        flat = tensor.reshape(-1, tensor.shape[-1])
        alike = known.setdefault((len(flat), _sample(flat).tobytes()), [])
        state = next((other for other in alike if torch.equal(other.tensor, flat)), None)
        if state is None:
            made = tap.side == "output" and _is_leaf(modules[tap.module])
            state = State(when, flat, _sample(flat), tuple(tensor.shape), made)
            alike.append(state)
            states.append(state)
        elif len(state.shape) < tensor.dim():
            state.shape = tuple(tensor.shape)
        state.taps.append((when, tap))
        if norm is not None and tap.side == "input":
            state.readers.append((when, norm))
        elif norm is not None and state.maker is None:
            state.maker = norm
    return states


def _seen(trace: Trace) -> Iterator[tuple[int, Tap, Tensor | None]]:
    """What every module read and wrote, and when. A module has read before those inside it have run."""
    began: dict[str, int] = {}
    inside = [(call.time, call.inside) for call in trace.calls]
    for event in trace.events:
        while inside and inside[0][0] < event.time:
            time, around = inside.pop(0)
            for module in around:
                began.setdefault(module, time)
        for module in around_of(event.module):
            began.setdefault(module, event.time)
        read = moment(began.pop(event.module)) - 1
        yield read, Tap(event.module, event.call, "input"), event.read
        yield moment(event.time) + 1, Tap(event.module, event.call, "output"), event.wrote


def _sample(flat: Float[Tensor, "row width"]) -> np.ndarray:
    """Half of the rows are the first ones: a model that pads by itself has few tokens, and at padding nothing is added."""
    size, width = flat.shape
    first = min(size, SAMPLED_ROWS // 2)
    others = first + np.random.default_rng(0).permutation(size - first)[: SAMPLED_ROWS - first]
    columns = np.random.default_rng(0).permutation(width)[:SAMPLED_COLUMNS]
    return flat[[*range(first), *others.tolist()]][:, columns].double().cpu().numpy()


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def norms_in(events: Iterable[Event], modules: Mapping[str, nn.Module], width: int) -> Iterator[Norm]:
    """Every call of a module without children that normalises vectors of this width, checked by doing it."""
    for event in events:
        module = modules[event.module]
        if event.read is None or event.wrote is None or not _is_leaf(module):
            continue
        alike = event.read.shape[-1] == width and event.read.shape == event.wrote.shape
        if alike and not torch.equal(event.read, event.wrote):  # as a dropout's are, whatever it reads
            epsilon = norm_epsilon(module)
            kind = _norm_kind(module, event.read, event.wrote, epsilon)
            if kind is not None:
                yield Norm(event.module, event.call, kind, epsilon)


def norm_epsilon(module: nn.Module) -> float:
    """ε of a norm: its attribute under either of the two names in use; torch's RMSNorm without one uses the type's own."""
    for name in ("eps", "variance_epsilon"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    return torch.finfo(torch.float32).eps


def _norm_kind(module: nn.Module, read: Tensor, wrote: Tensor, epsilon: float) -> Literal["layer", "rms"] | None:
    parameters = dict(module.named_parameters(recurse=False))
    if any(p.dim() != 1 or p.shape[-1] != read.shape[-1] for p in parameters.values()):
        return None
    gain = parameters.get("weight", torch.ones(read.shape[-1])).to(read)
    bias = parameters.get("bias", torch.zeros(read.shape[-1])).to(read)
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
