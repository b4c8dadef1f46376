"""The content of the report, as data frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
import polars.selectors as cs

from attlas.analysis.damage import damage_in_parts, note_on_counts, notes_on_rows
from attlas.analysis.dataset import Dataset
from attlas.analysis.distance import offset_profile
from attlas.analysis.documents import document_grouping, dropped_documents, outliers_of
from attlas.analysis.entropy import (
    entropy_by_position,
    layer_grouping,
    length_grouping,
    means_by_layer,
    means_by_length,
    sequence_tokens,
)
from attlas.analysis.evidence import EXTREMES, Evidence
from attlas.analysis.heads import HEAD, head_estimates, label
from attlas.analysis.inference import estimates, wide
from attlas.analysis.judge import Judgement, judge
from attlas.analysis.kinds import head_kinds
from attlas.analysis.manifest import section
from attlas.analysis.naming import corpus_title, model_title
from attlas.analysis.pruning import proxy_correlations, pruning_candidates, reason_not_ablated
from attlas.analysis.residual import residual_through_depth, site_estimates
from attlas.analysis.similarity import By, StackSimilarity, head_clusters, stack_similarities
from attlas.analysis.similarity import reason_unknown as similarity_unknown
from attlas.analysis.summaries import Grouping, averaged_columns, scan_once
from attlas.extract.tables import CLASS_MASSES, TABLES

LAYER = ("stack", "layer")
NO_KIND = "none"  # the kind of heads that have none, because kinds were refused
CLASSES = (*CLASS_MASSES, "mass_self")


@dataclass(frozen=True)
class Content:
    """The analyses of one dataset.

    `heads` has a row per head with `id`, `label`, its kinds and every mean. `estimates` and `site_estimates` have the same of heads and
    of sites by column. `overall` and `layers` are of heads that are not at rest; the intervals of layers hold together.
    `no_kinds`: why heads have no kinds, if they have none. `chance`: how chance levels are known. `similarities`: by patterns, or by
    offsets where these were not compared. `candidates`: for pruning;
    `correlations`: of their proxies with what removing heads changes, None if that was not measured. `documents_scored`: how far each
    document is from the others. `sequence_tokens`: as of `attlas.analysis.entropy.sequence_tokens`.
    """

    manifest: Mapping[str, Any]
    heads: pl.DataFrame
    estimates: pl.DataFrame
    overall: pl.DataFrame
    layers: pl.DataFrame
    lengths: pl.DataFrame
    positions: pl.DataFrame
    offsets: pl.DataFrame
    residual: pl.DataFrame
    site_estimates: pl.DataFrame
    similarities: Sequence[StackSimilarity]
    similarity_by: By
    clusters: pl.DataFrame
    candidates: pl.DataFrame
    correlations: pl.DataFrame | None
    documents_scored: pl.DataFrame
    dropped: pl.DataFrame
    judgement: Judgement
    no_kinds: str | None
    chance: pl.DataFrame
    sequence_tokens: tuple[int, int]
    min_documents: int = 1
    damage: Sequence[str] = ()

    @property
    def stacks(self) -> list[str]:
        return self.heads["stack"].unique(maintain_order=True).to_list()

    @property
    def awake(self) -> pl.DataFrame:
        """The heads that are not at rest."""
        return self.heads.filter(~pl.col("is_at_rest"))

    @property
    def distance(self) -> str:
        """The column for the distance of a head's attention: in patches for images with a grid, else in tokens."""
        return "distance_patches" if has_values(self.heads, "distance_patches") else "distance_tokens"

    @property
    def documents(self) -> int:
        """The number of documents with a measured sequence."""
        highest = self.heads["documents"].max()
        return highest if isinstance(highest, int) else 0


def has_values(heads: pl.DataFrame, column: str) -> bool:
    return column in heads.columns and heads[column].is_not_null().any()


def _sort_stacks(frame: pl.DataFrame, manifest: Mapping[str, Any]) -> pl.DataFrame:
    """Sort rows by stack in the manifest's order, stably; stacks that the manifest does not list come last."""
    stacks = list(dict.fromkeys(stack["stack"] for stack in section(manifest, "model").get("stacks") or []))
    place = pl.col("stack").replace_strict(stacks, range(len(stacks)), default=len(stacks), return_dtype=pl.Int64)
    return frame.sort(place, maintain_order=True)


def _nulls_for_absent_classes(means: pl.DataFrame) -> list[pl.Expr]:
    """Nulls for the masses of token classes that occur in no sequence, to which no head could attend."""
    absent = [name for name in CLASS_MASSES if name in means.columns and (means[name].fill_null(0) == 0).all()]
    return [pl.lit(None, pl.Float64).alias(name + suffix) for name in absent for suffix in ("", "_low", "_high", "_se")]


@dataclass(frozen=True)
class _OfRows:
    """What takes the rows of `heads`: class masses over heads that are not at rest, entropy by layer and by length, and documents."""

    overall: pl.DataFrame
    layers: pl.DataFrame
    lengths: pl.DataFrame
    documents: pl.DataFrame
    extremes: pl.DataFrame
    damage: Sequence[str]


