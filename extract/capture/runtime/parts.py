"""The parts of a model that can be reached in a pass: its heads, and its attention and MLP sublayers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from attlas.extract.capture.layout import Layout, Site
from attlas.extract.capture.runtime.part_edits import is_reachable

Part = Literal["head", "attention", "mlp"]
PARTS: tuple[Part, ...] = ("head", "attention", "mlp")
# the number of its attention layer in the layout, what it is, and the number of the head; −1 for a sublayer
PartKey = tuple[int, str, int]


@dataclass(frozen=True)
class ModelPart:
    """A head, by the number of its attention layer in the layout, or a sublayer, by its residual site."""

    attention: int
    part: Part
    head: int = -1
    site: Site | None = None

    @property
    def key(self) -> PartKey:
        return self.attention, self.part, self.head


def parts_of(layout: Layout, kinds: Collection[Part] = PARTS) -> list[ModelPart]:
    """All heads whose contexts can be reached, then the sublayers of their layers, as far as they are of these kinds."""
    found = [
        ModelPart(number, "head", head)
        for number, attention in enumerate(layout.attentions)
        if "head" in kinds and is_reachable(attention)
        for head in range(attention.heads)
    ]
    numbers = {(a.stack, a.layer): n for n, a in reversed([*enumerate(layout.attentions)])}
    for site in layout.sites:
        number = numbers.get((site.stack, site.layer))
        is_output = site.update is not None and site.update.point.side == "output"
        if number is not None and is_output and site.name in kinds:
            found.append(ModelPart(number, site.name, site=site))  # pyright: ignore[reportArgumentType]
    return found
