"""What a model's layout depends on, as numbers that differ when it has changed: cheap enough to take before every call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from attlas.extract.capture.intercept.interface import configurations

# of a module's own attributes: switches and names; numbers are counters as often as sizes
_SWITCHES = (bool, str)
_SETTINGS = (bool, int, float, str, type(None))


def fingerprint(model: nn.Module) -> int:
    """Modules with their classes, code, hooks, switches and shapes, and the settings of every configuration.

    Weights are left out: what they are changes no layout but one in which something was not found.
    """
    modules = tuple(part for name, module in model.named_modules() for part in _of_module(name, module))
    settings = tuple(part for config in configurations(model) for part in _of_attributes(vars(config), _SETTINGS))
    return hash((modules, settings))


def weights_state(model: nn.Module) -> int:
    """Where the parameters lie, and how often they were written to."""
    return hash(tuple((p.data_ptr(), None if p.is_inference() else p._version) for p in model.parameters()))


def _of_module(name: str, module: nn.Module) -> Iterator[Any]:
    yield name
    yield id(module)
    yield id(type(module))
    yield id(type(module).forward)
    # what stands in the place of a method, `forward` above all
    yield from ((name, id(value)) for name, value in vars(module).items() if callable(value))
    yield (*module._forward_hooks, None, *module._forward_pre_hooks)  # each hook has a number of its own
    yield from _of_attributes(vars(module), _SWITCHES)
    for own, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield (
                own,
                tensor.dtype,
                tensor.device,
                id(type(tensor)),
                *(tensor.shape if own in module._parameters else ()),
            )


def _of_attributes(attributes: Mapping[str, Any], kinds: tuple[type, ...]) -> Iterator[Any]:
    for name, value in attributes.items():
        if isinstance(value, kinds):
            yield (name, value)
        elif isinstance(value, list | tuple) and all(isinstance(one, kinds) for one in value):
            yield (name, *value)
