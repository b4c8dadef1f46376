"""Defects: signs that something is wrong with a model, or with how it was run, each with its evidence."""

from __future__ import annotations

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.evidence import Evidence
from attlas.analysis.heads import HEAD
from attlas.analysis.kinds import AWAKE_KINDS, MIN_TOKENS, POSITIONAL
from attlas.analysis.rules import Rule, apply, figures

COLLAPSE_NATS = 0.1
DEAD_SHARE = 0.01
LOGIT_SHARE = 0.1
DTYPE_MAX = {"float16": 65504.0, "bfloat16": 3.39e38, "float32": 3.40e38, "float64": 1.79e308}
# heads that are sharp by nature: of fixed positions, and those that rest on separators (Clark 2019)
SHARP_KINDS = (*POSITIONAL, "separator")


def find_defects(dataset: Dataset, *, evidence: Evidence | None = None) -> pl.DataFrame:
    """A row for each defect: `name`, `severity`, where, the value with its interval, a sentence, and the source.

    Columns: `attlas.analysis.rules.SCHEMA`. evidence: if it is at hand.
    """
    return apply(DEFECTS, Evidence(dataset) if evidence is None else evidence)


def _nonfinite_rows(evidence: Evidence) -> pl.DataFrame:
    rows = pl.col("nonfinite_rows") + pl.col("query_rows")
    share = figures(100 * pl.col("nonfinite_rows") / rows)
    return evidence.heads.filter(pl.col("nonfinite_rows") > 0).select(
        *HEAD,
        value=pl.col("nonfinite_rows").cast(pl.Float64),
        evidence=pl.format("{} rows ({} %) have a non-finite score; no mean includes them", "nonfinite_rows", share),
    )


def _entropy_collapse(evidence: Evidence) -> pl.DataFrame:
    thresholds = {k.name: k.threshold for k in AWAKE_KINDS}
    is_sharp = [pl.col(f"awake_{name}") >= thresholds[name] for name in SHARP_KINDS]
    exempt = pl.any_horizontal("is_at_rest", *is_sharp).fill_null(False)
    return evidence.heads.filter((pl.col("entropy_largest") < COLLAPSE_NATS) & ~exempt).select(
        *HEAD,
        value="entropy_largest",
        evidence=pl.format(
            "no sequence has a mean entropy above {} nats, and the keys are neither at a fixed offset nor at rest",
            figures(pl.col("entropy_largest")),
        ),
    )


def _no_long_sequence(evidence: Evidence) -> str | None:
    has_long = evidence.heads["entropy_largest"].is_not_null().any()
    return None if has_long else f"no sequence has {MIN_TOKENS} measured rows"


def _dead_heads(evidence: Evidence) -> pl.DataFrame:
    median = pl.col("output_norm").median().over("stack", "layer")
    return (
        evidence.heads.with_columns(layer_median=median)
        .filter(pl.col("output_norm") <= DEAD_SHARE * pl.col("layer_median"))
        .select(
            *HEAD,
            value="output_norm",
            low="output_norm_low",
            high="output_norm_high",
            evidence=pl.format(
                "writes {} where the median head of its layer writes {}",
                figures(pl.col("output_norm")),
                figures(pl.col("layer_median")),
            ),
        )
    )


def _large_logits(evidence: Evidence) -> pl.DataFrame:
    dtype = str(evidence.manifest.get("dtype") or "float32").removeprefix("torch.")
    limit = DTYPE_MAX.get(dtype, DTYPE_MAX["float32"])
    return evidence.heads.filter(pl.col("score_max") >= LOGIT_SHARE * limit).select(
        *HEAD,
        value="score_max",
        evidence=pl.format(
            "the largest logit is {}; the largest number of {} is {}",
            figures(pl.col("score_max")),
            pl.lit(dtype),
            figures(pl.lit(limit)),
        ),
    )


DEFECTS = (
    Rule(
        "non-finite rows",
        "error",
        "nonfinite_rows > 0",
        "scores overflowed or are NaN; those rows could not be measured",
        "IEEE 754",
        ("heads.nonfinite_rows",),
        _nonfinite_rows,
    ),
    Rule(
        "logits near the limit",
        "error",
        f"score_max ≥ {LOGIT_SHARE:.0%} of the dtype's largest number",
        "attention logits are about to overflow",
        "Dehghani 2023",
        ("heads.score_max",),
        _large_logits,
    ),
    Rule(
        "entropy collapse",
        "warning",
        f"entropy_nats < {COLLAPSE_NATS:g} on every sequence of at least {MIN_TOKENS} rows, of a head that is not at rest, and "
        "neither previous, next, self nor separator",
        "every row attends to a single key for no reason of position, as in training that became unstable",
        "Zhai 2023",
        (),
        _entropy_collapse,
        refuse=_no_long_sequence,
    ),
    Rule(
        "dead head",
        "warning",
        f"output_norm ≤ {DEAD_SHARE:.0%} of the layer's median",
        "the head adds almost nothing to the stream",
        "Michel 2019",
        ("heads.output_norm",),
        _dead_heads,
    ),
)
