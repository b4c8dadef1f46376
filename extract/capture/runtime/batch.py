"""What is known of a batch besides the inputs of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor

from attlas.extract.engines.patches import Grid
from attlas.extract.engines.visibility import Axis


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens of an input. Without an axis, padding is what no query sees."""

    axis: Axis | None
    ids: Int[Tensor, "batch token"] | None = None
    classes: Int[Tensor, "batch token"] | None = None


@dataclass(frozen=True)
class Batch:
    """What is known of a batch besides the model's inputs: the tokens of those that have some, by the input's name.

    `grids` say where the patches of its images stand among the tokens of a stack.
    """

    sequences: int
    texts: Mapping[str, Tokens] = field(default_factory=dict)
    grids: Mapping[str, Grid] = field(default_factory=dict)
