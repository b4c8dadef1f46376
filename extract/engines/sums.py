"""Head quantities: a few numbers per head and sequence, from which every column of `heads` is computed.

A row quantity with a `merge` is also a head quantity: the sum or the maximum of the measured rows. The others have a
function here, in torch, for any device; `sums_cpu` has compiled versions of most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.profiles import (
    COLUMN_OF_BIN,
    HISTOGRAM_BINS,
    LARGEST_DOUBLING_BIN,
    PROFILE_COLUMNS,
    doubling_bins,
)
from attlas.extract.engines.quantities import ROW_QUANTITIES, TOKEN_CLASSES, Fact, Merge, RowQuantity


class HeadSums(NamedTuple):
    """The head quantities of one attention layer in float64, and its profiles, in parts to be added up in float64.

    Unknown quantities are NaN. Profiles contain sum and count of each bin, over all sequences of the batch, in the columns
    of `PROFILE_COLUMNS`; None if they were not asked for.
    """

    values: Float[Tensor, "quantity batch head"]
    profiles: Float[Tensor, "part 2 head column"] | None


Compute = Callable[[HeadObservation], Float[Tensor, "batch head"]]


@dataclass(frozen=True, kw_only=True)
class HeadQuantity:
    """A number of one head in one sequence.

    `rows` are the row quantities from which it is computed, `facts` what else the call must have. `merge` is how the
    numbers of a sequence's windows are combined; None if they cannot be.
    """

    name: str
    compute: Compute
    rows: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    merge: Merge | None = "sum"

    def is_known(self, o: HeadObservation) -> bool:
        """Whether the observation has everything that it needs."""
        has = {"positions": not o.visibility.is_cross_attention, "classes": o.classes is not None, "stream": False}
        return all(name in o.rows for name in self.rows) and all(has[fact] for fact in self.facts)


HEAD_QUANTITIES: dict[str, HeadQuantity] = {}


def head_quantity(name: str) -> HeadQuantity:
    """The head quantity of this name: one with a function here, or a row quantity merged over rows."""
    if name in HEAD_QUANTITIES:
        return HEAD_QUANTITIES[name]
    row = ROW_QUANTITIES[name]
    assert row.merge is not None, f"{name} does not merge over rows"
    return HeadQuantity(name=name, compute=partial(_merge_rows, row), rows=(name,), merge=row.merge)


def _merge_rows(row: RowQuantity, o: HeadObservation) -> Tensor:
    values = o.rows[row.name].double()
    if row.axis == "head":
        return values
    return values.sum(-1) if row.merge == "sum" else values.where(o.rows.measured, -torch.inf).amax(-1)


def row_quantities_for(names: Iterable[str]) -> frozenset[str]:
    """The row quantities from which the named head quantities are computed."""
    return frozenset(row for name in names for row in head_quantity(name).rows)


def head_sums(o: HeadObservation, names: Sequence[str], *, profiles: bool) -> HeadSums:
    """The named head quantities of an observation, and its profiles if asked for."""
    values = o.count.new_full((len(names), *o.count.shape), torch.nan)
    for place, quantity in enumerate(map(head_quantity, names)):
        if quantity.is_known(o):
            values[place] = quantity.compute(o)
    return HeadSums(values, _profiles(o)[None] if profiles else None)


def _quantity(
    *rows: str, facts: tuple[Fact, ...] = (), merge: Merge | None = "sum", name: str = ""
) -> Callable[[Compute], Compute]:
    """Register a function as the head quantity of its name."""

    def record(compute: Compute) -> Compute:
        named = name or getattr(compute, "__name__", "")
        HEAD_QUANTITIES[named] = HeadQuantity(name=named, compute=compute, rows=rows, facts=facts, merge=merge)
        return compute

    return record


@_quantity()
def rows(o: HeadObservation) -> Tensor:
    """Measured rows."""
    return o.count


@_quantity()
def several(o: HeadObservation) -> Tensor:
    """Measured rows that see two keys or more."""
    return (o.visible_keys >= 2).sum(-1)


@_quantity()
def masked(o: HeadObservation) -> Tensor:
    """Rows that see no key."""
    sees_nothing = o.visibility.queries.real[:, None] & (o.visibility.visible == 0)
    return sees_nothing.sum(-1).expand_as(o.count)


@_quantity()
def nonfinite(o: HeadObservation) -> Tensor:
    """Rows that see keys but are not measured."""
    return ((o.visibility.visible > 0) & ~o.rows.measured).sum(-1)


@_quantity("entropy")
def entropy_squared(o: HeadObservation) -> Tensor:
    return o.entropy.square().sum(-1)


@_quantity("entropy", name="entropy_share")
def entropy_share_sum(o: HeadObservation) -> Tensor:
    """Σ H_i / ln m_i over rows that see several keys."""
    return o.entropy_share.sum(-1)


@_quantity("entropy")
def attended(o: HeadObservation) -> Tensor:
    """Σ exp H_i."""
    return (o.entropy.exp() * o.rows.measured).sum(-1)


@_quantity(facts=("positions",))
def uniform_distance(o: HeadObservation) -> Tensor:
    """Σ of the mean |d| over the visible keys."""
    return (o.visibility.uniform_distance * o.rows.measured).sum(-1)


@_quantity("score_mean")
def pairs(o: HeadObservation) -> Tensor:
    """Visible (query, key) pairs of measured rows."""
    return o.visible_keys.sum(-1)


@_quantity("score_mean")
def score(o: HeadObservation) -> Tensor:
    """Σ s over visible pairs."""
    return (o.rows["score_mean"].double() * o.visible_keys).sum(-1)


@_quantity("score_mean", "score_variance")
def score_squared(o: HeadObservation) -> Tensor:
    """Σ s² over visible pairs."""
    mean = o.rows["score_mean"].double()
    return ((o.rows["score_variance"].double() + mean.square()) * o.visible_keys).sum(-1)


def _mass_at(distance: int, o: HeadObservation) -> Tensor:
    """Σ p at a distance that has a bin of its own."""
    return o.rows["offset_bins"][..., LARGEST_DOUBLING_BIN + distance].double()


for _name, _distance in (("self", 0), ("previous", -1), ("next", 1)):
    _quantity("offset_bins", name=_name)(partial(_mass_at, _distance))


@_quantity("offset_bins")
def backward(o: HeadObservation) -> Tensor:
    """Σ p over d < 0."""
    return o.rows["offset_bins"][..., :LARGEST_DOUBLING_BIN].double().sum(-1)


@_quantity("offset_bins")
def forward(o: HeadObservation) -> Tensor:
    """Σ p over d > 0."""
    return o.rows["offset_bins"][..., LARGEST_DOUBLING_BIN + 1 :].double().sum(-1)


def _first_key(o: HeadObservation, values: Tensor) -> Tensor:
    """The values at each sequence's first token."""
    first = o.visibility.keys.start.view(-1, 1, 1).expand(*values.shape[:2], 1)
    return values.gather(-1, first).squeeze(-1)


