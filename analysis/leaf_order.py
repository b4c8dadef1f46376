"""The best order of the leaves of a dendrogram: neighbours are as near each other as the tree allows.

Of the 2^(n − 1) orders that a tree of n leaves can be drawn in, the one with the least sum of distances between neighbours. For each
subtree, M[u, w] is this sum in the best order that begins with leaf u and ends with leaf w. With children A and B, u in A and w in B,
M[u, w] = min over m in A and k in B of M_A[u, m] + D[m, k] + M_B[k, w]. SciPy's `optimal_leaf_ordering` computes the same sums but
often returns another order (scipy/scipy#11227, open in SciPy 1.17).
Source: Bar-Joseph, Gifford & Jaakkola 2001, Fast optimal leaf ordering for hierarchical clustering.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Subtree:
    """A subtree, whose leaves have the numbers from `first` to `last` − 1 in the order in which the tree has them."""

    first: int
    last: int
    children: tuple[_Subtree, _Subtree] | None = None

    @property
    def run(self) -> slice:
        return slice(self.first, self.last)

    def sides(self) -> Iterator[tuple[slice, slice]]:
        """Where an order of the leaves may begin, and where it then ends."""
        if self.children is None:
            yield self.run, self.run
        else:
            left, right = self.children
            yield left.run, right.run
            yield right.run, left.run

    def other_side(self, leaf: int) -> slice:
        """Where an order ends that begins with a leaf."""
        return next(ends for begins, ends in self.sides() if begins.start <= leaf < begins.stop)


def best_leaf_order(tree: Floats, distances: Floats) -> NDArray[np.int64]:
    """The leaves in the best order; of its two directions the one that begins with the lower number.

    tree: as SciPy's `linkage` gives it. distances: [leaf, leaf], symmetric. Takes n³ operations at most.
    """
    from scipy.cluster.hierarchy import leaves_list

    leaves = leaves_list(tree).astype(np.int64)
    subtrees = _subtrees(tree)
    between = distances[np.ix_(leaves, leaves)]
    sums = np.zeros_like(between)  # M of the least subtree with both leaves, symmetric
    for subtree in subtrees:
        _add_sums(sums, between, subtree)
    order = leaves[_trace(sums, between, subtrees[-1])]
    return order if order[0] <= order[-1] else order[::-1]


def _subtrees(tree: Floats) -> list[_Subtree]:
    """All subtrees of more than one leaf, each after those within it."""
    leaves = len(tree) + 1
    sizes = [1] * leaves + tree[:, 3].astype(int).tolist()
    children = tree[:, :2].astype(int).tolist()
    first = [0] * len(sizes)
    for node in range(len(sizes) - 1, leaves - 1, -1):
        left, right = children[node - leaves]
        first[left], first[right] = first[node], first[node] + sizes[left]
    found = [_Subtree(first[leaf], first[leaf] + 1) for leaf in range(leaves)]
    for node in range(leaves, len(sizes)):
        left, right = (found[child] for child in children[node - leaves])
        found.append(_Subtree(first[node], first[node] + sizes[node], (left, right)))
    return found[leaves:]


def _add_sums(sums: Floats, distances: Floats, subtree: _Subtree) -> None:
    """M of the pairs of leaves that are first together in this subtree, from M of its children."""
    assert subtree.children is not None
    left, right = subtree.children
    # the best order of the left child from each of its leaves, and the step from its end to each leaf of the right one
    reached = np.empty((left.last - left.first, right.last - right.first))
    for begins, ends in left.sides():
        rows = slice(begins.start - left.first, begins.stop - left.first)
        reached[rows] = _least_sums(sums[begins, ends], distances[ends, right.run])
    for begins, ends in right.sides():
        columns = slice(begins.start - right.first, begins.stop - right.first)
        best = _least_sums(reached[:, columns], sums[begins, ends])
        sums[left.run, ends], sums[ends, left.run] = best, best.T


def _least_sums(a: Floats, b: Floats) -> Floats:
    """min over m of a[u, m] + b[m, k], in a loop over the shorter of u and m."""
    if a.shape[0] <= a.shape[1]:
        return np.stack([(row[:, None] + b).min(0) for row in a])
    least = a[:, :1] + b[:1]
    for m in range(1, a.shape[1]):
        np.minimum(least, a[:, m : m + 1] + b[m], out=least)
    return least


def _trace(sums: Floats, distances: Floats, root: _Subtree) -> list[int]:
    """The numbers of the leaves in the best order: the ends of each subtree say where its children begin and end."""
    assert root.children is not None
    left, right = (child.run for child in root.children)
    u, w = np.unravel_index(sums[left, right].argmin(), (left.stop - left.start, right.stop - right.start))
    order, waiting = [], [(root, int(u) + left.start, int(w) + right.start)]
    while waiting:
        subtree, begin, end = waiting.pop()
        if subtree.children is None:
            order.append(begin)
            continue
        one, other = subtree.children
        if begin >= one.last:
            one, other = other, one
        ends, begins = one.other_side(begin), other.other_side(end)
        total = sums[begin, ends, None] + distances[ends, begins] + sums[begins, end]
        m, k = np.unravel_index(total.argmin(), total.shape)
        # the last one is taken first
        waiting += [(other, int(k) + begins.start, end), (one, begin, int(m) + ends.start)]
    return order
