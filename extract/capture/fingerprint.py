"""Hashes of everything that a model's layout depends on, cheap enough to compute before every call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from attlas.extract.capture.configurations import configurations

# attributes of a module that count; numbers are left out, since many are counters
_SWITCHES = (bool, str)
_SETTINGS = (bool, int, float, str, type(None))


def fingerprint(model: nn.Module) -> int:
    """Hash the modules, their classes, code, hooks, switches and shapes, and the settings of every configuration.

    Weights are left out: their values change a layout only if something was not found in it (see `weights_state`).
    """
    modules = tuple(part for name, module in model.named_modules() for part in _of_module(name, module))
    settings = tuple(part for config in configurations(model) for part in _of_attributes(vars(config), _SETTINGS))
    return hash((modules, settings))


def weights_state(model: nn.Module) -> int:
    """Hash the addresses of the parameters and how often each was written to."""
    return hash(tuple((p.data_ptr(), None if p.is_inference() else p._version) for p in model.parameters()))


def _of_module(name: str, module: nn.Module) -> Iterator[Any]:
    yield name
    yield id(module)
    yield id(type(module))
    yield id(type(module).forward)
    # replacements of methods, `forward` above all
    yield from ((name, id(value)) for name, value in vars(module).items() if callable(value))
    yield (*module._forward_hooks, None, *module._forward_pre_hooks)  # each hook has a number of its own
    yield from _of_attributes(vars(module), _SWITCHES)
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield (
                key,
                tensor.dtype,
                tensor.device,
                id(type(tensor)),
                *(tensor.shape if key in module._parameters else ()),
            )


def _of_attributes(attributes: Mapping[str, Any], kinds: tuple[type, ...]) -> Iterator[Any]:
    for name, value in attributes.items():
        if isinstance(value, kinds):
            yield (name, value)
        elif isinstance(value, list | tuple) and all(isinstance(item, kinds) for item in value):
            yield (name, *value)
