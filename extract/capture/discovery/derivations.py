"""How each state of a stream is derived from an earlier one: by adding updates, or by a norm.

Candidates are searched on a sample of their entries and confirmed on all of them, to a few roundings of the model's own
type. Where several hold, the simplest is taken: x + F, then x + c F, then two updates at once (parallel sublayers, or a
sum in between that no module reads), then F times a vector that is a parameter of the model (layer scale).
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
from attlas.extract.capture.layout import HookPoint, Norm, Update

# how many earlier states of the same size are tried as x and F, and as x, F and G
_CANDIDATES, _CANDIDATES_FOR_TWO = 64, 24
_MOST_CONFIRMED = 6  # candidates that a sample may be unable to tell apart


class Derivation(NamedTuple):
    """A state is base_factor · base + updates, or the output of a norm of the base. `base` is the number of a state."""

    base: int
    updates: tuple[Update, ...] = ()
    norm: Norm | None = None
    base_factor: float = 1.0


class _Confirmed(NamedTuple):
    error: float
    derivation: Derivation


def derivations_of(
    states: Sequence[State], number_of: Mapping[HookPoint, int], gains: Mapping[str, Tensor], eps: float
) -> list[Derivation | None]:
    """Return the derivation of each state, None where there is none, as at the start of a stream.

    `number_of` gives the state at a point. `gains` are the model's parameters that are vectors of the stream's width.
    """
    by_size: dict[int, list[int]] = {}
    derivations: list[Derivation | None] = []
    for number, state in enumerate(states):
        earlier = by_size.setdefault(len(state.tensor), [])
        if state.source is not None:
            derivations.append(Derivation(number_of[state.source.input], norm=state.source))
        elif state.is_leaf_output or not earlier:
            derivations.append(None)
        else:
            search = _Search(states, number_of, earlier[-_CANDIDATES:], state, gains, eps)
            derivations.append(search.derivation())
        earlier.append(number)
    return derivations


def gains_of(modules: Mapping[str, nn.Module], width: int) -> dict[str, torch.Tensor]:
    """Return the parameters of this many entries that are no module's `weight` or `bias`, as layer scales are."""
    gains = {}
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if parameter.numel() == width and not name.endswith((".weight", ".bias")):
                gains[name] = parameter.detach()
    return gains


