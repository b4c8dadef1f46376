"""Cut documents into windows, group sequences into batches of similar length, and say how many shards are in work at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from attlas.extract.errors import Refusal

# one shard is in the model while another is written; a third would only use memory
SHARDS_AT_ONCE = 2


def windows(ids: Sequence[int], *, size: int, stride: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield (first_token, ids) for each window of at most `size` ids; consecutive windows overlap by `stride` ids.

    Every id is in at least one window, and no window is contained in the previous one. No ids give no window.
    """
    check_window(size=size, stride=stride)
    if len(ids) == 0:
        return iter(())
    # a window that starts in the last `stride` ids would repeat the end of the previous one
    starts = range(0, max(len(ids) - stride, 1), size - stride)
    return ((first, ids[first : first + size]) for first in starts)


def check_window(*, size: int, stride: int) -> None:
    """Raise Refusal for a window without tokens, and for an overlap that leaves no room for new ones."""
    if size < 1:
        raise Refusal(f"a window must hold at least one token; its size is {size}; use a larger max_length")
    if not 0 <= stride < size:
        raise Refusal(
            f"stride must be at least 0 and less than the window's {size} tokens; got {stride}; use a smaller one"
        )


def batches(lengths: Sequence[int], *, token_budget: int) -> list[list[int]]:
    """Group indices into batches of similar length, each of at most `token_budget` positions including padding.

    A sequence longer than the budget gets its own batch. The same lengths always give the same batches.
    """
    if token_budget < 1:
        raise Refusal(
            f"token_budget must be at least 1; got {token_budget}; use the number of tokens that fit into memory"
        )
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    starts = [0] if order else []
    for place, index in enumerate(order):
        # in ascending order, this sequence is the longest so far
        if place > starts[-1] and lengths[index] * (place - starts[-1] + 1) > token_budget:
            starts.append(place)
    return [order[first:last] for first, last in pairwise([*starts, len(order)])]


def padded_positions(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """The number of positions in all batches, padding included."""
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
