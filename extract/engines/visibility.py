"""Who may see whom in a batch: padding, causality and masks, and what they alone imply."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from extract.errors import CaptureError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

# rows × keys of one block of a mask or pattern, per batch × head: bounds memory, not results
BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees. Real tokens of a sequence stand together, from `start`, `length` of them.

    `allowed` is None where every real key (or, if `causal`, every real key up to the query) is visible.
    `bias` is added to the scores; it decides nothing about who sees whom.
    """

    start: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"]
    tokens: int
    causal: bool = False
    allowed: Bool[Tensor, "batch group query key"] | None = None
    bias: Float[Tensor, "batch group query key"] | None = None

    @cached_property
    def positions(self) -> Int[Tensor, "batch token"]:
        """Position among the real tokens, from 0; −1 at padding."""
        place = torch.arange(self.tokens, device=self.start.device) - self.start[:, None]
        return place.where((place >= 0) & (place < self.length[:, None]), -1)

    @cached_property
    def real(self) -> Bool[Tensor, "batch token"]:
        return self.positions >= 0

    def seen(self, first: int, last: int) -> Bool[Tensor, "batch group query key"]:
        """Visible pairs of the query rows first … last−1."""
        pairs = self.real[:, None, first:last, None] & self.real[:, None, None, :]
        if self.causal:
            pairs = pairs & self.up_to_query(first, last)
        return pairs if self.allowed is None else pairs & self.allowed[..., first:last, :]

    def up_to_query(self, first: int, last: int) -> Bool[Tensor, "query key"]:
        """What causality alone lets the query rows first … last−1 see."""
        place = torch.arange(self.tokens, device=self.start.device)
        return place[None, :] <= place[first:last, None]

    @cached_property
    def keys(self) -> Int[Tensor, "batch group query"]:
        """m_i: how many keys each query sees; 0 at padding."""
        return self._implied[0]

    @cached_property
    def uniform_distance(self) -> Float[Tensor, "batch group query"]:
        """Mean of |d| over the visible keys."""
        return self._implied[1]

    def pairs_of(self, measured: Bool[Tensor, "batch head query"]) -> Int[Tensor, "batch head distance"]:
        """Visible pairs at each distance, of the measured rows alone."""
        whole = (measured == (self.keys > 0)).all()
        if whole:
            return self._implied[2].expand(-1, measured.shape[1], -1)
        return _each_block(
            self, lambda seen, first, last: skewed_sum((seen & measured[:, :, first:last, None]).int(), first)
        )

    @cached_property
    def _implied(self) -> tuple[Tensor, Tensor, Tensor]:
        keys, distances = [], []
        place = torch.arange(self.tokens, device=self.start.device)

        def block(seen: Tensor, first: int, last: int) -> Tensor:
            apart = (place[None, :] - place[first:last, None]).abs()
            keys.append(seen.sum(-1))
            distances.append((seen * apart).sum(-1))
            return skewed_sum(seen.int(), first)

        pairs = _each_block(self, block)
        counted = torch.cat(keys, -1)
        distance = torch.cat(distances, -1) / counted.clamp_min(1)
        return counted, distance, pairs


def _each_block(visibility: Visibility, sum_block) -> Tensor:
    """Add up a function of every block of visible pairs."""
    total = None
    for first, last in _blocks(visibility, 1 if visibility.allowed is None else visibility.allowed.shape[1]):
        part = sum_block(visibility.seen(first, last), first, last)
        total = part if total is None else total + part
    assert total is not None, "a batch has tokens"
    return total


def _blocks(visibility: Visibility, group: int) -> Iterator[tuple[int, int]]:
    """First and last row of each block of a mask with `group` heads."""
    size = rows_per_block(visibility.start.shape[0] * group * visibility.tokens)
    for first in range(0, visibility.tokens, size):
        yield first, min(first + size, visibility.tokens)


def rows_per_block(elements_per_row: int) -> int:
    return max(1, BLOCK_ELEMENTS // max(1, elements_per_row))


def skewed_sum(block: Tensor, first: int) -> Tensor:
    """Sum a block of rows along its diagonals: [..., row, key] → [..., distance], index d + keys − 1.

    Row r of the block is query first + r. Padding each row by one more than its neighbour turns diagonals to columns.
    """
    rows, keys = block.shape[-2:]
    wide = pad(block.flip(-2), (0, rows)).flatten(-2)[..., : rows * (keys + rows - 1)]
    sums = wide.unflatten(-1, (rows, keys + rows - 1)).sum(-2)  # column: d + first + rows − 1
    ahead = keys - first - rows  # distances below the block's smallest
    return pad(sums, (ahead, first))


def see(
    mask: Tensor | None,
    *,
    causal: bool,
    start: Int[Tensor, " batch"],
    length: Int[Tensor, " batch"],
    tokens: int,
) -> Visibility:
    """Read a mask as given to scaled_dot_product_attention: boolean (True is visible) or added to the scores.

    An added mask hides where it is below half the least finite number of its type. A mask that says no more than padding
    and causality is dropped. Raises CaptureError where real queries see padding.
    """
    plain = Visibility(start, length, tokens, causal=causal)
    if mask is None:
        return plain
    mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape).expand(-1, -1, tokens, tokens)
    bias = None
    allowed = mask
    if mask.dtype != torch.bool:
        allowed = mask > torch.finfo(mask.dtype).min / 2
        if (mask.masked_fill(~allowed, 0) != 0).any():
            bias = mask
    _refuse_seen_padding(allowed, plain)
    for simple in (Visibility(start, length, tokens, causal=causal), Visibility(start, length, tokens, causal=True)):
        if _agrees(allowed, simple):
            return Visibility(start, length, tokens, causal=simple.causal, bias=bias)
    return Visibility(start, length, tokens, causal=causal, allowed=allowed, bias=bias)


def _agrees(allowed: Tensor, simple: Visibility) -> bool:
    """Whether a mask, among real tokens, lets every query see exactly what the simple visibility does."""
    real = Visibility(simple.start, simple.length, simple.tokens)
    for first, last in _blocks(simple, allowed.shape[1]):
        among_real = real.seen(first, last) & allowed[..., first:last, :]
        if not torch.equal(among_real, simple.seen(first, last).expand_as(among_real)):
            return False
    return True


def _refuse_seen_padding(allowed: Tensor, plain: Visibility) -> None:
    """Padding never counts: a model that lets real queries see it has another pattern than its rows over real keys."""
    if bool(plain.real.all()):
        return
    for first, last in _blocks(plain, allowed.shape[1]):
        leaked = allowed[..., first:last, :] & plain.real[:, None, first:last, None] & ~plain.real[:, None, None, :]
        if plain.causal:
            leaked = leaked & plain.up_to_query(first, last)
        if bool(leaked.any()):
            raise CaptureError(
                "padding must be invisible to real tokens; this model's mask shows it to them; "
                "pass attention_mask to the model, or measure one sequence at a time"
            )