class _Search:
    """Searches the derivation of one state among earlier states."""

    def __init__(
        self,
        states: Sequence[State],
        number_of: Mapping[HookPoint, int],
        earlier: Sequence[int],
        state: State,
        gains: Mapping[str, Tensor],
        eps: float,
    ) -> None:
        self.states, self.number_of, self.earlier, self.state = states, number_of, earlier, state
        self.gains, self.eps = gains, eps
        samples = np.stack([*(states[n].sample.ravel() for n in earlier), state.sample.ravel()])
        gram = samples @ samples.T
        self.products, self.with_state, self.size = gram[:-1, :-1], gram[-1, :-1], gram[-1, -1]
        self.sizes = np.diagonal(self.products)
        # an update is a module's output that comes later than the state it is added to
        is_later = np.arange(len(earlier))[None, :] > np.arange(len(earlier))[:, None]
        is_output = np.array([states[n].output is not None for n in earlier]) & (self.sizes > 0)
        self.allowed = is_later & is_output[None, :]

    def derivation(self) -> Derivation | None:
        forms = (self._sum, self._scaled_sum, self._multiple, self._two_updates, self._gained_sum, self._two_factors)
        for candidates in forms:
            confirmed = [result for candidate in candidates() if (result := self._confirm(candidate)) is not None]
            if confirmed:
                return min(confirmed, key=lambda result: result.error).derivation
        return None

    def _sum(self) -> Iterator[Derivation]:
        """x' = x + F."""
        error = self._base_error[:, None] + self.sizes[None, :] - 2 * self._gap_products
        for base, update in self._nearest(error, self.allowed):
            yield Derivation(self.earlier[base], (self._update(update),))

    def _scaled_sum(self) -> Iterator[Derivation]:
        """x' = x + c F."""
        factor = self._gap_products / np.maximum(self.sizes, 1e-300)[None, :]
        error = self._base_error[:, None] - factor * self._gap_products
        for base, update in self._nearest(error, self.allowed):
            yield Derivation(self.earlier[base], (self._update(update, self._fitted_factor(base, update)),))

    def _multiple(self) -> Iterator[Derivation]:
        """x' = c x: nothing is added."""
        factor = self.with_state / np.maximum(self.sizes, 1e-300)
        error = self.size - factor * self.with_state
        for (base,) in self._nearest(error, self.sizes > 0):
            y, x = self.state.tensor.double(), self.states[self.earlier[base]].tensor.double()
            yield Derivation(self.earlier[base], base_factor=float((y * x).sum() / x.square().sum()))

    def _two_updates(self) -> Iterator[Derivation]:
        """x' = x + F + G."""
        recent = slice(max(0, len(self.earlier) - _CANDIDATES_FOR_TWO), None)
        gap, size, allowed = self._gap_products[recent, recent], self.sizes[recent], self.allowed[recent, recent]
        single = size[None, :] - 2 * gap
        error = self._base_error[recent, None, None] + single[:, :, None] + single[:, None, :]
        error = error + 2 * self.products[recent, recent][None]
        both = allowed[:, :, None] & allowed[:, None, :] & (np.triu(np.ones_like(allowed), 1) > 0)[None]
        first = len(self.earlier) - len(size)
        for base, one, other in self._nearest(error, both):
            updates = self._update(first + one), self._update(first + other)
            yield Derivation(self.earlier[first + base], updates)

    def _gained_sum(self) -> Iterator[Derivation]:
        """x' = x + γ F, with γ a parameter of the model."""
        if not self.gains or not self.earlier:
            return
        samples = np.stack([self.states[n].sample for n in self.earlier])
        gap = self.state.sample[None] - samples
        across = np.einsum("brc,urc->buc", gap, samples)
        error = self._base_error[:, None] - (across**2 / np.maximum((samples**2).sum(1), 1e-300)[None]).sum(-1)
        for base, update in self._nearest(error, self.allowed):
            gain = self._fitted_gain(base, update)
            if gain is not None:
                yield Derivation(self.earlier[base], (self._update(update, gain=gain),))

    def _two_factors(self) -> Iterator[Derivation]:
        """x' = a x + c F: not a residual update, which a refusal can then say."""
        xx, ff, xf = self.sizes[:, None], self.sizes[None, :], self.products
        determinant = np.maximum(xx * ff - xf**2, 1e-9 * xx * ff + 1e-300)
        base_factor = (self.with_state[:, None] * ff - self.with_state[None, :] * xf) / determinant
        factor = (self.with_state[None, :] * xx - self.with_state[:, None] * xf) / determinant
        error = self.size - base_factor * self.with_state[:, None] - factor * self.with_state[None, :]
        for base, update in self._nearest(error, self.allowed):
            updates = (self._update(update, float(factor[base, update])),)
            yield Derivation(self.earlier[base], updates, base_factor=float(base_factor[base, update]))

    @property
    def _base_error(self) -> Float[np.ndarray, " base"]:
        """‖x' − x‖² of each candidate for x, on the sample."""
        return self.size + self.sizes - 2 * self.with_state

    @property
    def _gap_products(self) -> Float[np.ndarray, "base update"]:
        """(x' − x) · F."""
        return self.with_state[None, :] - self.products

    def _nearest(self, error: np.ndarray, allowed: np.ndarray) -> Iterator[tuple[int, ...]]:
        """Indices of the candidates with the least squared error, of those within a few roundings."""
        base = np.arange(len(self.earlier))[-error.shape[0] :].reshape(-1, *(1,) * (error.ndim - 1))
        scale = self.size + self.sizes[base]
        near = allowed & (error <= ((16 * self.eps) ** 2 + 1e-13) * 2 * scale)
        indices = np.argwhere(near)
        order = np.argsort(error[near], kind="stable")[:_MOST_CONFIRMED]
        yield from (tuple(index) for index in indices[order].tolist())

    def _update(self, candidate: int, factor: float = 1.0, gain: str | None = None) -> Update:
        output = self.states[self.earlier[candidate]].output
        assert output is not None, "an update is a module's output"
        return Update(output, factor, gain)

    def _confirm(self, derivation: Derivation) -> _Confirmed | None:
        """The derivation with its error on the whole state; None if that is more than rounding."""
        base, state = self.states[derivation.base].tensor.double(), self.state.tensor.double()
        updates = [self._tensor(update) for update in derivation.updates]
        error = float((state - derivation.base_factor * base - sum(updates)).norm())
        size = float(state.norm() + base.norm())
        least = min((float(update.norm()) for update in updates), default=size)
        return _Confirmed(error, derivation) if error <= 4 * self.eps * size and error < 0.1 * least else None

    def _tensor(self, update: Update) -> Tensor:
        tensor = self.states[self.number_of[update.point]].tensor.double() * update.factor
        return tensor if update.gain is None else tensor * self.gains[update.gain].to(tensor).flatten()

    def _gap_and_update(self, base: int, update: int) -> tuple[Tensor, Tensor]:
        """x' − x and F of a pair of candidates."""
        x, f = (self.states[self.earlier[n]].tensor.double() for n in (base, update))
        return self.state.tensor.double() - x, f

    def _fitted_factor(self, base: int, update: int) -> float:
        gap, f = self._gap_and_update(base, update)
        return float((gap * f).sum() / f.square().sum())

    def _fitted_gain(self, base: int, update: int) -> str | None:
        """The parameter that γ is. Of several with equal values, as before training, the nearest in the module tree."""
        gap, f = self._gap_and_update(base, update)
        size = f.square().sum(0)
        fitted = (gap * f).sum(0) / size.clamp_min(1e-300)
        tolerance = 8 * self.eps * float(self.state.tensor.double().norm())
        matching = [
            name
            for name, gain in self.gains.items()
            if float(((fitted - gain.to(fitted).flatten()).square() * size).sum().sqrt()) <= tolerance
        ]
        module = self._update(update).point.module
        return max(matching, key=lambda name: common_prefix_length(name, module), default=None)