@_quantity("received", merge=None)
def first(o: HeadObservation) -> Tensor:
    """Σ p on the first token."""
    return _first_key(o, o.received)


def _mass_of_class(number: int, o: HeadObservation) -> Tensor:
    assert o.classes is not None, "asked for where classes are known"
    return (o.received * ((o.classes == number) & o.visibility.keys.real)[:, None]).sum(-1)


for _number, _name in enumerate(TOKEN_CLASSES):
    _quantity("received", facts=("classes",), name=_name)(partial(_mass_of_class, _number))


@_quantity("received", merge=None)
def received_entropy(o: HeadObservation) -> Tensor:
    """Entropy of the mean row, a learned sink being one outcome."""
    entropy = -o.mean_row.xlogy(o.mean_row).sum(-1)
    if "sink" in o.rows:
        share = o.rows["sink"].double().sum(-1) / o.count
        entropy = entropy - share.xlogy(share)
    return entropy.clamp_min(0)


@_quantity("received", merge=None)
def received_max(o: HeadObservation) -> Tensor:
    """The largest entry of the mean row."""
    return o.mean_row.amax(-1)


@_quantity("received", merge=None)
def received_max_key(o: HeadObservation) -> Tensor:
    """Its position, the first of equal ones; real tokens are contiguous, so places have the order of positions."""
    place = (o.mean_row == o.mean_row.amax(-1)[..., None]).int().argmax(-1)
    first_place = o.visibility.keys.start.view(-1, 1).expand_as(o.count)
    return (place - first_place).where(o.count > 0, torch.nan)


# the share of its rows' attention from which a key is a sink (Gu 2025)
_SINK_SHARE = 0.3


@_quantity("received", merge=None)
def sink_keys(o: HeadObservation) -> Tensor:
    """Keys that receive more than 0.3 of the attention of the rows that see them, of those that half of the rows see."""
    seen = o.visibility.rows_seeing(o.rows.measured).double()
    is_common = (seen > 0) & (2 * seen >= o.count[..., None])
    return (is_common & (o.received > _SINK_SHARE * seen)).sum(-1).double().where(o.count > 0, torch.nan)


@_quantity()
def keys(o: HeadObservation) -> Tensor:
    """Real keys."""
    return o.visibility.keys.real.sum(-1)[:, None].expand_as(o.count)


@_quantity("value_norm", merge=None)
def value_norm_first(o: HeadObservation) -> Tensor:
    """‖v_0 W_O^h‖ of the first token."""
    return _first_key(o, o.rows["value_norm"].double())


