"""`profiles`: float64 sums over the bins of a head, which merge by addition, so that shards need no order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from attlas.extract.engines.needs import Needs
from attlas.extract.engines.profiles import PROFILE_COLUMNS, PROFILES
from attlas.extract.tables.column import Column
from attlas.extract.tables.recording import AdditiveRecorder
from attlas.extract.tables.table import HEAD, LAYER, SHARD, STACK, Agreement, Table

if TYPE_CHECKING:
    from torch import Tensor

_HEAD_KEYS = ("stack", "layer", "head")
_ROWS = "SUM(CAST(query_rows AS DOUBLE))"
_MASS = "SUM(CAST(query_rows AS DOUBLE) * (1 - COALESCE(CAST(mass_sink AS DOUBLE), 0)))"


class ProfileRecorder(AdditiveRecorder):
    """Adds up the profiles of every layer; empty bins give no row."""

    def keep_heads(self, layer: Any, sums: Any, calls: Any) -> Mapping[str, Tensor]:
        return {"totals": sums.profiles}

    def rows(self) -> dict[str, Any]:
        rows = sorted(
            (layer.stack, layer.layer, head, *PROFILE_COLUMNS[column], *totals[:, head, column])
            for layer, totals in self.totals.items()
            for head, column in np.argwhere(totals.any(0)).tolist()
        )
        names = ("stack", "layer", "head", "profile", "bin", "sum", "count")
        columns = list(zip(*rows, strict=True)) or [() for _ in names]
        return {"shard": np.full(len(rows), self.scope.shard)} | dict(zip(names, columns, strict=True))


def _adds_up(profile: str, column: str, target: str, aggregate: str, *, self_attention: bool = False) -> Agreement:
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
    )


TABLE = Table(
    name="profiles",
    row="shard × stack × layer × head × profile × bin",
    kind="additive",
    keys=(
        SHARD,
        STACK,
        LAYER,
        HEAD,
        Column(name="profile", dtype="stack", formula=" | ".join(p.name for p in PROFILES)),
        Column(name="bin", dtype="int16", formula="number of the bin; see the bins of each profile", signed=True),
    ),
    facts=(
        Column(
            name="sum", dtype="float64", formula="the profile's sum over the shard's rows; adding shards merges them"
        ),
        Column(name="count", dtype="float64", formula="how many entered the bin; see each profile"),
    ),
    order=("stack", "layer", "head", "profile", "bin"),
    needs=lambda columns: Needs(profiles=True),
    recorder=ProfileRecorder,
    example="SELECT profile, bin, SUM({table}.{column}) AS total FROM {table} GROUP BY ALL ORDER BY ALL LIMIT 5",
    agreements=(
        _adds_up("offset", "sum", "mass", _MASS, self_attention=True),
        _adds_up("received_by_position", "sum", "mass", _MASS),
        _adds_up("max_weight", "count", "rows", _ROWS),
        _adds_up("entropy_by_position", "count", "rows", _ROWS),
        _adds_up("entropy_by_position", "sum", "entropy", "SUM(CAST(query_rows AS DOUBLE) * entropy_nats)"),
        _adds_up(
            "distance_by_position",
            "sum",
            "distance",
            "SUM(CAST(query_rows AS DOUBLE) * distance_tokens)",
            self_attention=True,
        ),
    ),
    notes="### Profiles and their bins\n\n"
    + "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        for line in (
            ("profile", "bins", "sum", "count"),
            ("---",) * 4,
            *((f"`{p.name}`", p.bins, p.sum, p.count) for p in PROFILES),
        )
    ),
)
