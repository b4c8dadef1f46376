"""Everything that the report says, as frames; how it looks is said elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.dataset import Dataset
from analysis.defects import collect_evidence, find_defects, rules_table
from analysis.distance import offset_profile
from analysis.entropy import entropy_by_layer, entropy_by_length, entropy_by_position
from analysis.heads import HEAD, head_means, label
from analysis.inference import clustered_mean
from analysis.kinds import head_kinds
from analysis.residual import residual_through_depth
from analysis.weighting import weighted_heads
from extract.schema import CLASS_MASSES

LAYER = ("stack", "layer")
CLASSES = (*CLASS_MASSES, "mass_self")


@dataclass(frozen=True)
class Content:
    """The analyses of one dataset. `heads` has a row per head with `id`, `label`, `kind` and every mean."""

    manifest: Mapping[str, Any]
    heads: pl.DataFrame
    overall: pl.DataFrame
    layers: pl.DataFrame
    lengths: pl.DataFrame
    positions: pl.DataFrame
    offsets: pl.DataFrame
    residual: pl.DataFrame
    defects: pl.DataFrame
    rules: pl.DataFrame
    sequence_tokens: tuple[int, int]

    @property
    def stacks(self) -> list[str]:
        return self.heads["stack"].unique(maintain_order=True).to_list()

    @property
    def documents(self) -> int:
        """Documents that gave a measured sequence."""
        highest = self.heads["documents"].max()
        return highest if isinstance(highest, int) else 0


def gather(dataset: Dataset) -> Content:
    """Run the analyses of the report."""
    means = head_means(dataset)
    several = means["stack"].n_unique() > 1
    heads = (
        means.join(head_kinds(dataset), on=HEAD, how="left")
        .sort(HEAD)
        .with_row_index("id")
        .with_columns(label(several_stacks=several))
    )
    residual = residual_through_depth(dataset)
    evidence = collect_evidence(dataset, heads=means, residual=residual)
    found = find_defects(evidence)
    lengths = dataset.scan("sequences").select(low=pl.col("tokens").min(), high=pl.col("tokens").max()).collect()
    return Content(
        manifest=dataset.manifest,
        heads=heads,
        overall=clustered_mean(weighted_heads(dataset), CLASSES, ("stack",)).collect(),
        layers=entropy_by_layer(dataset).collect(),
        lengths=entropy_by_length(dataset).collect(),
        positions=entropy_by_position(dataset, by=LAYER).collect(),
        offsets=offset_profile(dataset).collect().join(heads.select(*HEAD, "id", "label", "kind"), on=HEAD),
        residual=residual,
        defects=found,
        rules=rules_table(evidence, found),
        sequence_tokens=(lengths["low"][0] or 0, lengths["high"][0] or 0),
    )
