"""Defects of heads and of the residual stream, each found by an explicit rule and shown with its evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD, head_means
from attlas.analysis.manifest import section
from attlas.analysis.residual import residual_through_depth

COLLAPSE_NATS = 0.1
COLLAPSE_ROWS = 8  # in a sequence of few tokens every head is sharp
DEAD_SHARE = 0.01
LOGIT_SHARE = 0.1
MASSIVE_SIZE, MASSIVE_TIMES = 100.0, 20.0
SINK_MASS, SINK_WRITES = 0.3, 0.5
MIN_INFORMATION_NATS = 0.02
POSITIONAL_MASS = 0.4
GROWTH_TIMES = 10.0
DTYPE_MAX = {"float16": 65504.0, "bfloat16": 3.39e38, "float32": 3.40e38, "float64": 1.79e308}

HEAD_COLUMNS = (
    "output_norm",
    "mass_first",
    "value_weighted_first",
    "mutual_information_nats",
    "mass_previous",
    "mass_next",
    "mass_self",
)
RESIDUAL_COLUMNS = ("stream_norm", "max_abs")
_SCHEMA = {
    "defect": pl.String,
    "stack": pl.String,
    "layer": pl.Int16,
    "head": pl.Int16,
    "site": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "evidence": pl.String,
}


@dataclass(frozen=True)
class Evidence:
    """Input of the rules: means and extremes over the corpus, a row per head or per site."""

    heads: pl.DataFrame
    extremes: pl.DataFrame
    residual: pl.DataFrame
    residual_extremes: pl.DataFrame
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Defect:
    """A rule: the columns it needs, the frame of the evidence it reads, and a function that finds the rows that break it."""

    name: str
    rule: str
    meaning: str
    needs: tuple[str, ...]
    frame: str
    find: Callable[[pl.DataFrame, Evidence], pl.DataFrame]


def _find_nonfinite_rows(rows: pl.DataFrame, _: Evidence) -> pl.DataFrame:
    return rows.filter(pl.col("nonfinite_rows") > 0).select(
        *HEAD,
        value=pl.col("nonfinite_rows").cast(pl.Float64),
        evidence=pl.format("rows with a non-finite score, left out of every mean: {}", "nonfinite_rows"),
    )


def _find_entropy_collapse(rows: pl.DataFrame, _: Evidence) -> pl.DataFrame:
    return rows.filter(pl.col("entropy_max") < COLLAPSE_NATS).select(
        *HEAD,
        value="entropy_max",
        evidence=pl.format("no sequence has a mean entropy above {} nats", pl.col("entropy_max").round(4)),
    )


def _find_dead_heads(rows: pl.DataFrame, _: Evidence) -> pl.DataFrame:
    median = pl.col("output_norm").median().over("stack", "layer")
    return (
        rows.with_columns(layer_median=median)
        .filter(pl.col("output_norm") < DEAD_SHARE * pl.col("layer_median"))
        .select(
            *HEAD,
            value="output_norm",
            low="output_norm_low",
            high="output_norm_high",
            evidence=pl.format(
                "writes {} where the median head of its layer writes {}",
                pl.col("output_norm").round_sig_figs(3),
                pl.col("layer_median").round_sig_figs(3),
            ),
        )
    )


def _find_large_logits(rows: pl.DataFrame, evidence: Evidence) -> pl.DataFrame:
    dtype = str(evidence.manifest.get("dtype") or "float32").removeprefix("torch.")
    limit = DTYPE_MAX.get(dtype, DTYPE_MAX["float32"])
    return rows.filter(pl.col("score_max") >= LOGIT_SHARE * limit).select(
        *HEAD,
        value="score_max",
        evidence=pl.format(
            "largest logit {}; the largest number of {} is {}",
            pl.col("score_max").round(1),
            pl.lit(dtype),
            pl.lit(limit),
        ),
    )


def _find_massive_activations(rows: pl.DataFrame, evidence: Evidence) -> pl.DataFrame:
    width = section(evidence.manifest, "model").get("width")
    if not isinstance(width, int):
        return rows.clear()
    means = evidence.residual.select("stack", "layer", "site", "stream_norm")
    typical = pl.col("stream_norm") / width**0.5 if width else pl.lit(None, dtype=pl.Float64)
    return (
        rows.join(means, on=["stack", "layer", "site"])
        .with_columns(typical=typical, times=pl.col("max_abs") / typical)
        .filter((pl.col("max_abs") >= MASSIVE_SIZE) & (pl.col("times") >= MASSIVE_TIMES))
        .select(
            "stack",
            "layer",
            "site",
            value="max_abs",
            evidence=pl.format(
                "largest entry {}, {} times the typical entry of the stream there",
                pl.col("max_abs").round(1),
                pl.col("times").clip(upper_bound=1e18).round(0).cast(pl.Int64),
            ),
        )
    )


def _find_writing_sinks(rows: pl.DataFrame, _: Evidence) -> pl.DataFrame:
    is_sink = pl.col("mass_first") >= SINK_MASS
    writes = pl.col("value_weighted_first") >= SINK_WRITES * pl.col("mass_first")
    return rows.filter(is_sink & writes).select(
        *HEAD,
        value="value_weighted_first",
        low="value_weighted_first_low",
        high="value_weighted_first_high",
        evidence=pl.format(
            "the first token holds {} of the weight and {} of what is written",
            pl.col("mass_first").round(3),
            pl.col("value_weighted_first").round(3),
        ),
    )


def _find_content_blind_heads(rows: pl.DataFrame, _: Evidence) -> pl.DataFrame:
    positional = pl.max_horizontal("mass_previous", "mass_next", "mass_self") >= POSITIONAL_MASS
    return rows.filter(
        (pl.col("mutual_information_nats") < MIN_INFORMATION_NATS) & ~positional.fill_null(False)
    ).select(
        *HEAD,
        value="mutual_information_nats",
        low="mutual_information_nats_low",
        high="mutual_information_nats_high",
        evidence=pl.format(
            "query and key share {} nats of mutual information", pl.col("mutual_information_nats").round_sig_figs(3)
        ),
    )


def _find_norm_growth(rows: pl.DataFrame, _: Evidence) -> pl.DataFrame:
    stream = rows.filter((pl.col("site") == "attention") & pl.col("stream_norm").is_not_null())
    ends = stream.group_by("stack").agg(
        pl.col("layer").max(),
        first=pl.col("stream_norm").sort_by("layer").first(),
        last=pl.col("stream_norm").sort_by("layer").last(),
    )
    return (
        ends.with_columns(value=pl.col("last") / pl.col("first"))
        .filter(pl.col("value") >= GROWTH_TIMES)
        .select(
            "stack",
            "layer",
            "value",
            site=pl.lit("attention"),
            evidence=pl.format(
                "the stream's norm grows from {} in the first layer to {} in the last, {} times",
                pl.col("first").round_sig_figs(3),
                pl.col("last").round_sig_figs(3),
                pl.col("value").round(1),
            ),
        )
    )


DEFECTS = (
    Defect(
        "non-finite rows",
        "nonfinite_rows > 0",
        "scores overflowed or are NaN; those rows could not be measured",
        ("nonfinite_rows",),
        "extremes",
        _find_nonfinite_rows,
    ),
    Defect(
        "entropy collapse",
        f"entropy_nats < {COLLAPSE_NATS:g} on every sequence of at least {COLLAPSE_ROWS} rows",
        "every row attends to a single key, whatever the text; expected of previous- and next-token heads",
        ("entropy_max",),
        "extremes",
        _find_entropy_collapse,
    ),
    Defect(
        "dead head",
        f"output_norm < {DEAD_SHARE:.0%} of the layer's median",
        "the head adds almost nothing to the stream",
        ("output_norm",),
        "heads",
        _find_dead_heads,
    ),
    Defect(
        "logits near the limit",
        f"score_max ≥ {LOGIT_SHARE:.0%} of the dtype's largest number",
        "attention logits are about to overflow",
        ("score_max",),
        "extremes",
        _find_large_logits,
    ),
    Defect(
        "massive activations",
        f"max_abs ≥ {MASSIVE_SIZE:g} and ≥ {MASSIVE_TIMES:g} times the typical entry",
        "a few dimensions dwarf the rest of the stream (Sun 2024), which harms low precision and quantisation",
        ("max_abs",),
        "residual_extremes",
        _find_massive_activations,
    ),
    Defect(
        "sink that writes",
        f"mass_first ≥ {SINK_MASS:g} and value_weighted_first ≥ {SINK_WRITES:g} · mass_first",
        "attention rests on the first token and, unlike in a harmless sink, its value is written to every position",
        ("mass_first", "value_weighted_first"),
        "heads",
        _find_writing_sinks,
    ),
    Defect(
        "ignores content",
        f"mutual_information_nats < {MIN_INFORMATION_NATS:g} and no previous, next or self mass ≥ {POSITIONAL_MASS:g}",
        "every query attends to the same positions",
        ("mutual_information_nats",),
        "heads",
        _find_content_blind_heads,
    ),
    Defect(
        "norm growth",
        f"stream_norm grows {GROWTH_TIMES:g}-fold or more from the first layer to the last",
        "later updates are ever smaller relative to the stream",
        ("stream_norm",),
        "residual",
        _find_norm_growth,
    ),
)


def collect_evidence(
    dataset: Dataset, *, heads: pl.DataFrame | None = None, residual: pl.DataFrame | None = None
) -> Evidence:
    """Means and extremes of the columns that the rules need; means passed as `heads` and `residual` are used as they are."""
    long_enough = pl.col("query_rows") >= COLLAPSE_ROWS
    extremes = (
        dataset.scan("heads")
        .group_by(HEAD)
        .agg(
            pl.col("nonfinite_rows").cast(pl.Int64).sum(),
            pl.col("score_max").cast(pl.Float64).max(),
            entropy_max=pl.col("entropy_nats").filter(long_enough).cast(pl.Float64).max(),
        )
        .sort(HEAD)
        .collect(engine="streaming")
    )
    residual_extremes = (
        dataset.scan("residual")
        .group_by("stack", "layer", "site")
        .agg(pl.col("max_abs").cast(pl.Float64).max())
        .sort("stack", "layer", "site")
        .collect(engine="streaming")
    )
    return Evidence(
        heads=head_means(dataset, HEAD_COLUMNS) if heads is None else heads,
        extremes=extremes,
        residual=residual_through_depth(dataset, RESIDUAL_COLUMNS) if residual is None else residual,
        residual_extremes=residual_extremes,
        manifest=dataset.manifest,
    )


def find_defects(evidence: Evidence) -> pl.DataFrame:
    """A row per head or site that breaks a rule: the value, its interval if it is a mean, and a sentence."""
    frames = [pl.DataFrame(schema=_SCHEMA)]
    for defect in DEFECTS:
        rows = defect.find(getattr(evidence, defect.frame), evidence)
        if rows.height:
            frames.append(rows.with_columns(defect=pl.lit(defect.name)))
    return pl.concat([f.cast({n: t for n, t in _SCHEMA.items() if n in f.columns}) for f in frames], how="diagonal")


def rules_table(evidence: Evidence, defects: pl.DataFrame) -> pl.DataFrame:
    """Every rule with the number of places that break it; `found` is null if columns that the rule needs were not measured."""
    rows = [
        (d.name, d.rule, d.meaning, _count_places(d, defects) if _has_values(d, getattr(evidence, d.frame)) else None)
        for d in DEFECTS
    ]
    return pl.DataFrame(
        rows, schema={"defect": pl.String, "rule": pl.String, "meaning": pl.String, "found": pl.Int64}, orient="row"
    )


def _has_values(defect: Defect, frame: pl.DataFrame) -> bool:
    return all(frame[name].is_not_null().any() for name in defect.needs)


def _count_places(defect: Defect, defects: pl.DataFrame) -> int:
    return defects.filter(pl.col("defect") == defect.name).height