@_quantity("self_score", "score_max", "max_weight")
def log_self(o: HeadObservation) -> Tensor:
    """Σ ln p[i,i] over rows where it is not 0."""
    return _log_self(o).nan_to_num(0).sum(-1)


@_quantity("self_score", "score_max", "max_weight")
def log_self_rows(o: HeadObservation) -> Tensor:
    """Rows with p[i,i] > 0."""
    return _log_self(o).isfinite().sum(-1)


def _log_self(o: HeadObservation) -> Float[Tensor, "batch head query"]:
    """ln p[i,i]; NaN where p[i,i] is 0, also by rounding in the pattern's type."""
    log = o.log_self_weights
    return log.where(o.rows.measured & (log.to(o.rows["max_weight"].dtype).exp() > 0), torch.nan)


@_quantity("received", "value_norm", merge=None)
def written_first(o: HeadObservation) -> Tensor:
    """Σ p ‖v W_O^h‖ on the first token."""
    return _first_key(o, o.received * o.rows["value_norm"])


@_quantity("received", "value_norm")
def written(o: HeadObservation) -> Tensor:
    """Σ p ‖v W_O^h‖ on all keys."""
    return (o.received * o.rows["value_norm"]).sum(-1)


@_quantity("pattern_rank", name="pattern_rank", merge=None)
def rank_of_pattern(o: HeadObservation) -> Tensor:
    """Effective rank of the measured rows."""
    return o.rows["pattern_rank"].double().where(o.count > 0, torch.nan)


@_quantity("received", facts=("stream",), merge=None)
def massive(o: HeadObservation) -> Tensor:
    """Σ p on massive keys. The stream may be seen after its attention call: recorders add it, with `massive_mass`."""
    raise NotImplementedError


# --- profiles ------------------------------------------------------------------------------------------------------

# the row quantities from which profiles are made
PROFILE_ROWS = ("entropy", "max_weight", "distance", "received", "offset_bins")


def _profiles(o: HeadObservation) -> Float[Tensor, "2 head column"]:
    """Sum and count of every bin, added up with matrix products, whose order of summation is the same in every run."""
    measured, visibility = o.rows.measured, o.visibility
    heads = measured.shape[1]
    out = o.count.new_zeros(2, heads, len(PROFILE_COLUMNS))

    def put(name: str, bins: Tensor, sums: Tensor, counts: Tensor) -> None:
        """Sums and counts [head, n] whose bins are [n]."""
        numbers, place = bins.unique(return_inverse=True)
        one_hot = torch.nn.functional.one_hot(place, len(numbers)).to(sums.dtype)
        columns = [COLUMN_OF_BIN[name, number] for number in numbers.tolist()]
        out[:, :, columns] = torch.stack((sums, counts)) @ one_hot

    if not visibility.is_cross_attention:
        reach = visibility.keys.tokens - 1
        distances = torch.arange(-reach, reach + 1, device=measured.device)
        pairs = visibility.pairs_of(measured).double().sum(0)
        put("offset", doubling_bins(distances), torch.zeros_like(pairs), pairs)
        bins = range(-LARGEST_DOUBLING_BIN, LARGEST_DOUBLING_BIN + 1)
        out[0, :, [COLUMN_OF_BIN["offset", number] for number in bins]] = o.rows["offset_bins"].double().sum(0)
    histograms = (("entropy", o.entropy_share, o.visible_keys >= 2), ("max_weight", o.rows["max_weight"], measured))
    for name, values, included in histograms:
        counts = _histogram(values, included)
        columns = [COLUMN_OF_BIN[name, number] for number in range(HISTOGRAM_BINS)]
        out[:, :, columns] = counts.expand(2, *counts.shape)
    by_position = [("entropy_by_position", o.rows["entropy"], measured, visibility.queries)]
    if not visibility.is_cross_attention:
        by_position.append(("distance_by_position", o.rows["distance"], measured, visibility.queries))
    real = visibility.keys.real[:, None].expand_as(o.rows["received"])
    by_position.append(("received_by_position", o.rows["received"], real, visibility.keys))
    for name, values, included, axis in by_position:
        bins = doubling_bins(axis.positions.clamp_min(0)).reshape(-1)
        put(name, bins, *(t.double().transpose(0, 1).reshape(heads, -1) for t in (values, included)))
    return out


def _histogram(
    values: Float[Tensor, "batch head query"], included: Bool[Tensor, "batch head query"]
) -> Float[Tensor, "head bin"]:
    heads = values.shape[1]
    bins = (values * HISTOGRAM_BINS).floor().clamp(0, HISTOGRAM_BINS - 1).long()
    head = torch.arange(heads, device=values.device).view(1, heads, 1)
    flat = (bins + head * HISTOGRAM_BINS)[included.expand_as(bins)]
    return flat.bincount(minlength=heads * HISTOGRAM_BINS).view(heads, HISTOGRAM_BINS).double()
