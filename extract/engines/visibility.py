"""Who may see whom in a batch: padding, causality and masks, and what they alone imply.

Nearly every mask lets a query see an unbroken run of keys: all of them, those up to itself, a window, a prefix. Such a
mask is held as the run's two ends per query, so that nothing here grows with the square of the sequence; only a mask
with holes, or a bias, keeps its pairs.
"""

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

# rows × keys of one block of a mask or pattern, over batch × head: bounds memory, not results
BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees. Real tokens of a sequence stand together, from `start`, `length` of them.

    Query i sees keys `first[i]` … `last[i]` − 1, places in the batch; none where last ≤ first, as at padding. `allowed`
    is None where it sees every one of these. `bias` is added to the scores; it decides nothing about who sees whom.
    """

    start: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"]
    tokens: int
    first: Int[Tensor, "batch group query"]
    last: Int[Tensor, "batch group query"]
    allowed: Bool[Tensor, "batch group query key"] | None = None
    bias: Float[Tensor, "batch group query key"] | None = None

    @cached_property
    def positions(self) -> Int[Tensor, "batch token"]:
        """Position among the real tokens, from 0; −1 at padding."""
        return positions_of(self.start, self.length, self.tokens)

    @cached_property
    def real(self) -> Bool[Tensor, "batch token"]:
        return self.positions >= 0

    @cached_property
    def place(self) -> Int[Tensor, " token"]:
        return torch.arange(self.tokens, device=self.start.device)

    def seen(self, first: int, last: int) -> Bool[Tensor, "batch group query key"]:
        """Visible pairs of the query rows first … last−1."""
        low, high = self.first[..., first:last, None], self.last[..., first:last, None]
        pairs = (self.place >= low) & (self.place < high)
        return pairs if self.allowed is None else pairs & self.allowed[..., first:last, :]

    @cached_property
    def keys(self) -> Int[Tensor, "batch group query"]:
        """m_i: how many keys each query sees; 0 at padding."""
        return (self.last - self.first).clamp_min(0) if self.allowed is None else self._counted[0]

    @cached_property
    def uniform_distance(self) -> Float[Tensor, "batch group query"]:
        """Mean of |d| over the visible keys; 0 where there are none."""
        if self.allowed is not None:
            total = self._counted[1]
        else:
            before = _sum_to(self.place - self.first) - _sum_to(self.place - self.last)
            after = _sum_to(self.last - 1 - self.place) - _sum_to(self.first - 1 - self.place)
            total = (before + after).where(self.keys > 0, 0)
        return total.double() / self.keys.clamp_min(1)

    def pairs_of(self, measured: Bool[Tensor, "batch head query"]) -> Int[Tensor, "batch head distance"]:
        """Visible pairs at each distance d, at index d + tokens − 1, of the measured rows alone."""
        if self.allowed is not None:
            return self._holed_pairs(measured)
        if (measured == (self.keys > 0)).all():  # most often: then heads share what their masks share
            return self._pairs(self.keys > 0).expand(-1, measured.shape[1], -1)
        return self._pairs(measured)

    def _pairs(self, rows: Bool[Tensor, "batch group query"]) -> Int[Tensor, "batch group distance"]:
        """Each row adds one from its first distance to its last: a sum of steps up and steps down."""
        counted = (rows & (self.keys > 0)).long()
        steps = counted.new_zeros(*counted.shape[:2], 2 * self.tokens)
        ahead = self.tokens - 1 - self.place
        steps.scatter_add_(-1, (self.first + ahead).clamp_min(0).expand_as(counted), counted)
        steps.scatter_add_(-1, (self.last + ahead).clamp_min(0).expand_as(counted), -counted)
        return steps.cumsum(-1)[..., :-1]

    def _holed_pairs(self, measured: Bool[Tensor, "batch head query"]) -> Int[Tensor, "batch head distance"]:
        total: Tensor | int = 0
        for first, last in _blocks(self.start.shape[0] * measured.shape[1], self.tokens):
            total = total + skewed_sum((self.seen(first, last) & measured[..., first:last, None]).int(), first)
        assert isinstance(total, torch.Tensor), "a batch has tokens"
        return total

    @cached_property
    def _counted(self) -> tuple[Tensor, Tensor]:
        """Visible keys of each row and the sum of their distances, counted pair by pair."""
        keys, distances = [], []
        assert self.allowed is not None, "without holes both follow from the ends"
        for first, last in _blocks(self.start.shape[0] * self.allowed.shape[1], self.tokens):
            seen = self.seen(first, last)
            keys.append(seen.sum(-1))
            distances.append((seen * (self.place - self.place[first:last, None]).abs()).sum(-1))
        return torch.cat(keys, -1), torch.cat(distances, -1)


def positions_of(start: Tensor, length: Tensor, tokens: int) -> Int[Tensor, "batch token"]:
    """Position of each place among its sequence's real tokens, from 0; −1 at padding."""
    place = torch.arange(tokens, device=start.device) - start[:, None]
    return place.where((place >= 0) & (place < length[:, None]), -1)


