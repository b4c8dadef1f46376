"""Documents into windows, windows into batches of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from extract.errors import Refusal


def windows(ids: Sequence[int], *, size: int, stride: int) -> Iterator[tuple[int, Sequence[int]]]:
    """(first_token, ids) of each window: `size` ids at most, the last `stride` of a window open the next one.

    Every id is in at least one window, and no window lies inside the one before it; no ids give no window.
    """
    check_window(size=size, stride=stride)
    if len(ids) == 0:
        return iter(())
    # a window that begins where only overlap is left would repeat the tail of the one before
    starts = range(0, max(len(ids) - stride, 1), size - stride)
    return ((first, ids[first : first + size]) for first in starts)


def check_window(*, size: int, stride: int) -> None:
    if size < 1:
        raise Refusal(f"a window holds at least one token; its size came out as {size}; use a larger max_length")
    if not 0 <= stride < size:
        raise Refusal(
            f"stride must be at least 0 and below the window's {size} tokens; got {stride}; use a smaller one"
        )


def batches(lengths: Sequence[int], *, token_budget: int) -> list[list[int]]:
    """Indices in batches of like length, none above `token_budget` positions, padding included.

    A sequence longer than the budget is a batch of its own. The same lengths give the same batches.
    """
    if token_budget < 1:
        raise Refusal(f"token_budget must be at least 1; got {token_budget}; give the tokens that fit in memory")
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    starts = [0] if order else []
    for place, index in enumerate(order):
        # ascending order: the sequence that comes is the longest so far
        if place > starts[-1] and lengths[index] * (place - starts[-1] + 1) > token_budget:
            starts.append(place)
    return [order[first:last] for first, last in pairwise([*starts, len(order)])]


def padded_positions(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """Positions that the batches take in the model, padding included."""
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
