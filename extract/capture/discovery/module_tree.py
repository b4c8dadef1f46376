"""Where a module stands in a model, read from its name and from the model's lists of layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from attlas.extract.capture.discovery.trace import Call


def common_prefix_length(a: str, b: str) -> int:
    """The number of leading parts that two dotted names have in common."""
    count = 0
    for part, other in zip(a.split("."), b.split("."), strict=False):
        if part != other:
            break
        count += 1
    return count


def lineage(module: str) -> list[str]:
    """The names of the modules around one, outermost first, and its own."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def owner_of(model: nn.Module, call: Call) -> str:
    """The innermost module with weights that was running when a call was made."""
    with_weights = (n for n in reversed(call.modules) if next(model.get_submodule(n).parameters(), None) is not None)
    return next(with_weights, "")


class LayerLists:
    """The lists of layers of a model in which at least one layer attends."""

    def __init__(self, calls: Sequence[Call], modules: Mapping[str, nn.Module]) -> None:
        self._attending = {name for call in calls for name in call.modules}
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
