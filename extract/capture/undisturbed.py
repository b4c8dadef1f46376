"""A model that is measured while something else goes on with it, such as its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from attlas.extract.capture.modes import eval_mode
from attlas.extract.capture.rng import rng_preserved


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a model in eval mode, and leave everything as it was: modes, buffers, attributes of modules, random number generators.

    Parameters and their gradients are not touched by a measurement. What is restored is what a model's own code may keep of a
    pass: tables of positions, which made in inference mode could not be trained with, or hooks that transformers installs.
    """
    before = [_State(module) for module in model.modules()]
    try:
        with rng_preserved(device), eval_mode(model):
            yield
    finally:
        for state in before:
            state.restore()


class _State:
    """The attributes of a module, and what its dictionaries hold: its buffers, its hooks, caches of its own."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes: dict[str, Any] = dict(vars(module))
        self._dictionaries = [(d, dict(d)) for d in self._attributes.values() if isinstance(d, dict)]
        self._values = [(b, b.clone()) for b in module._buffers.values() if b is not None]

    def restore(self) -> None:
        for current, before in ((vars(self._module), self._attributes), *self._dictionaries):
            if not _have_same_items(current, before):
                current.clear()
                current.update(before)
        for buffer, values in self._values:
            if not torch.equal(buffer, values):
                buffer.data.copy_(values)


def _have_same_items(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(one[name] is value for name, value in other.items())
