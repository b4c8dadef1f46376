"""What is kept of an attention call: a few sums per sequence and head, from which every column of `heads` follows.

Columns are worked out from them once per shard. Here in plain torch, on any device; `sums_cpu` is the same, compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from extract.engines.rows import Rows
from extract.engines.visibility import Visibility
from extract.statistics.attention import PLACE, QUANTITIES, TOKEN_CLASSES
from extract.statistics.profiles import COLUMN_OF_BIN, HISTOGRAM_BINS, PROFILE_COLUMNS, doubling_bins


class HeadSums(NamedTuple):
    """Sums of one attention call, in float64.

    A quantity that is not known is NaN. Profiles hold sum and count of each bin, over all sequences of the batch, at the
    columns that `PROFILE_COLUMNS` names.
    """

    values: Float[Tensor, "quantity batch head"]
    profiles: Float[Tensor, "2 head column"]


@dataclass(frozen=True)
class HeadObservation:
    """What one attention call showed: row quantities, sums over rows, and the classes of its tokens."""

    rows: Rows
    visibility: Visibility
    classes: Int[Tensor, "batch key"] | None = None  # index into TOKEN_CLASSES; anything at padding


def summed(o: HeadObservation) -> HeadSums:
    """The sums of an observation."""
    rows, visibility = o.rows, o.visibility
    exact = torch.float64
    measured = rows.measured
    count = measured.sum(-1).to(exact)
    visible = (visibility.visible * measured).to(exact)
    several = visible >= 2
    outcomes = visible + (0 if rows.sink is None else 1)
    entropy = rows.entropy.to(exact)
    share = (entropy * several / outcomes.clamp_min(2).log()).clamp_max(1)
    score = rows.score_mean.to(exact)
    total = {
        "rows": count,
        "several": several.sum(-1),
        "masked": (visibility.queries.real[:, None] & (visibility.visible == 0)).sum(-1).expand_as(count),
        "nonfinite": ((visibility.visible > 0) & ~measured).sum(-1),
        "entropy": entropy.sum(-1),
        "entropy_squared": entropy.square().sum(-1),
        "entropy_share": share.sum(-1),
        "attended": (entropy.exp() * measured).sum(-1),
        "collision": rows.collision.to(exact).sum(-1),
        "max_weight": rows.max_weight.to(exact).sum(-1),
        "context_norm": rows.context_norm.to(exact).sum(-1),
        "score_max": rows.score_max.to(exact).where(measured, -torch.inf).amax(-1),
        "pairs": visible.sum(-1),
        "score": (score * visible).sum(-1),
        "score_squared": ((rows.score_variance.to(exact) + score.square()) * visible).sum(-1),
    }
    if rows.update_norm is not None:
        total["update_norm"] = rows.update_norm.to(exact).sum(-1)
    if rows.sink is not None:
        total["sink"] = rows.sink.to(exact).sum(-1)
    if rows.same_token is not None and rows.induction is not None:
        total |= {"same_token": rows.same_token, "induction": rows.induction}
    if rows.patches is not None:
        total |= {"patch_distance": rows.patches.distance, "patch_rows": rows.patches.rows}
    total |= _by_key(o, count, total.get("sink"))
    if not visibility.crosses:
        total |= _by_offset(rows) | {
            "distance": rows.distance.to(exact).sum(-1),
            "offset": rows.offset.to(exact).sum(-1),
            "offset_std": rows.offset_std.to(exact).sum(-1),
            "uniform_distance": (visibility.uniform_distance * measured).sum(-1),
        }
    values = count.new_full((len(QUANTITIES), *count.shape), torch.nan)
    for name, value in total.items():
        values[PLACE[name]] = value
    return HeadSums(values, _profiles(o, share, several))


def _by_offset(rows: Rows) -> dict[str, Tensor]:
    offsets = rows.offsets.double()
    middle = offsets.shape[-1] // 2

    def at(distance: int) -> Tensor:
        return offsets[..., middle + distance] if abs(distance) <= middle else offsets.new_zeros(offsets.shape[:-1])

    return {
        "self": at(0),
        "previous": at(-1),
        "next": at(1),
        "backward": offsets[..., :middle].sum(-1),
        "forward": offsets[..., middle + 1 :].sum(-1),
    }


def _by_key(o: HeadObservation, count: Tensor, sink: Tensor | None) -> dict[str, Tensor]:
    received = o.rows.received.double()
    mean_row = received / count[..., None]
    entropy = -mean_row.xlogy(mean_row).sum(-1)
    if sink is not None:
        entropy = entropy - (sink / count).xlogy(sink / count)
    largest = mean_row.amax(-1)
    # the first of equals; real tokens stand together, so their order is that of the places
    place = (mean_row == largest[..., None]).int().argmax(-1)
    first = o.visibility.keys.start.view(-1, 1, 1).expand(*count.shape, 1)
    of = {
        "first": received.gather(-1, first).squeeze(-1),
        "received_entropy": entropy.clamp_min(0),
        "received_max": largest,
        "received_max_key": (place - first.squeeze(-1)).where(count > 0, torch.nan),
    }
    if o.classes is not None:
        classes = o.classes.where(o.visibility.keys.real, -1)
        of |= {name: (received * (classes == number)[:, None]).sum(-1) for number, name in enumerate(TOKEN_CLASSES)}
    if o.rows.value_norm is not None:
        written = received * o.rows.value_norm
        of |= {"written_first": written.gather(-1, first).squeeze(-1), "written": written.sum(-1)}
    return of


def _profiles(o: HeadObservation, share: Tensor, several: Tensor) -> Tensor:
    """Sum and count of every bin. Bins are added up by matrix products, whose order is the same on every run."""
    rows, seen = o.rows, o.visibility
    heads = rows.measured.shape[1]
    out = share.new_zeros(2, heads, len(PROFILE_COLUMNS))

    def put(name: str, bins: Tensor, sums: Tensor, counts: Tensor) -> None:
        """Sums and counts [head, n] whose bins are [n]."""
        numbers, place = bins.unique(return_inverse=True)
        one_hot = torch.nn.functional.one_hot(place, len(numbers)).to(sums.dtype)
        columns = [COLUMN_OF_BIN[name, number] for number in numbers.tolist()]
        out[:, :, columns] = torch.stack((sums, counts)) @ one_hot

    if not seen.crosses:
        reach = seen.keys.tokens - 1
        distances = torch.arange(-reach, reach + 1, device=share.device)
        pairs = seen.pairs_of(rows.measured)
        put("offset", doubling_bins(distances), rows.offsets.double().sum(0), pairs.double().sum(0))
    for name, values, included in (("entropy", share, several), ("max_weight", rows.max_weight, rows.measured)):
        counts = _histogram(values, included)
        columns = [COLUMN_OF_BIN[name, number] for number in range(HISTOGRAM_BINS)]
        out[:, :, columns] = counts.expand(2, *counts.shape)
    by_position = [("entropy_by_position", rows.entropy, rows.measured, seen.queries)]
    if not seen.crosses:
        by_position.append(("distance_by_position", rows.distance, rows.measured, seen.queries))
    real = seen.keys.real[:, None].expand_as(rows.received)
    by_position.append(("received_by_position", rows.received, real, seen.keys))
    for name, values, included, axis in by_position:
        bins = doubling_bins(axis.positions.clamp_min(0)).reshape(-1)
        put(name, bins, *(t.double().transpose(0, 1).reshape(heads, -1) for t in (values, included)))
    return out


def _histogram(values: Tensor, included: Tensor) -> Float[Tensor, "head bin"]:
    heads = values.shape[1]
    bins = (values * HISTOGRAM_BINS).floor().clamp(0, HISTOGRAM_BINS - 1).long()
    head = torch.arange(heads, device=values.device).view(1, heads, 1)
    flat = (bins + head * HISTOGRAM_BINS)[included.expand_as(bins)]
    return flat.bincount(minlength=heads * HISTOGRAM_BINS).view(heads, HISTOGRAM_BINS).double()
