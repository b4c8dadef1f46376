"""Where a module stands in a model, told from its structure: beside which attention call, in which member of a list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from attlas.extract.capture.discovery.trace import Call


def common_prefix_length(one: str, other: str) -> int:
    """How many modules two have around them together."""
    count = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count


class Lists:
    """The lists of layers of a model, and which of their members attend."""

    def __init__(self, calls: Sequence[Call], modules: Mapping[str, nn.Module]) -> None:
        self._attending = {name for call in calls for name in call.inside}
        self._members = {member for name, module in modules.items() for member in self._members_of(name, module)}

    def member(self, module: str) -> str | None:
        """The outermost member of a list of layers that this module is or stands in."""
        return next((name for name in around_of(module) if name in self._members), None)

    def attends(self, module: str) -> bool:
        """False of a module in a layer that shows no pattern, such as a recurrent one."""
        member = self.member(module)
        return member is None or member in self._attending

    def _members_of(self, name: str, module: nn.Module) -> Iterable[str]:
        """The members of a list of which at least one attends."""
        if not isinstance(module, nn.ModuleList):
            return ()
        members = [f"{name}.{number}" if name else number for number, _ in module.named_children()]
        return members if any(member in self._attending for member in members) else ()


def around_of(module: str) -> list[str]:
    """The modules around one, outermost first, and itself."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
