"""How far a head of an image model looks, in patches: Σ p·√(Δrow² + Δcolumn²), which no sum over offsets gives.

Patches stand in raster order, so one offset d = j − i is several distances: the scores themselves are needed, a block
of rows at a time. Calls without a grid, those of text among them, pay nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Where the patches of an image stand among its tokens: row by row, after `prefix` class and register tokens."""

    rows: int
    columns: int
    prefix: int
    tokens: int  # all of a sequence; behind the patches there may be more that are none

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def end(self) -> int:
        return self.prefix + self.patches


class PatchSums(NamedTuple):
    """Of a head in a sequence: Σ over patch rows of their mean distance, and how many rows see any patch."""

    distance: Float[Tensor, "batch head"]
    rows: Float[Tensor, "batch head"]

    @staticmethod
    def zero(like: Tensor) -> PatchSums:
        """To add blocks of rows to; float64."""
        batch, heads = like.shape[:2]
        return PatchSums(*like.new_zeros(2, batch, heads, dtype=torch.float64))

    def add(
        self,
        scores: Float[Tensor, "batch head row key"],
        seen: Bool[Tensor, "batch group row key"],
        measured: Bool[Tensor, "batch head row"],
        grid: Grid,
        first: int,
    ) -> None:
        """Count the rows first, first + 1, … of a call; those that are not measured or see no patch are not counted.

        Over patches alone the softmax over all keys cancels: exp(s) serves as well as p, and loses no digits where
        nearly all of a row is on the class token.
        """
        begin, end = max(grid.prefix, first), min(grid.end, first + scores.shape[-2])
        if begin >= end:
            return
        rows, keys = slice(begin - first, end - first), slice(grid.prefix, grid.end)
        among_patches, seen = scores[..., rows, keys], seen[..., rows, keys]
        if not bool(seen.all()):
            among_patches = among_patches.masked_fill(~seen, -torch.inf)
        largest = among_patches.amax(-1, keepdim=True)
        counted = measured[..., rows] & largest.squeeze(-1).isfinite()
        weights = (among_patches - largest).exp_()
        mass = weights.sum(-1)
        far = _distances(grid.rows, grid.columns, scores.device, scores.dtype)[begin - grid.prefix : end - grid.prefix]
        distance = weights.mul_(far).sum(-1) / mass
        self.distance.add_(distance.where(counted, 0).sum(-1, dtype=torch.float64))
        self.rows.add_(counted.sum(-1))


@lru_cache(maxsize=4)
def _distances(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "patch patch"]:
    """√(Δrow² + Δcolumn²) of every two patches; every layer asks for the same."""
    place = torch.arange(rows * columns, device=device)
    row, column = place // columns, place % columns
    squared = (row[:, None] - row).square() + (column[:, None] - column).square()
    return squared.double().sqrt().to(dtype)
