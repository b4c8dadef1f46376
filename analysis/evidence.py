"""The evidence that defects and findings are judged by: means, extremes and labels, each computed at most once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD, head_estimates
from attlas.analysis.inference import wide
from attlas.analysis.kinds import MIN_TOKENS, HeadShares
from attlas.analysis.massive import massive_activations
from attlas.analysis.residual import residual_through_depth
from attlas.analysis.summaries import Aside, averaged_columns, scan_once

HEAD_COLUMNS = ("output_norm", "mass_first", "mass_massive", "value_ratio_first", "mutual_information_nats")
RESIDUAL_COLUMNS = ("stream_norm_median", "max_abs")


def _extremes_of_part(rows: pl.DataFrame) -> pl.DataFrame:
    finite = {name: pl.col(name).filter(pl.col(name).is_finite()) for name in ("score_max", "entropy_nats")}
    is_long = pl.col("query_rows").filter(pl.col("entropy_nats").is_finite()) >= MIN_TOKENS
    return rows.group_by(HEAD).agg(
        pl.col("nonfinite_rows", "query_rows").cast(pl.Int64).sum(),
        finite["score_max"].cast(pl.Float64).max(),
        entropy_largest=finite["entropy_nats"].filter(is_long).cast(pl.Float64).max(),
    )


# what sums over documents cannot tell: counts and largest values
EXTREMES = Aside(("nonfinite_rows", "query_rows", "score_max", "entropy_nats"), _extremes_of_part)


@dataclass(frozen=True)
class Evidence:
    """What is known of a dataset. `estimates`, `through_depth` and `extremes` (of a pass with EXTREMES): where these are at hand."""

    dataset: Dataset
    estimates: pl.DataFrame | None = None
    through_depth: pl.DataFrame | None = None
    extremes: pl.DataFrame | None = None

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.dataset.manifest

    @cached_property
    def shares(self) -> HeadShares:
        return HeadShares.of(self.dataset, self.estimates)

    @cached_property
    def heads(self) -> pl.DataFrame:
        """A row per head: extremes over sequences, HEAD_COLUMNS with intervals, and the shares of its attention and `is_at_rest`.

        A head of which no row could be measured has no means.
        """
        estimates = self.estimates
        present = [name for name in HEAD_COLUMNS if name in averaged_columns(self.dataset, "heads")]
        if estimates is None:
            estimates = head_estimates(self.dataset, present)
        means = wide(estimates, HEAD, present)
        shares = self.shares.frame().with_columns(is_first=self.shares.shares.is_first)
        return self._extremes().join(means, on=HEAD, how="left").join(shares, on=HEAD, how="left").sort(HEAD)

    def _extremes(self) -> pl.DataFrame:
        frame = self.extremes
        if frame is None:
            _, (frame,) = scan_once(self.dataset, "heads", [], [EXTREMES])
        counts = pl.col("nonfinite_rows", "query_rows").sum()
        return frame.group_by(HEAD).agg(counts, pl.col("score_max", "entropy_largest").max())

    @cached_property
    def residual(self) -> pl.DataFrame:
        """A row per site of the stream, with RESIDUAL_COLUMNS where they were measured."""
        if self.through_depth is not None:
            return self.through_depth
        present = set(averaged_columns(self.dataset, "residual"))
        return residual_through_depth(self.dataset, tuple(name for name in RESIDUAL_COLUMNS if name in present))

    @cached_property
    def massive(self) -> pl.DataFrame:
        return massive_activations(self.dataset)
