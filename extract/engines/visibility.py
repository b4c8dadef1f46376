"""Which keys each query sees, from padding, causality and masks, and the statistics that follow from it alone.

With nearly every mask a query sees an unbroken range of keys: all of them, those up to itself, a window or a prefix. Such a
mask is stored as the two ends of the range per query, so that memory does not grow with the square of the sequence. Only
masks with holes, and biases, are stored per pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from attlas.extract.errors import CaptureError

# rows × keys of one block of a mask or pattern, over batch × head: bounds memory, not results
BLOCK_ELEMENTS = 1 << 23
# values added to hide padding are lower (−10,000 in older models); scores that far below others have no weight left
_OPEN = -5000


@dataclass(frozen=True)
class Axis:
    """Places of the real tokens in a batch: `length` contiguous ones per sequence, from `start` on."""

    start: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"]
    tokens: int

    @cached_property
    def positions(self) -> Int[Tensor, "batch token"]:
        """Position among the real tokens, from 0; −1 at padding."""
        return positions_of(self.start, self.length, self.tokens)

    @cached_property
    def real(self) -> Bool[Tensor, "batch token"]:
        return self.positions >= 0

    def of_sequences(self, chosen: Int[Tensor, " sequence"]) -> Axis:
        return Axis(self.start[chosen], self.length[chosen], self.tokens)

    @cached_property
    def padding(self) -> slice | None:
        """From the first to the last place at which any sequence has padding; None if none has."""
        start, end = self.start.tolist(), (self.start + self.length).tolist()
        left, right = max(start), min(end)
        if not left and right == self.tokens:
            return None
        return slice(0 if left else right, self.tokens if right < self.tokens else left)

    @cached_property
    def place(self) -> Int[Tensor, " token"]:
        return torch.arange(self.tokens, device=self.start.device)


def right_padded_axis(lengths: Sequence[int], tokens: int, device: torch.device) -> Axis:
    """An axis of sequences of these lengths, whose padding is known without asking the device."""
    length = torch.tensor(lengths)
    length = length.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else length.to(device)
    axis = Axis(torch.zeros_like(length), length, tokens)
    least = min(lengths)
    vars(axis)["padding"] = slice(least, tokens) if least < tokens else None
    return axis


def whole_axis(batch: int, tokens: int, device: torch.device) -> Axis:
    """An axis without padding."""
    zeros = torch.zeros(batch, dtype=torch.long, device=device)
    return Axis(zeros, zeros + tokens, tokens)


def axis_of(real: Bool[Tensor, "batch token"]) -> Axis | None:
    """The axis with these real tokens; None if those of a sequence are not contiguous."""
    length = real.sum(-1)
    start = real.int().argmax(-1)
    axis = Axis(start, length, real.shape[-1])
    return axis if torch.equal(axis.real, real) else None


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees. In self-attention, queries and keys are the same axis, as the same object.

    Query i sees keys `first[i]` … `last[i]` − 1, places in the batch; none if last ≤ first, as at padding. `allowed` is
    None if it sees all of them. `bias` is added to the scores and does not affect visibility.
    """

    queries: Axis
    keys: Axis
    first: Int[Tensor, "#batch #group query"]
    last: Int[Tensor, "#batch #group query"]
    allowed: Bool[Tensor, "#batch #group query key"] | None = None
    bias: Float[Tensor, "#batch #group query key"] | None = None

    def of_sequences(self, chosen: Int[Tensor, " sequence"]) -> Visibility:
        """The visibility of some sequences."""
        queries = self.queries.of_sequences(chosen)
        keys = self.keys.of_sequences(chosen) if self.is_cross_attention else queries
        first, last, allowed, bias = (
            x if x is None or len(x) == 1 else x[chosen] for x in (self.first, self.last, self.allowed, self.bias)
        )
        assert first is not None and last is not None, "every query has a range of keys"
        return Visibility(queries, keys, first, last, allowed, bias)

    def of_rows(self, places: Int[Tensor, "batch row"]) -> Visibility:
        """The visibility of some rows of each sequence, from other queries than the keys."""

        def chosen(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x.expand(len(places), *x.shape[1:])
            index = places.view(len(places), 1, -1, *(1,) * (x.dim() - 3)).expand(-1, x.shape[1], -1, *x.shape[3:])
            return x.gather(2, index)

        first, last, allowed, bias = map(chosen, (self.first, self.last, self.allowed, self.bias))
        assert first is not None and last is not None, "every query has a range of keys"
        queries = whole_axis(len(places), places.shape[1], places.device)
        return Visibility(queries, self.keys, first, last, allowed, bias)

    @property
    def is_cross_attention(self) -> bool:
        """Whether queries and keys are different tokens, without a distance between them."""
        return self.queries is not self.keys

    def reach(self, first: int, last: int) -> slice:
        """The range of keys that any of the query rows first … last−1 sees; a single key if they see none."""
        low, high = (ends[first:last] for ends in self._reaches)
        return slice(min(low), max(high)) if min(low) < max(high) else slice(0, 1)

    @cached_property
    def ends(self) -> Int[Tensor, "#ends #batch #group query"]:
        """`first` and `last` side by side, in 32 bits."""
        return torch.stack((self.first, self.last)).to(torch.int32)

    @cached_property
    def _reaches(self) -> tuple[list[int], list[int]]:
        """First visible key of each query row, over batch and heads, and the end of its visible keys."""
        sees = self.last > self.first
        low, high = self.first.where(sees, self.keys.tokens).amin((0, 1)), self.last.where(sees, 0).amax((0, 1))
        return low.tolist(), high.tolist()

    def seen(self, first: int, last: int) -> Bool[Tensor, "batch group query key"]:
        """Visible pairs of the query rows first … last−1."""
        low, high = self.first[..., first:last, None], self.last[..., first:last, None]
        pairs = (self.keys.place >= low) & (self.keys.place < high)
        return pairs if self.allowed is None else pairs & self.allowed[..., first:last, :]

    @cached_property
    def visible(self) -> Int[Tensor, "batch group query"]:
        """m_i, the number of keys that each query sees; 0 at padding."""
        return (self.last - self.first).clamp_min(0) if self.allowed is None else self._pair_counts[0]

    @cached_property
    def uniform_distance(self) -> Float[Tensor, "batch group query"]:
        """Mean of |d| over the visible keys; 0 if there are none."""
        if self.allowed is not None:
            total = self._pair_counts[1]
        else:
            before = _sum_to(self.queries.place - self.first) - _sum_to(self.queries.place - self.last)
            after = _sum_to(self.last - 1 - self.queries.place) - _sum_to(self.first - 1 - self.queries.place)
            total = (before + after).where(self.visible > 0, 0)
        return total.double() / self.visible.clamp_min(1)

    def rows_seeing(self, measured: Bool[Tensor, "batch head query"]) -> Int[Tensor, "batch head key"]:
        """The number of measured rows that see each key."""
        if self.allowed is None:
            counted = (measured & (self.visible > 0)).long()
            steps = counted.new_zeros(*counted.shape[:2], self.keys.tokens + 1)
            steps.scatter_add_(-1, self.first.expand_as(counted), counted)
            steps.scatter_add_(-1, self.last.clamp_min(0).expand_as(counted), -counted)
            return steps.cumsum(-1)[..., :-1]
        blocks = _blocks(len(self.keys.start) * measured.shape[1], self.queries.tokens, self.keys.tokens)
        return sum(
            ((self.seen(first, last) & measured[..., first:last, None]).sum(-2) for first, last in blocks),
            start=torch.zeros((), dtype=torch.long, device=measured.device),
        )

    def pairs_of(self, measured: Bool[Tensor, "batch head query"]) -> Int[Tensor, "batch head distance"]:
        """Visible pairs of the measured rows at each distance d, at index d + tokens − 1."""
        if self.allowed is not None:
            return self._pairs_with_holes(measured)
        if (measured == (self.visible > 0)).all():  # the usual case: heads with the same mask share the result
            return self._pairs(self.visible > 0).expand(-1, measured.shape[1], -1)
        return self._pairs(measured)

    def _pairs(self, rows: Bool[Tensor, "batch group query"]) -> Int[Tensor, "batch group distance"]:
        """Every row adds one from its first distance to its last, as the cumulative sum of a step up and a step down."""
        counted = (rows & (self.visible > 0)).long()
        steps = counted.new_zeros(*counted.shape[:2], 2 * self.queries.tokens)
        ahead = self.queries.tokens - 1 - self.queries.place
        steps.scatter_add_(-1, (self.first + ahead).clamp_min(0).expand_as(counted), counted)
        steps.scatter_add_(-1, (self.last + ahead).clamp_min(0).expand_as(counted), -counted)
        return steps.cumsum(-1)[..., :-1]

    def _pairs_with_holes(self, measured: Bool[Tensor, "batch head query"]) -> Int[Tensor, "batch head distance"]:
        total: Tensor | int = 0
        for first, last in _blocks(len(self.keys.start) * measured.shape[1], self.queries.tokens, self.keys.tokens):
            sums = diagonal_sums((self.seen(first, last) & measured[..., first:last, None]).int())
            total = total + pad(sums, (self.queries.tokens - last, first))
        assert isinstance(total, torch.Tensor), "a batch has tokens"
        return total

    @cached_property
    def _pair_counts(self) -> tuple[Tensor, Tensor]:
        """Number of visible keys of each row, and the sum of their distances, counted by pairs."""
        keys, distances = [], []
        assert self.allowed is not None, "without holes both follow from the ends"
        for first, last in _blocks(len(self.keys.start) * self.allowed.shape[1], self.queries.tokens, self.keys.tokens):
            seen = self.seen(first, last)
            keys.append(seen.sum(-1))
            distances.append((seen * (self.keys.place - self.queries.place[first:last, None]).abs()).sum(-1))
        return torch.cat(keys, -1), torch.cat(distances, -1)


def positions_of(start: Tensor, length: Tensor, tokens: int) -> Int[Tensor, "batch token"]:
    """Position of each place among its sequence's real tokens, from 0; −1 at padding."""
    place = torch.arange(tokens, device=start.device) - start[:, None]
    return place.where((place >= 0) & (place < length[:, None]), -1)


def _sum_to(n: Tensor) -> Tensor:
    """1 + 2 + … + n; 0 for n ≤ 0."""
    n = n.clamp_min(0)
    return n * (n + 1) // 2


def _blocks(groups: int, rows: int, keys: int) -> Iterator[tuple[int, int]]:
    """First and last row of each block of `groups` masks."""
    size = rows_per_block(groups * keys)
    for first in range(0, rows, size):
        yield first, min(first + size, rows)


def rows_per_block(elements_per_row: int) -> int:
    return max(1, BLOCK_ELEMENTS // max(1, elements_per_row))


def diagonal_sums(block: Tensor) -> Tensor:
    """Sum a block of rows along its diagonals: [..., row, key] → [..., diagonal], from the last row's first key on.

    Padding each row by one more than its neighbour turns diagonals to columns.
    """
    rows, keys = block.shape[-2:]
    wide = pad(block.flip(-2), (0, rows)).flatten(-2)[..., : rows * (keys + rows - 1)]
    return wide.unflatten(-1, (rows, keys + rows - 1)).sum(-2)


def visibility_from_mask(mask: Tensor | None, *, causal: bool, queries: Axis, keys: Axis | None = None) -> Visibility:
    """Read a mask as given to scaled_dot_product_attention: boolean (True is visible) or added to the scores.

    Without `keys` this is self-attention. An added mask hides where it is below half of the most negative finite number of
    its type. Raises CaptureError if real queries see padding.
    """
    keys = keys or queries
    unmasked = _without_mask(queries, keys, causal=causal)
    if mask is None:
        return unmasked
    mask = _as_4d(mask)
    # a mask that all queries, the batch or heads share is read only once
    if mask.stride(-2) == 0:
        mask = mask[..., :1, :]
    first, last, unbroken, biased = _read(mask, unmasked, causal=causal)
    whole = mask.expand(-1, -1, queries.tokens, keys.tokens)
    allowed = None if unbroken else allows(whole)
    return Visibility(queries, keys, first, last, allowed, whole if biased else None)


def keys_seen(mask: Tensor | None, *, batch: int, keys: int, device: torch.device) -> Bool[Tensor, "batch key"]:
    """Keys that any query of any head sees; without other information, the others are padding."""
    if mask is None:
        return torch.ones(batch, keys, dtype=torch.bool, device=device)
    mask = _as_4d(mask)
    if mask.stride(-2) == 0:
        mask = mask[..., :1, :]
    blocks = _blocks(max(batch, mask.shape[0]) * mask.shape[1], mask.shape[-2], keys)
    seen = [allows(mask[..., first:last, :]).any(-2).any(1) for first, last in blocks]
    return torch.stack(seen).any(0).expand(batch, keys)


def _as_4d(mask: Tensor) -> Tensor:
    return mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)


def _without_mask(queries: Axis, keys: Axis, *, causal: bool) -> Visibility:
    """Visibility without a mask: every real query sees all real keys, or, if causal, those up to its own place."""
    real = queries.real[:, None]
    first = keys.start[:, None, None].expand(-1, 1, queries.tokens)
    end = (keys.start + keys.length)[:, None, None].expand(-1, 1, queries.tokens)
    last = torch.minimum(end, queries.place + 1) if causal else end
    return Visibility(queries, keys, first, last.where(real, first))


def allows(mask: Tensor) -> Bool[Tensor, ...]:
    """Pairs that a mask makes visible; an added mask hides below half of the most negative finite number of its type."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _read(mask: Tensor, unmasked: Visibility, *, causal: bool) -> tuple[Tensor, Tensor, bool, bool]:
    """First visible key and end of each query, whether all keys in between are visible, and whether the mask adds a bias."""
    firsts, lasts = [], []
    unbroken, biased = True, False
    batch, rows, keys = len(unmasked.keys.start), unmasked.queries.tokens, unmasked.keys.tokens
    for first, last in _blocks(max(batch, mask.shape[0]) * mask.shape[1], rows, keys):
        block = mask[..., first:last, :] if mask.shape[-2] > 1 else mask
        allowed = allows(block)
        if not biased and mask.dtype != torch.bool:
            biased = bool((block.masked_fill(~allowed, 0) != 0).any())
        _refuse_seen_padding(block, unmasked, first, last, causal=causal)
        visible = allowed & unmasked.seen(first, last)
        count = visible.sum(-1)
        low = visible.int().argmax(-1)
        high = keys - visible.flip(-1).int().argmax(-1)
        low, high = low.where(count > 0, 0), high.where(count > 0, 0)
        unbroken = unbroken and bool((high - low == count).all())
        firsts.append(low)
        lasts.append(high)
    return torch.cat(firsts, -1), torch.cat(lasts, -1), unbroken, biased


def _refuse_seen_padding(mask: Tensor, unmasked: Visibility, first: int, last: int, *, causal: bool) -> None:
    """Raise CaptureError if real queries see padding, because the pattern would not be one over real keys."""
    queries, keys = unmasked.queries, unmasked.keys
    if bool(keys.real.all()):
        return
    outside = ~keys.real[:, None, None, :] & queries.real[:, None, first:last, None]
    if causal:  # later keys are hidden, whatever the mask contains
        outside = outside & (keys.place <= queries.place[first:last, None])
    open_ = mask if mask.dtype == torch.bool else mask > _OPEN
    if bool((open_ & outside).any()):
        raise CaptureError(
            "padding must be invisible to real tokens; this model's mask shows it to them; "
            "pass attention_mask to the model, or measure one sequence at a time"
        )