def _sum_to(n: Tensor) -> Tensor:
    """1 + 2 + … + n; 0 for n ≤ 0."""
    n = n.clamp_min(0)
    return n * (n + 1) // 2


def _blocks(groups: int, tokens: int) -> Iterator[tuple[int, int]]:
    """First and last row of each block of `groups` square masks."""
    size = rows_per_block(groups * tokens)
    for first in range(0, tokens, size):
        yield first, min(first + size, tokens)


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

    An added mask hides where it is below half the least finite number of its type. Raises CaptureError where real
    queries see padding.
    """
    plain = _plain(start, length, tokens, causal=causal)
    if mask is None:
        return plain
    mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
    # a mask that says the same to every query is read once, and so is one that batch or heads share
    if mask.stride(-2) == 0:
        mask = mask[..., :1, :]
    first, last, unbroken, biased = _read(mask, plain, causal=causal)
    whole = mask.expand(-1, -1, tokens, tokens)
    allowed = None if unbroken else _allows(whole)
    return Visibility(start, length, tokens, first, last, allowed, whole if biased else None)


def _plain(start: Tensor, length: Tensor, tokens: int, *, causal: bool) -> Visibility:
    """Every real query sees every real key, or every real key up to itself."""
    place = torch.arange(tokens, device=start.device)
    real = positions_of(start, length, tokens)[:, None] >= 0
    first = start[:, None, None].expand(-1, 1, tokens)
    end = (start + length)[:, None, None].expand(-1, 1, tokens)
    last = torch.minimum(end, place + 1) if causal else end
    return Visibility(start, length, tokens, first, last.where(real, first))


def _allows(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _read(mask: Tensor, plain: Visibility, *, causal: bool) -> tuple[Tensor, Tensor, bool, bool]:
    """Ends of what each query sees of its sequence, whether all between is visible, and whether anything is added."""
    firsts, lasts = [], []
    unbroken, biased = True, False
    batch = plain.start.shape[0]
    for first, last in _blocks(max(batch, mask.shape[0]) * mask.shape[1], plain.tokens):
        rows = mask[..., first:last, :] if mask.shape[-2] > 1 else mask
        allowed = _allows(rows)
        if not biased and mask.dtype != torch.bool:
            biased = bool((rows.masked_fill(~allowed, 0) != 0).any())
        _refuse_seen_padding(allowed, plain, first, last, causal=causal)
        among_real = allowed & plain.seen(first, last)
        count = among_real.sum(-1)
        low = among_real.int().argmax(-1)
        high = plain.tokens - among_real.flip(-1).int().argmax(-1)
        low, high = low.where(count > 0, 0), high.where(count > 0, 0)
        unbroken = unbroken and bool((high - low == count).all())
        firsts.append(low)
        lasts.append(high)
    return torch.cat(firsts, -1), torch.cat(lasts, -1), unbroken, biased


def _refuse_seen_padding(allowed: Tensor, plain: Visibility, first: int, last: int, *, causal: bool) -> None:
    """Padding never counts: a model that lets real queries see it has another pattern than its rows over real keys."""
    if bool(plain.real.all()):
        return
    outside = ~plain.real[:, None, None, :] & plain.real[:, None, first:last, None]
    if causal:  # hides what stands behind the query, whatever the mask says
        outside = outside & (plain.place <= plain.place[first:last, None])
    if bool((allowed & outside).any()):
        raise CaptureError(
            "padding must be invisible to real tokens; this model's mask shows it to them; "
            "pass attention_mask to the model, or measure one sequence at a time"
        )
