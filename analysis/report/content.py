"""Everything that the report says, as frames; how it looks is said elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from attlas.analysis.damage import notes_on_rows
from attlas.analysis.dataset import Dataset
from attlas.analysis.defects import collect_evidence, find_defects, rules_table
from attlas.analysis.distance import offset_profile
from attlas.analysis.entropy import entropy_by_layer, entropy_by_length, entropy_by_position
from attlas.analysis.heads import HEAD, head_means, label
from attlas.analysis.inference import clustered_mean
from attlas.analysis.kinds import head_kinds
from attlas.analysis.manifest import section
from attlas.analysis.residual import residual_through_depth
from attlas.analysis.weighting import weighted_heads
from attlas.extract.tables import CLASS_MASSES, TABLES

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
    damage: Sequence[str] = ()

    @property
    def stacks(self) -> list[str]:
        return self.heads["stack"].unique(maintain_order=True).to_list()

    @property
    def distance(self) -> str:
        """The column that says how far a head looks: over the image where patches have rows and columns."""
        return "distance_patches" if is_known(self.heads, "distance_patches") else "distance_tokens"

    @property
    def documents(self) -> int:
        """Documents that gave a measured sequence."""
        highest = self.heads["documents"].max()
        return highest if isinstance(highest, int) else 0


def is_known(heads: pl.DataFrame, column: str) -> bool:
    return column in heads.columns and heads[column].is_not_null().any()


def _in_order(frame: pl.DataFrame, manifest: Mapping[str, Any]) -> pl.DataFrame:
    """Rows by stack as the model runs them, else as they are; stacks that the manifest leaves out come last."""
    stacks = list(dict.fromkeys(stack["stack"] for stack in section(manifest, "model").get("stacks") or []))
    place = pl.col("stack").replace_strict(stacks, range(len(stacks)), default=len(stacks), return_dtype=pl.Int64)
    return frame.sort(place, maintain_order=True)


def _classes_of_no_token(means: pl.DataFrame) -> list[pl.Expr]:
    """Null for the mass of every class that no sequence has a token of: no head could look at one."""
    known = [name for name in CLASS_MASSES if name in means.columns]
    nowhere = [name for name in known if (means[name].fill_null(0) == 0).all()]
    return [pl.lit(None, pl.Float64).alias(name + end) for name in nowhere for end in ("", "_low", "_high", "_se")]


def gather(dataset: Dataset) -> Content:
    """Run the analyses of the report; raises Refusal for a dataset whose parts or keys are damaged."""
    damage = notes_on_rows(dataset, tuple(TABLES))

    def in_order(frame: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
        return _in_order(frame.lazy().collect(), dataset.manifest)

    means = in_order(head_means(dataset))
    if not means.height:
        raise dataset.refusal("heads has no rows, which a report is about")
    nowhere = _classes_of_no_token(means)
    several = means["stack"].n_unique() > 1
    heads = (
        in_order(means.join(head_kinds(dataset), on=HEAD, how="left").sort(HEAD))
        .with_row_index("id")
        .with_columns(label(several_stacks=several), *nowhere)
    )
    residual = in_order(residual_through_depth(dataset))
    evidence = collect_evidence(dataset, heads=means, residual=residual)
    found = find_defects(evidence)
    lengths = dataset.scan("sequences").select(low=pl.col("tokens").min(), high=pl.col("tokens").max()).collect()
    return Content(
        manifest=dataset.manifest,
        heads=heads,
        overall=in_order(clustered_mean(weighted_heads(dataset), CLASSES, ("stack",))).with_columns(*nowhere),
        layers=in_order(entropy_by_layer(dataset)),
        lengths=in_order(entropy_by_length(dataset)),
        positions=in_order(entropy_by_position(dataset, by=LAYER)),
        offsets=in_order(offset_profile(dataset)).join(
            heads.select(*HEAD, "id", "label", "kind"), on=HEAD, how="inner", maintain_order="left"
        ),
        residual=residual,
        defects=found,
        rules=rules_table(evidence, found),
        sequence_tokens=(lengths["low"][0] or 0, lengths["high"][0] or 0),
        damage=damage,
    )
