"""What is known about a batch besides the model's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attlas.extract.engines.patches import Grid
from attlas.extract.engines.visibility import Axis


@dataclass(frozen=True)
class Needle:
    """Which tokens of a batch belong to a needle, and which to the answer that is read from it; all answers lie in `span`."""

    keys: Bool[Tensor, "batch token"]
    answer: Bool[Tensor, "batch token"]
    span: slice


@dataclass(frozen=True)
class Tokens:
    """The tokens of one input. Without an axis, padding is what no query sees."""

    axis: Axis | None
    ids: Int[Tensor, "batch token"] | None = None
    classes: Int[Tensor, "batch token"] | None = None
    needle: Needle | None = None


@dataclass(frozen=True)
class Batch:
    """The number of sequences, the tokens of each text input by its name, and the patch grid of each stack of images.

    `sample` marks the sequences of the sample, for statistics that are computed for them only; None: all of them.
    """

    sequences: int
    texts: Mapping[str, Tokens] = field(default_factory=dict)
    grids: Mapping[str, Grid] = field(default_factory=dict)
    sample: Bool[Tensor, " sequence"] | None = None

    @cached_property
    def sampled(self) -> Int[Tensor, " place"]:
        """The places of the sample's sequences; where `with_sample` has not set them, a GPU is waited for, once."""
        return torch.arange(self.sequences) if self.sample is None else self.sample.nonzero().flatten()
