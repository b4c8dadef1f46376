"""A block of rows of a pattern, and what the reference engine computes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from attlas.extract.engines.patches import Grid, PatchSums
from attlas.extract.engines.rows import AttentionCall, ScoredCall


def exact_dtype(x: Tensor) -> torch.dtype:
    """The type to compute in: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def value_norms(call: AttentionCall | ScoredCall, heads: int) -> Float[Tensor, "batch head key"]:
    """‖v W_O^h‖ of each head's keys; 0 at padding."""
    assert call.write is not None and call.value is not None, "asked for where both are known"
    exact = exact_dtype(call.value)
    values = call.value.to(exact).repeat_interleave(heads // call.value.shape[1], dim=1)
    return (values @ call.write.to(exact)).norm(dim=-1).where(call.visibility.keys.real[:, None], 0)


TINY = 1.2e-38  # the smallest float32 with all of its digits


def entropy(shares: Float[Tensor, "*row outcome"]) -> Float[Tensor, "*row"]:
    """−Σ p ln p; of a share of 0 the logarithm is that of the smallest number, several times as fast as to look for zeros."""
    return -(shares * shares.clamp_min(TINY).log()).sum(-1)


class Block:
    """Rows `first` … `last` − 1 of a call's pattern, over the keys that any of them sees, computed lazily."""

    def __init__(
        self,
        call: AttentionCall | ScoredCall,
        scores_of: Callable[[slice, slice], Float[Tensor, "batch head row key"]],
        first: int,
        last: int,
        measured: Bool[Tensor, "batch head row"] | None = None,
    ) -> None:
        self.call, self.first, self.last = call, first, last
        self.rows = slice(first, last)
        self._scores_of = scores_of
        if measured is not None:
            self.measured = measured

    @cached_property
    def keys(self) -> slice:
        """The keys in reach of a window; whole rows for distances over an image."""
        visibility = self.call.visibility
        return slice(0, visibility.keys.tokens) if self.call.grid else visibility.reach(self.first, self.last)

    @cached_property
    def scores(self) -> Float[Tensor, "batch head row key"]:
        """The scores of the call, also of invisible pairs."""
        return self._scores_of(self.rows, self.keys)

    @cached_property
    def visible(self) -> Bool[Tensor, "batch group row key"]:
        return self.call.visibility.seen(self.first, self.last)[..., self.keys]

    @cached_property
    def measured(self) -> Bool[Tensor, "batch head row"]:
        return self.visible.any(-1) & (self.scores.isfinite() | ~self.visible).all(-1)

    @cached_property
    def usable(self) -> Bool[Tensor, "batch head row key"]:
        """Visible keys of measured rows."""
        return self.visible & self.measured[..., None]

    @cached_property
    def usable_scores(self) -> Float[Tensor, "batch head row key"]:
        """Scores with −∞ at other keys."""
        return self.scores.where(self.usable, -torch.inf)

    @cached_property
    def largest(self) -> Float[Tensor, "batch head row"]:
        """The largest score of each row; 0 if it is not measured."""
        return self.usable_scores.amax(-1).where(self.measured, 0)

    @cached_property
    def sinks(self) -> Float[Tensor, "batch head row"] | None:
        sinks = self.call.sinks
        if sinks is None:
            return None
        of_rows = sinks[None, :, None] if sinks.dim() == 1 else sinks
        return of_rows.to(self.scores.dtype).expand(-1, -1, self.call.visibility.queries.tokens)[..., self.rows]

    @cached_property
    def shift(self) -> Float[Tensor, "batch head row"]:
        """The value subtracted from scores before exponentiation."""
        return self.largest if self.sinks is None else torch.maximum(self.largest, self.sinks)

    @cached_property
    def below(self) -> Float[Tensor, "batch head row key"]:
        return (self.usable_scores - self.shift[..., None]).where(self.usable, 0)

    @cached_property
    def weights(self) -> Float[Tensor, "batch head row key"]:
        return (self.usable_scores - self.shift[..., None]).exp_()

    @cached_property
    def sink_weight(self) -> Float[Tensor, "batch head row"]:
        return torch.zeros_like(self.shift) if self.sinks is None else (self.sinks - self.shift).exp()

    @cached_property
    def total(self) -> Float[Tensor, "batch head row"]:
        return (self.weights.sum(-1) + self.sink_weight).where(self.measured, 1)

    @cached_property
    def pattern(self) -> Float[Tensor, "batch head row key"]:
        """Zero for rows that are not measured."""
        return self.weights / self.total[..., None]

    @cached_property
    def key_weights(self) -> Float[Tensor, "batch head row key"]:
        """exp(s − max s) over the keys: in proportion to the pattern, also where a learned sink takes nearly all of a row."""
        if self.sinks is None:
            return self.weights
        return (self.usable_scores - self.largest[..., None]).exp_()

    @cached_property
    def log_share_of_keys(self) -> Float[Tensor, "batch head row"]:
        """ln of a row's sum over its keys: 0 without a learned sink, and finite where one takes nearly all of the row."""
        if self.sinks is None:
            return torch.zeros_like(self.total)
        return self.key_weights.sum(-1).where(self.measured, 1).log() + self.largest - self.shift - self.total.log()

    @cached_property
    def cumulative(self) -> Float64[Tensor, "batch head row key"]:
        """Sums of the largest weights of each row's keys: of one, of two, … of all; the largest weight is 1."""
        if self.key_weights.device.type != "cpu":
            return self.key_weights.sort(-1, descending=True).values.cumsum(-1, dtype=torch.float64)
        ascending = np.sort(self.key_weights.numpy(), axis=-1)  # several times as fast as torch's sort
        return torch.from_numpy(ascending).flip(-1).cumsum(-1, dtype=torch.float64)

    @cached_property
    def norm_weights(self) -> Float[Tensor, "batch head row key"]:
        """‖v W_O^h‖, each in proportion to p."""
        return self.key_weights * value_norms(self.call, self.key_weights.shape[1])[..., None, self.keys]

    @cached_property
    def norm_total(self) -> Float[Tensor, "batch head row"]:
        return self.norm_weights.sum(-1)

    @cached_property
    def norm_weighted(self) -> Float[Tensor, "batch head row key"]:
        """p ‖v W_O^h‖ as shares of each row's sum; zeros where nothing is written."""
        return self.norm_weights / self.norm_total.where(self.norm_total > 0, 1)[..., None]

    @cached_property
    def sink(self) -> Float[Tensor, "batch head row"]:
        return self.sink_weight / self.total

    @cached_property
    def outcomes(self) -> Float[Tensor, "batch head row outcome"]:
        """The pattern, with a learned sink as one more key."""
        return self.pattern if self.sinks is None else torch.cat((self.pattern, self.sink[..., None]), -1)

    @cached_property
    def distances(self) -> Float[Tensor, "row key"]:
        """d = j − i."""
        visibility = self.call.visibility
        return (visibility.keys.place[None, self.keys] - visibility.queries.place[self.rows, None]).to(
            self.scores.dtype
        )

    @cached_property
    def offset(self) -> Float[Tensor, "batch head row"]:
        return (self.pattern * self.distances).sum(-1)

    @cached_property
    def keys_counted(self) -> Int[Tensor, "batch head row"]:
        """Usable keys of each row, at least 1."""
        return self.usable.sum(-1).clamp_min(1)

    @cached_property
    def score_mean(self) -> Float[Tensor, "batch head row"]:
        return (self.usable_scores.where(self.usable, 0)).sum(-1) / self.keys_counted

    @cached_property
    def patch_sums(self) -> PatchSums:
        grid: Grid | None = self.call.grid
        assert grid is not None, "asked for where there is a grid"
        sums = PatchSums.zero(self.scores)
        sums.add(self.scores, self.visible, self.measured, grid, self.first)
        return sums

    @cached_property
    def equal_tokens(self) -> tuple[Bool[Tensor, "batch row key"], Bool[Tensor, "batch row key"]]:
        """Pairs in which j ≠ i has the query's token, and pairs in which j ≤ i follows another copy of it."""
        ids, real = self.call.token_ids, self.call.visibility.keys.real
        assert ids is not None, "asked for where there are ids"
        place = torch.arange(ids.shape[1], device=ids.device)
        same = (ids[:, self.rows, None] == ids[:, None, :]) & (place[None, :] != place[self.rows, None])
        same = same & real[:, None, :]
        after_copy = same.roll(1, dims=-1)
        after_copy[..., 0] = False
        return same, after_copy & (place[None, :] <= place[self.rows, None])
