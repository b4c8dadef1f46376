"""`profiles`: float64 sums over the bins of a head, which merge by addition, so that shards need no order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attlas.extract.engines.needs import Needs
from attlas.extract.engines.profiles import CLASS_FLOW, PROFILE_COLUMNS, PROFILES, Profile
from attlas.extract.tables.column import Column
from attlas.extract.tables.recording import AdditiveRecorder
from attlas.extract.tables.table import HEAD, LAYER, SHARD, STACK, Agreement, Table

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from attlas.extract.engines.observations import HeadObservation

_HEAD_KEYS = ("stack", "layer", "head")
_ROWS = "SUM(CAST(query_rows AS DOUBLE))"
_MASS = "SUM(CAST(query_rows AS DOUBLE) * (1 - COALESCE(CAST(mass_sink AS DOUBLE), 0)))"


class ProfileRecorder(AdditiveRecorder):
    """Adds up the profiles of every layer; empty bins give no row."""

    def keep_heads(self, layer: Any, sums: Any, calls: Any) -> Mapping[str, Tensor]:
        from torch import cat

        asked = is_asked(CLASS_FLOW, self.scope.columns)
        flows = [_class_flow(o) for o in calls if asked and "class_flow" in o.rows]
        return {"totals": sums.profiles} | ({"class_flow": cat(flows)} if flows else {})

    def rows(self) -> dict[str, Any]:
        bins = {"totals": PROFILE_COLUMNS, "class_flow": tuple((CLASS_FLOW.name, n) for n in CLASS_FLOW.numbers)}
        return profile_rows(
            self,
            (
                Bins(layer.stack, layer.layer, np.arange(totals.shape[1]), bins[name], totals)
                for name, of_layers in self.sums.items()
                for layer, totals in of_layers.items()
            ),
        )


class Bins(NamedTuple):
    """Profiles of some places of a layer: its heads, or one of its sites. `bins`: the profile and the number of each column.

    `totals` [2, place, column] are sums and counts.
    """

    stack: str
    layer: int
    places: np.ndarray
    bins: Sequence[tuple[str, int]]
    totals: np.ndarray


def profile_rows(recorder: AdditiveRecorder, blocks: Iterable[Bins]) -> dict[str, Any]:
    """The rows of a table of profiles, in its order; empty bins give none."""
    _, *names = (c.name for c in (*recorder.table.keys, *recorder.table.facts))
    parts: list[list[np.ndarray]] = []
    for block in blocks:
        place, column = np.nonzero(block.totals.any(0))
        profiles, numbers = map(np.array, zip(*block.bins, strict=True))
        layer = [np.full(len(place), block.stack), np.full(len(place), block.layer)]
        sums, counts = block.totals[:, place, column]
        parts.append([*layer, block.places[place], profiles[column], numbers[column], sums, counts])
    columns = [np.concatenate(parts_of) for parts_of in zip(*parts, strict=True)] or [np.empty(0) for _ in names]
    order = np.lexsort(columns[4::-1])
    return {"shard": np.full(len(order), recorder.scope.shard)} | {
        name: column[order] for name, column in zip(names, columns, strict=True)
    }


def profile_keys(place: Column, profiles: Iterable[Profile]) -> tuple[Column, ...]:
    """The keys of a table of profiles of heads, or of sites."""
    names = " | ".join(p.name for p in profiles)
    number = "number of the bin; see the bins of each profile"
    return (
        SHARD,
        STACK,
        LAYER,
        place,
        Column(name="profile", dtype="stack", formula=names),
        Column(name="bin", dtype="int16", formula=number, signed=True),
    )


def profile_facts(what: str) -> tuple[Column, ...]:
    """The columns of a table of profiles, whose sums are over rows, or tokens."""
    summed = f"the profile's sum over the shard's {what}; adding shards merges them"
    return (
        Column(name="sum", dtype="float64", formula=summed),
        Column(name="count", dtype="float64", formula="how many entered the bin; see each profile"),
    )


def profile_notes(profiles: Iterable[Profile]) -> str:
    """The bins of profiles as a Markdown table."""
    lines = [("profile", "bins", "sum", "count"), ("---",) * 4]
    lines += [(f"`{p.name}`", p.bins, p.sum, p.count) for p in profiles]
    escaped = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "### Profiles and their bins\n\n" + "\n".join(escaped)


def is_asked(profile: Profile, chosen: Sequence[Column]) -> bool:
    """Whether a profile is among the chosen statistics."""
    return any(column.name == profile.name for column in chosen)


def _class_flow(o: HeadObservation) -> Float[Tensor, "batch 2 head bin"]:
    """Sums by the classes of query and key, and the rows of the query's class."""
    from torch import stack

    sums, rows = o.rows["class_flow"].double(), o.rows["class_rows"].double()
    counts = rows.repeat_interleave(sums.shape[-1] // rows.shape[-1], dim=-1)
    return stack((sums, counts), 1)


def _adds_up(
    profile: str, column: str, target: str, aggregate: str, *, self_attention: bool = False, optional: bool = False
) -> Agreement:
    """The sums or counts of a profile are what the rows of a head come to."""
    return Agreement(
        "profile sums",
        "heads",
        by=_HEAD_KEYS,
        where=f"profile = '{profile}'",
        only="stack <> 'cross'" if self_attention else "TRUE",
        this=f'SUM("{column}")',
        that=aggregate,
        message=f"the {column}s of {profile} do not add up to the {target}",
        tolerance=1e-4,
        optional=optional,
    )


TABLE = Table(
    name="profiles",
    row="shard × stack × layer × head × profile × bin",
    kind="additive",
    keys=profile_keys(HEAD, (*PROFILES, CLASS_FLOW)),
    facts=profile_facts("rows"),
    order=("stack", "layer", "head", "profile", "bin"),
    profiles=(
        Column(
            name=CLASS_FLOW.name,
            example="SELECT bin // 8 AS query_class, bin % 8 AS key_class, SUM(sum) / SUM(count) AS mass FROM profiles WHERE profile = 'class_flow' GROUP BY ALL ORDER BY ALL",
            dtype="float64",
            formula=f"{CLASS_FLOW.sum}, by both classes",
            meaning="Which kind of token looks at which.",
            reference="Clark 2019",
            core=False,
        ),
    ),
    needs=lambda columns: Needs(
        profiles=True, rows=frozenset({"class_flow", "class_rows"}) if is_asked(CLASS_FLOW, columns) else frozenset()
    ),
    recorder=ProfileRecorder,
    example="SELECT profile, bin, SUM({table}.{column}) AS total FROM {table} GROUP BY ALL ORDER BY ALL LIMIT 5",
    agreements=(
        _adds_up("offset", "sum", "mass", _MASS, self_attention=True),
        _adds_up("received_by_position", "sum", "mass", _MASS),
        _adds_up(CLASS_FLOW.name, "sum", "mass", _MASS, optional=True),
        _adds_up("max_weight", "count", "rows", _ROWS),
        _adds_up("entropy_by_position", "count", "rows", _ROWS),
        _adds_up(
            "entropy_by_position", "sum", "entropy", "COALESCE(SUM(CAST(query_rows AS DOUBLE) * entropy_nats), 0)"
        ),
        _adds_up(
            "distance_by_position",
            "sum",
            "distance",
            "COALESCE(SUM(CAST(query_rows AS DOUBLE) * distance_tokens), 0)",
            self_attention=True,
        ),
    ),
    notes=profile_notes((*PROFILES, CLASS_FLOW)),
)
