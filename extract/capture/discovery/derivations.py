"""How each state of a stream came about: what was added to which state before it, or what a norm made of one.

Candidates are sought on a sample of their entries and confirmed on all of them, to a few roundings of the model's own
type. Of several that hold, the simplest counts: F itself, then a multiple of it, then two updates at once (parallel
sublayers, or a state between them that no module reads), then F times a vector that is a parameter of the model (layer
scale).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.discovery.module_tree import common_prefix_length
from attlas.extract.capture.discovery.states import State
from attlas.extract.capture.layout import Norm

# how far back a state's origin is sought, in states of its kind; two updates at once stand closer
_BACK, _BACK_FOR_TWO = 64, 24
_CONFIRMED = 6  # candidates that a sample cannot tell apart


class Added(NamedTuple):
    """An update: a state by its number, the factor by which it is multiplied, and the parameter if that is a vector."""

    state: int
    factor: float = 1.0
    gain: str | None = None


class Step(NamedTuple):
    """A state is skip · base + updates, or what a norm made of the base."""

    base: int
    updates: tuple[Added, ...] = ()
    norm: Norm | None = None
    skip: float = 1.0


class _Found(NamedTuple):
    error: float
    step: Step


def steps_of(states: Sequence[State], gains: Mapping[str, Tensor], rounding: float) -> list[Step | None]:
    """Of each state, in their order, how it came about; None where it is a beginning, or not known.

    `gains` are the model's parameters that are vectors of the stream's width.
    """
    numbers = {id(state): number for number, state in enumerate(states)}
    read_by = {norm.wrote: number for number, state in enumerate(states) for _, norm in state.readers}
    alike: dict[int, list[int]] = {}
    steps: list[Step | None] = []
    for number, state in enumerate(states):
        before = alike.setdefault(len(state.tensor), [])
        if state.maker is not None:
            steps.append(Step(read_by[state.maker.wrote], norm=state.maker))
        elif state.made or not before:
            steps.append(None)
        else:
            steps.append(_Search(states, before[-_BACK:], numbers[id(state)], gains, rounding).step())
        before.append(number)
    return steps


class _Search:
    """The search for the origin of one state among those before it."""

    def __init__(
        self,
        states: Sequence[State],
        before: Sequence[int],
        number: int,
        gains: Mapping[str, Tensor],
        rounding: float,
    ) -> None:
        self.states, self.before, self.whole = states, before, states[number]
        self.gains, self.rounding = gains, rounding
        rows = [states[n].sample.ravel() for n in before]
        samples = np.stack([*rows, self.whole.sample.ravel()])
        gram = samples @ samples.T
        self.products, self.with_whole, self.size = gram[:-1, :-1], gram[-1, :-1], gram[-1, -1]
        self.sizes = np.diagonal(self.products)
        # an update is what a module wrote, later than the state to which it is added was there
        later = np.arange(len(before))[None, :] > np.arange(len(before))[:, None]
        written = np.array([states[n].output is not None for n in before]) & (self.sizes > 0)
        self.allowed = later & written[None, :]

    def step(self) -> Step | None:
        for candidates in (self._once, self._multiple, self._scaled, self._twice, self._by_gain, self._skipping):
            confirmed = [found for step in candidates() if (found := self._confirmed(step)) is not None]
            if confirmed:
                return min(confirmed, key=lambda found: found.error).step
        return None

    def _once(self) -> Iterator[Step]:
        """x' = x + F."""
        off = self._base_off[:, None] + self.sizes[None, :] - 2 * self._gap_products
        for base, update in self._nearest(off, self.allowed):
            yield Step(self.before[base], (Added(self.before[update]),))

    def _multiple(self) -> Iterator[Step]:
        """x' = x + c F."""
        factor = self._gap_products / np.maximum(self.sizes, 1e-300)[None, :]
        off = self._base_off[:, None] - factor * self._gap_products
        for base, update in self._nearest(off, self.allowed):
            found = (self.before[base], self.before[update])
            yield Step(found[0], (Added(found[1], self._fitted(*found)),))

    def _scaled(self) -> Iterator[Step]:
        """x' = c x: nothing is added."""
        factor = self.with_whole / np.maximum(self.sizes, 1e-300)
        off = self.size - factor * self.with_whole
        for (base,) in self._nearest(off, self.sizes > 0):
            whole, x = self.whole.tensor.double(), self.states[self.before[base]].tensor.double()
            yield Step(self.before[base], skip=float((whole * x).sum() / x.square().sum()))

    def _twice(self) -> Iterator[Step]:
        """x' = x + F + G."""
        some = slice(max(0, len(self.before) - _BACK_FOR_TWO), None)
        gap, size, allowed = self._gap_products[some, some], self.sizes[some], self.allowed[some, some]
        single = size[None, :] - 2 * gap
        off = self._base_off[some, None, None] + single[:, :, None] + single[:, None, :]
        off = off + 2 * self.products[some, some][None]
        both = allowed[:, :, None] & allowed[:, None, :] & (np.triu(np.ones_like(allowed), 1) > 0)[None]
        numbers = self.before[some]
        for base, one, other in self._nearest(off, both):
            yield Step(numbers[base], (Added(numbers[one]), Added(numbers[other])))

    def _by_gain(self) -> Iterator[Step]:
        """x' = x + γ F, with γ a vector of the model's."""
        if not self.gains or not self.before:
            return
        samples = np.stack([self.states[n].sample for n in self.before])
        gap = self.whole.sample[None] - samples
        across = np.einsum("brc,urc->buc", gap, samples)
        off = self._base_off[:, None] - (across**2 / np.maximum((samples**2).sum(1), 1e-300)[None]).sum(-1)
        for base, update in self._nearest(off, self.allowed):
            found = (self.before[base], self.before[update])
            gain = self._gain_of(*found)
            if gain is not None:
                yield Step(found[0], (Added(found[1], gain=gain),))

    def _skipping(self) -> Iterator[Step]:
        """x' = a x + c F: no residual update, and said so."""
        xx, ff, xf = self.sizes[:, None], self.sizes[None, :], self.products
        determinant = np.maximum(xx * ff - xf**2, 1e-9 * xx * ff + 1e-300)
        skip = (self.with_whole[:, None] * ff - self.with_whole[None, :] * xf) / determinant
        factor = (self.with_whole[None, :] * xx - self.with_whole[:, None] * xf) / determinant
        off = self.size - skip * self.with_whole[:, None] - factor * self.with_whole[None, :]
        for base, update in self._nearest(off, self.allowed):
            added = Added(self.before[update], float(factor[base, update]))
            yield Step(self.before[base], (added,), skip=float(skip[base, update]))

    @property
    def _base_off(self) -> Float[np.ndarray, " base"]:
        """‖x' − x‖² of each candidate for x, on the sample."""
        return self.size + self.sizes - 2 * self.with_whole

    @property
    def _gap_products(self) -> Float[np.ndarray, "base update"]:
        """(x' − x) · F."""
        return self.with_whole[None, :] - self.products

    def _nearest(self, off: np.ndarray, allowed: np.ndarray) -> Iterator[tuple[int, ...]]:
        """The candidates that miss least, of those within a few roundings; `off` are squares."""
        base = np.arange(len(self.before))[-off.shape[0] :].reshape(-1, *(1,) * (off.ndim - 1))
        scale = self.size + self.sizes[base]
        near = allowed & (off <= ((16 * self.rounding) ** 2 + 1e-13) * 2 * scale)
        places = np.argwhere(near)
        order = np.argsort(off[near], kind="stable")[:_CONFIRMED]
        yield from (tuple(place) for place in places[order].tolist())

    def _confirmed(self, step: Step) -> _Found | None:
        """The step and by how much it misses the whole state; None where that is more than rounding."""
        base, whole = self.states[step.base].tensor.double(), self.whole.tensor.double()
        updates = [self._update(added) for added in step.updates]
        error = float((whole - step.skip * base - sum(updates)).norm())
        size = float(whole.norm() + base.norm())
        least = min((float(update.norm()) for update in updates), default=size)
        return _Found(error, step) if error <= 4 * self.rounding * size and error < 0.1 * least else None

    def _update(self, added: Added) -> Tensor:
        tensor = self.states[added.state].tensor.double() * added.factor
        return tensor if added.gain is None else tensor * self.gains[added.gain].to(tensor).flatten()

    def _fitted(self, base: int, update: int) -> float:
        gap = self.whole.tensor.double() - self.states[base].tensor.double()
        update_ = self.states[update].tensor.double()
        return float((gap * update_).sum() / update_.square().sum())

    def _gain_of(self, base: int, update: int) -> str | None:
        """The parameter that this vector is, if one is; of several that are alike, as at first, the nearest in the model."""
        gap = self.whole.tensor.double() - self.states[base].tensor.double()
        f = self.states[update].tensor.double()
        size = f.square().sum(0)
        fitted = (gap * f).sum(0) / size.clamp_min(1e-300)
        most = 8 * self.rounding * float(self.whole.tensor.double().norm())
        alike = [
            name
            for name, gain in self.gains.items()
            if float(((fitted - gain.to(fitted).flatten()).square() * size).sum().sqrt()) <= most
        ]
        written = self.states[update].output
        assert written is not None, "an update is what a module wrote"
        return max(alike, key=lambda name: common_prefix_length(name, written.module), default=None)


def gains_of(modules: Mapping[str, nn.Module], width: int) -> dict[str, torch.Tensor]:
    """The parameters that no norm and no linear module holds, as vectors of this width."""
    found = {}
    for name, module in modules.items():
        for own, parameter in module.named_parameters(name, recurse=False):
            if parameter.numel() == width and not own.endswith((".weight", ".bias")):
                found[own] = parameter.detach()
    return found
