"""The layers of a model, found in its lists of modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn


def lineage(module: str) -> list[str]:
    """The names of the modules around one, outermost first, and its own."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


class LayerLists:
    """The lists of layers of a model in which at least one layer attends.

    `attending` are the names of the modules that run while attention calls are made.
    """

    def __init__(self, attending: Iterable[str], modules: Mapping[str, nn.Module]) -> None:
        self._attending = set(attending)
        self._layers = {layer for name, module in modules.items() for layer in self._layers_in(name, module)}

    def layer_of(self, module: str) -> str | None:
        """The outermost layer that a module is or belongs to, None if it is in no list."""
        return next((name for name in lineage(module) if name in self._layers), None)

    def may_attend(self, module: str) -> bool:
        """False for a module of a layer without a pattern, such as a recurrent one."""
        layer = self.layer_of(module)
        return layer is None or layer in self._attending

    def _layers_in(self, name: str, module: nn.Module) -> Iterable[str]:
        if not isinstance(module, nn.ModuleList):
            return ()
        layers = [f"{name}.{number}" if name else number for number, _ in module.named_children()]
        return layers if any(layer in self._attending for layer in layers) else ()
