"""Where a module stands in a model, read from its name."""

from __future__ import annotations

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


def owner_of(model: nn.Module, call: Call) -> str:
    """The innermost module with weights that was running when a call was made."""
    with_weights = (n for n in reversed(call.modules) if next(model.get_submodule(n).parameters(), None) is not None)
    return next(with_weights, "")
