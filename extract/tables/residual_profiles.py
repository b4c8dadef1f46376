"""`residual_profiles`: float64 counts of the tokens of a residual site, which merge by addition, so that shards need no order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from attlas.extract.engines.needs import Needs
from attlas.extract.engines.stream_profiles import MASSIVE, STREAM_PROFILES, TOKEN_NORM
from attlas.extract.tables.column import Column
from attlas.extract.tables.profiles import profile_notes
from attlas.extract.tables.recording import AdditiveRecorder
from attlas.extract.tables.residual import SITE
from attlas.extract.tables.table import LAYER, SHARD, STACK, Table

if TYPE_CHECKING:
    from torch import Tensor

    from attlas.extract.engines.observations import ResidualObservation
    from attlas.extract.engines.stream_profiles import SiteSums


class StreamProfileRecorder(AdditiveRecorder):
    """Adds up the counts of every site; empty bins give no row."""

    def keep_site(self, site: Any, sums: SiteSums) -> Mapping[str, Tensor] | None:
        return None if sums.counts is None else {TOKEN_NORM.name: sums.counts}

    def keep_state(self, site: Any, o: ResidualObservation) -> Mapping[str, Tensor] | None:
        from attlas.extract.engines.stream_profiles import count_decades

        asked = any(c.name == MASSIVE.name for c in self.scope.columns)
        return {MASSIVE.name: count_decades(o)} if asked else None

    def rows(self) -> dict[str, Any]:
        rows = sorted(
            (site.stack, site.layer, site.name, profile.name, profile.numbers[place], counts[place], counts[place])
            for profile in STREAM_PROFILES
            for site, counts in self.sums.get(profile.name, {}).items()
            for place in np.flatnonzero(counts).tolist()
        )
        names = ("stack", "layer", "site", "profile", "bin", "sum", "count")
        columns = list(zip(*rows, strict=True)) or [() for _ in names]
        return {"shard": np.full(len(rows), self.scope.shard)} | dict(zip(names, columns, strict=True))


TABLE = Table(
    name="residual_profiles",
    row="shard × stack × layer × site × profile × bin",
    kind="additive",
    of_stream=True,
    keys=(
        SHARD,
        STACK,
        LAYER,
        SITE,
        Column(name="profile", dtype="stack", formula=" | ".join(p.name for p in STREAM_PROFILES)),
        Column(name="bin", dtype="int16", formula="number of the bin; see the bins of each profile", signed=True),
    ),
    facts=(
        Column(
            name="sum", dtype="float64", formula="the profile's sum over the shard's tokens; adding shards merges them"
        ),
        Column(name="count", dtype="float64", formula="how many entered the bin; see each profile"),
    ),
    profiles=(
        Column(
            name=MASSIVE.name,
            example="SELECT layer, site, bin, SUM(count) AS tokens FROM residual_profiles WHERE profile = 'massive' GROUP BY ALL ORDER BY ALL",
            dtype="float64",
            formula=f"{MASSIVE.sum}, by {MASSIVE.bins}",
            meaning="How far the largest entry of a token's state stands out: massive activations are in the last bins.",
            reference="Sun 2024",
            core=False,
        ),
    ),
    order=("stack", "layer", "site", "profile", "bin"),
    example="SELECT stack, layer, site, bin, SUM({column}) AS {column} FROM residual_profiles WHERE profile = 'token_norm' GROUP BY ALL ORDER BY ALL LIMIT 20",
    needs=lambda columns: Needs(stream_profiles=True, states=any(c.name == MASSIVE.name for c in columns)),
    recorder=StreamProfileRecorder,
    notes=profile_notes(STREAM_PROFILES),
)
