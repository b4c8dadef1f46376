"""Attention distance over an image, in patches: Σ p·√(Δrow² + Δcolumn²).

It cannot be derived from sums over offsets: patches are in raster order, so an offset d = j − i stands for several
distances. It needs the scores, a block of rows at a time. Calls without a grid, such as those of text, cost nothing.
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
    """Places of an image's patches among its tokens: row by row, after `prefix` class and register tokens."""

    rows: int
    columns: int
    prefix: int
    tokens: int  # of the whole sequence; others may follow the patches

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def end(self) -> int:
        return self.prefix + self.patches


class PatchSums(NamedTuple):
    """Per head and sequence: Σ over patch rows of their mean distance, and the number of rows that see any patch."""

    distance: Float[Tensor, "batch head"]
    rows: Float[Tensor, "batch head"]

    @staticmethod
    def zero(like: Tensor) -> PatchSums:
        """Zeros in float64, to which blocks of rows are added."""
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
        """Add the rows first, first + 1, … of a call, except those that are not measured or see no patch.

        The softmax's denominator cancels in the mean over patches. Using exp(s) instead of p keeps all digits when nearly
        all of a row's mass is on the class token.
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
    """√(Δrow² + Δcolumn²) of every pair of patches, cached because all layers use the same."""
    place = torch.arange(rows * columns, device=device)
    row, column = place // columns, place % columns
    squared = (row[:, None] - row).square() + (column[:, None] - column).square()
    return squared.double().sqrt().to(dtype)
