"""`residual_profiles`: float64 counts of the tokens of a residual site, which merge by addition, so that shards need no order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from attlas.extract.engines.needs import Needs
from attlas.extract.engines.stream_profiles import MASSIVE, STREAM_PROFILES, TOKEN_NORM
from attlas.extract.tables.column import Column
from attlas.extract.tables.profiles import Bins, is_asked, profile_facts, profile_keys, profile_notes, profile_rows
from attlas.extract.tables.recording import AdditiveRecorder
from attlas.extract.tables.residual import SITE
from attlas.extract.tables.table import Table

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

        return {MASSIVE.name: count_decades(o)} if is_asked(MASSIVE, self.scope.columns) else None

    def rows(self) -> dict[str, Any]:
        return profile_rows(
            self,
            (
                Bins(
                    site.stack,
                    site.layer,
                    np.array([site.name]),
                    [(profile.name, number) for number in profile.numbers],
                    np.broadcast_to(counts, (2, 1, len(counts))),
                )
                for profile in STREAM_PROFILES
                for site, counts in self.sums.get(profile.name, {}).items()
            ),
        )


TABLE = Table(
    name="residual_profiles",
    row="shard × stack × layer × site × profile × bin",
    kind="additive",
    of_stream=True,
    keys=profile_keys(SITE, STREAM_PROFILES),
    facts=profile_facts("tokens"),
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
    needs=lambda columns: Needs(stream_profiles=True, states=is_asked(MASSIVE, columns)),
    recorder=StreamProfileRecorder,
    notes=profile_notes(STREAM_PROFILES),
)
