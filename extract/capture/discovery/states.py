"""The states of a residual stream in a trace: every distinct tensor of the stream's width, and all points where it occurs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.discovery.norms import is_leaf, norms_in
from attlas.extract.capture.discovery.trace import Trace
from attlas.extract.capture.layer_lists import lineage
from attlas.extract.capture.layout import HookPoint, Norm

# rows and columns of the sample on which sums are searched; candidates are then checked on the whole state
SAMPLED_ROWS, SAMPLED_COLUMNS = 32, 16


@dataclass
class State:
    """A tensor of the stream's width, with the moments at which modules read and wrote it."""

    first: int  # the moment of its first occurrence
    tensor: Float[Tensor, "row width"]
    sample: np.ndarray
    shape: tuple[int, ...]
    is_leaf_output: bool  # first written by a module without children, so it is not a sum made by the model's own code
    points: list[tuple[int, HookPoint]] = field(default_factory=list)
    readers: list[tuple[int, Norm]] = field(default_factory=list)  # the norms that read it
    source: Norm | None = None  # the norm that wrote it

    @property
    def output(self) -> HookPoint | None:
        """The first module output that it is."""
        return next((point for _, point in self.points if point.side == "output"), None)

    @property
    def best_point(self) -> HookPoint:
        """Where to read it: as input of a norm, else as output of a norm, else where it first occurs."""
        if self.readers:
            return self.readers[0][1].input
        return self.source.output if self.source is not None else self.points[0][1]


def moment(time: int) -> int:
    """A time of the trace on the finer scale of states, where a module's input comes before its output."""
    return 2 * time


def states_of(trace: Trace, modules: Mapping[str, nn.Module], width: int) -> list[State]:
    """Return all states of this width in order of first occurrence."""
    states: list[State] = []
    by_sample: dict[tuple[int, bytes], list[State]] = {}
    norms = {(norm.module, norm.call): norm for norm in norms_in(trace.events, modules, width)}
    for when, point, tensor in sorted(_inputs_and_outputs(trace), key=lambda occurrence: occurrence[0]):
        if tensor is None or tensor.shape[-1] != width:
            continue
        norm = norms.get((point.module, point.call))
        flat = tensor.reshape(-1, tensor.shape[-1])
        sample = _sample(flat)
        candidates = by_sample.setdefault((len(flat), sample.tobytes()), [])
        state = next((other for other in candidates if torch.equal(other.tensor, flat)), None)
        if state is None:
            is_leaf_output = point.side == "output" and is_leaf(modules[point.module])
            state = State(when, flat, sample, tuple(tensor.shape), is_leaf_output)
            candidates.append(state)
            states.append(state)
        elif len(state.shape) < tensor.dim():
            state.shape = tuple(tensor.shape)
        state.points.append((when, point))
        if norm is not None and point.side == "input":
            state.readers.append((when, norm))
        elif norm is not None and state.source is None:
            state.source = norm
    return states


def _inputs_and_outputs(trace: Trace) -> Iterator[tuple[int, HookPoint, Tensor | None]]:
    """Every module input and output with its moment. A module reads its input before the modules inside it run."""
    started: dict[str, int] = {}
    calls = [(call.time, call.modules) for call in trace.calls]
    for event in trace.events:
        while calls and calls[0][0] < event.time:
            time, modules = calls.pop(0)
            for module in modules:
                started.setdefault(module, time)
        for module in lineage(event.module):
            started.setdefault(module, event.time)
        read = moment(started.pop(event.module)) - 1
        yield read, HookPoint(event.module, event.call, "input"), event.input
        yield moment(event.time) + 1, HookPoint(event.module, event.call, "output"), event.output


def _sample(flat: Float[Tensor, "row width"]) -> np.ndarray:
    """A few rows and columns. Half of the rows are the first ones, since nothing is added at padding that a model appends."""
    size, width = flat.shape
    first = min(size, SAMPLED_ROWS // 2)
    others = first + np.random.default_rng(0).permutation(size - first)[: SAMPLED_ROWS - first]
    columns = np.random.default_rng(0).permutation(width)[:SAMPLED_COLUMNS]
    return flat[[*range(first), *others.tolist()]][:, columns].double().cpu().numpy()