def _of_rows(dataset: Dataset, awake: pl.DataFrame) -> _OfRows:
    """All of it in one pass."""
    least = dataset.min_documents
    chosen, stack = awake.select(HEAD).lazy(), ("stack",)
    classes = Grouping(CLASSES, stack, lambda rows: rows.join(chosen, on=HEAD, how="semi"))
    groupings = [classes, layer_grouping(awake), length_grouping(dataset), document_grouping(dataset)]
    read = sorted({"score_max", *(name for grouping in groupings for name in grouping.columns)})
    asides = [EXTREMES, damage_in_parts(dataset, "heads", read)]
    (of_classes, of_layers, of_lengths, of_documents), (extremes, counts) = scan_once(
        dataset, "heads", groupings, asides
    )
    return _OfRows(
        overall=wide(estimates(of_classes, stack, min_documents=least).collect(), stack, CLASSES),
        layers=means_by_layer(of_layers, comparisons=awake.select(LAYER).n_unique(), min_documents=least),
        lengths=means_by_length(of_lengths, min_documents=least),
        documents=outliers_of(dataset, of_documents),
        extremes=extremes,
        damage=note_on_counts(dataset, "heads", counts),
    )


def _similarities(dataset: Dataset) -> tuple[list[StackSimilarity], By, pl.DataFrame]:
    """How alike heads are, by what, and their clusters."""
    by: By = "pattern" if similarity_unknown(dataset) is None else "offset"
    found = stack_similarities(dataset, by=by)
    return found, by, head_clusters(dataset, by=by, similarities=found)


def gather(dataset: Dataset) -> Content:
    """Run the analyses of the report. Raises Refusal for a dataset with damaged parts or keys."""
    has_totals = "totals" in dataset.tables  # without them, all columns are read from rows
    # summaries are not read, and some columns of heads in the pass below
    damage = notes_on_rows(dataset, [name for name in TABLES if not has_totals or name not in ("heads", "summaries")])

    def sort_stacks(frame: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
        return _sort_stacks(frame.lazy().collect(), dataset.manifest)

    columns = averaged_columns(dataset, "heads")
    found = head_estimates(dataset, columns)
    means = sort_stacks(wide(found, HEAD, columns))
    if not means.height:
        raise dataset.refusal("heads has no rows to report on")
    nulls = _nulls_for_absent_classes(means)
    several = means["stack"].n_unique() > 1
    sites = site_estimates(dataset, averaged_columns(dataset, "residual"))
    residual = sort_stacks(residual_through_depth(dataset, found=sites))
    evidence = Evidence(dataset, found, residual)
    kinds = head_kinds(dataset, shares=evidence.shares)
    heads = (
        sort_stacks(means.join(kinds, on=HEAD, how="left").sort(HEAD))
        .with_row_index("id")
        .with_columns(label(several_stacks=several), pl.col("kind").fill_null(NO_KIND), *nulls)
    )
    awake = heads.filter(~pl.col("is_at_rest"))
    of_rows = _of_rows(dataset, awake)
    similarities, by, clusters = _similarities(dataset)
    candidates = pruning_candidates(
        dataset, shares=evidence.shares, similarities=similarities if by == "pattern" else None
    )
    is_ablated = reason_not_ablated(dataset) is None
    return Content(
        manifest=dataset.manifest,
        heads=heads,
        estimates=found,
        overall=sort_stacks(of_rows.overall).with_columns(*nulls),
        layers=sort_stacks(of_rows.layers),
        lengths=sort_stacks(of_rows.lengths),
        positions=sort_stacks(entropy_by_position(dataset, by=LAYER)),
        offsets=sort_stacks(offset_profile(dataset)).join(
            heads.select(*HEAD, "id", "label", "kind"), on=HEAD, how="inner", maintain_order="left"
        ),
        residual=residual,
        site_estimates=sites,
        similarities=similarities,
        similarity_by=by,
        clusters=clusters,
        candidates=candidates,
        correlations=proxy_correlations(dataset, candidates=candidates) if is_ablated else None,
        documents_scored=of_rows.documents,
        dropped=dropped_documents(dataset),
        judgement=judge(dataset, replace(evidence, extremes=of_rows.extremes)),
        no_kinds=evidence.shares.refusal,
        chance=evidence.shares.chance.sources,
        sequence_tokens=sequence_tokens(dataset),
        min_documents=dataset.min_documents,
        damage=[*(of_rows.damage if has_totals else ()), *damage],
    )


def dropped_by_reason(content: Content) -> str:
    """How many documents were dropped, and why; empty if none were."""
    reasons = section(content.manifest, "corpus").get("dropped") or {}
    shown = {reason: number for reason, number in reasons.items() if number >= content.min_documents}
    texts = [f"{number:,} {reason}" for reason, number in sorted(shown.items())]
    if len(shown) < len(reasons):
        texts.append("some for reasons of few documents")
    return ", ".join(texts)


def numbers_of(content: Content) -> dict[str, Any]:
    """The frames of a report as lists of rows, and what is said of them, for JSON."""
    frames = {
        "heads": content.heads,
        "class_masses": content.overall,
        "layers": content.layers,
        "lengths": content.lengths,
        "positions": content.positions,
        "offsets": content.offsets,
        "residual": content.residual,
        "clusters": content.clusters,
        "pruning_candidates": content.candidates,
        "outlying_documents": content.documents_scored.filter("is_outlier"),
        "dropped_documents": content.dropped,
        "rules": content.judgement.rules,
        "found": content.judgement.found,
    }
    facts = {
        "model": model_title(content.manifest),
        "corpus": corpus_title(content.manifest),
        "documents": content.documents,
    }
    # JSON has no NaN and no infinity
    finite = pl.when(cs.float().is_finite()).then(cs.float())
    return facts | {name: frame.with_columns(finite).to_dicts() for name, frame in frames.items()}
