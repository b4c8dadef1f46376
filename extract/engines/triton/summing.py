"""Head sums of a call on a GPU, by the kernels of `heads`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from attlas.extract.engines import sums
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.profiles import PROFILE_COLUMNS
from attlas.extract.engines.quantities import TOKEN_CLASSES
from attlas.extract.engines.sums import HeadSums, head_quantity
from attlas.extract.engines.triton.arguments import contiguous, steps_of
from attlas.extract.engines.triton.heads import MADE, VALUES, finish_head, sum_rows_and_keys
from attlas.extract.engines.triton.launch import launch
from attlas.extract.engines.triton.results import LOOKED_UP, KernelRows

_OF_WRITES = ("output_norm", "written", "written_first")
_ROWS_AT_ONCE = 32  # that a program, which is one warp, takes together
_PROGRAMS = 1024  # enough to keep a GPU busy, if each has 128 rows or more


def head_sums(o: HeadObservation, names: Sequence[str], *, profiles: bool) -> HeadSums:
    """The named head quantities and the profiles of an observation; of a mask with holes, they are computed in torch."""
    rows, seen = o.rows, o.visibility
    if not isinstance(rows, KernelRows) or seen.allowed is not None:
        return sums.head_sums(o, names, profiles=profiles)
    made = rows.results
    batch, heads, tokens = made.shape
    of = _Asked(tuple(names), made.has_sink, made.has_write, made.has_ids, o.classes is not None)
    values = made.slab.new_empty(len(of.names), batch, heads, dtype=torch.float64)
    parts, part_rows = _parts(batch * heads, tokens)
    of_parts = made.slab.new_empty(batch, heads, parts, VALUES, dtype=torch.float64) if parts > 1 else None
    in_bins = made.slab.new_empty(batch * parts, 2, heads, len(PROFILE_COLUMNS)) if profiles else None
    places, ends = _sum_places(of, values.device), seen.ends
    start, length, classes = map(contiguous, (seen.keys.start, seen.keys.length, o.classes))
    sizes = (*made.places[:3], batch, heads, tokens, made.places.lines, made.places.tiles, parts)
    has = (made.has_sink, made.has_write, made.has_ids)
    launch(
        sum_rows_and_keys,
        (batch * heads, parts, 1),
        (made.slab, ends, start, length, classes, places, of_parts, values, in_bins),
        (*steps_of(ends), *sizes, part_rows),
        (*has, _ROWS_AT_ONCE),
        num_warps=1,
    )
    if of_parts is not None:
        launch(
            finish_head,
            (batch * heads, 1, 1),
            (made.slab, start, length, places, of_parts, values),
            sizes,
            has,
            num_warps=1,
        )
    unknown = []
    for place, name in _others(of):
        quantity = head_quantity(name)
        if quantity.is_known(o):
            values[place] = quantity.compute(o)
        else:
            unknown.append(place)
    for first, last in _runs(tuple(unknown)):
        values[first:last].fill_(torch.nan)
    return HeadSums(values, in_bins)


@cache
def _runs(places: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Ascending places as runs, each from its first to the one after its last: every run costs a launch."""
    starts = [n for n in places if n - 1 not in places]
    ends = [n + 1 for n in places if n + 1 not in places]
    return tuple(zip(starts, ends, strict=True))


class _Asked(NamedTuple):
    """Names of head quantities that are asked for, and what the call has."""

    names: tuple[str, ...]
    has_sink: bool
    has_write: bool
    has_ids: bool
    has_classes: bool


@cache
def _parts(heads: int, tokens: int) -> tuple[int, int]:
    """Into how many parts the rows of each head are divided to be summed, and the rows of a part."""
    parts = max(1, min(_PROGRAMS // heads, tokens // 128))
    rows = -(-tokens // parts // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
    return -(-tokens // rows), rows


@cache
def _sum_places(of: _Asked, device: torch.device) -> Tensor:
    """Where the kernel writes each quantity that it makes: twice its place among the names, plus 1 if it is not known."""
    unknown = {*(() if of.has_sink else ("sink",)), *(() if of.has_ids else LOOKED_UP)}
    unknown |= set() if of.has_classes else {*TOKEN_CLASSES}
    others = {name for _, name in _others(of)}
    place_of = {name: 2 * place + (name in unknown) for place, name in enumerate(of.names) if name not in others}
    places = [place_of.get(name, -1) for name in MADE]
    return torch.tensor(places + [-1] * (VALUES - len(places)), dtype=torch.int32, device=device)


@cache
def _others(of: _Asked) -> tuple[tuple[int, str], ...]:
    """Head quantities that the kernel does not make, and their places among the names."""
    made = {*MADE} - (set() if of.has_write else {*_OF_WRITES})
    return tuple((place, name) for place, name in enumerate(of.names) if name not in made)
