"""Findings: what is normal in trained models and worth knowing, each with its evidence. See `defects` for what is wrong."""

from __future__ import annotations

import polars as pl

from attlas.analysis.dataset import Dataset
from attlas.analysis.evidence import Evidence
from attlas.analysis.heads import HEAD
from attlas.analysis.kinds import AWAKE_KINDS, POSITIONAL, REST_KINDS
from attlas.analysis.massive import HALF_NORMAL_MEDIAN, MASSIVE_SIZE, MASSIVE_TIMES, reason_unknown
from attlas.analysis.rules import Rule, apply, figures, is_measured, not_measured
from attlas.analysis.sinks import WRITES, with_rest

MIN_INFORMATION_NATS = 0.02
GROWTH_TIMES = 10.0
_AT_REST = REST_KINDS[0].threshold
_POSITIONAL = next(k.threshold for k in AWAKE_KINDS if k.name == POSITIONAL[0])


def find_findings(dataset: Dataset, *, evidence: Evidence | None = None) -> pl.DataFrame:
    """A row for each finding: `name`, `severity`, where, the value with its interval, a sentence, and the source.

    Columns: `attlas.analysis.rules.SCHEMA`. evidence: if it is at hand.
    """
    return apply(FINDINGS, Evidence(dataset) if evidence is None else evidence)


def _no_kinds(evidence: Evidence) -> str | None:
    return evidence.shares.refusal


def _attention_sinks(evidence: Evidence) -> pl.DataFrame:
    """A row for each stack with heads at rest: how many of them, and whether the first token writes."""
    heads = with_rest(evidence)
    is_at_rest = pl.col("is_at_rest")
    stacks = heads.group_by("stack", maintain_order=True).agg(
        value=pl.col("at_rest").mean(),
        heads=pl.len(),
        resting=is_at_rest.sum(),
        on_first=(is_at_rest & pl.col("is_first")).sum(),
        ratio=pl.col("value_ratio_first").filter(is_at_rest & pl.col("is_first")).median(),
        writing=(pl.col("value_ratio_first").filter(is_at_rest & pl.col("is_first")) >= WRITES).sum(),
    )
    counts = pl.format(
        "{} of {} heads are at rest, {} of them on the first token; over all heads {} % of the attention is at rest",
        "resting",
        "heads",
        "on_first",
        figures(100 * pl.col("value"), 2),
    )
    need = "heads.value_ratio_first"
    unknown = "" if is_measured(need, evidence) else f"; whether it writes: {not_measured([need])}"
    ratios = pl.format(
        "; what the first token would write there is {} times what others would (median), and at least as much in {} of them",
        figures(pl.col("ratio"), 2),
        pl.when(pl.col("writing") == 0).then(pl.lit("none")).otherwise(pl.col("writing").cast(pl.String)),
    )
    writes = pl.when(pl.col("ratio").is_null()).then(pl.lit(unknown)).otherwise(ratios)
    return stacks.filter(pl.col("resting") > 0).select("stack", "value", evidence=pl.concat_str(counts, writes))


def _heads_at_rest(evidence: Evidence) -> pl.DataFrame:
    where = pl.when("is_first").then(pl.lit("the first token")).otherwise(pl.lit("massive tokens"))
    return (
        with_rest(evidence)
        .filter("is_at_rest")
        .select(
            *HEAD,
            value="at_rest",
            low="at_rest_low",
            high="at_rest_high",
            evidence=pl.format("{} % of its attention rests on {}", figures(100 * pl.col("at_rest")), where),
        )
    )


def _writing_sinks(evidence: Evidence) -> pl.DataFrame:
    writes = pl.col("value_ratio_first") >= WRITES
    return evidence.heads.filter(pl.col("is_at_rest") & pl.col("is_first") & writes).select(
        *HEAD,
        value="value_ratio_first",
        low="value_ratio_first_low",
        high="value_ratio_first_high",
        evidence=pl.format(
            "rests on the first token ({} % of its attention), which would write {} times what others would",
            figures(100 * pl.col("mass_first")),
            figures(pl.col("value_ratio_first")),
        ),
    )


def _massive_activations(evidence: Evidence) -> pl.DataFrame:
    first, last = pl.col("first_position"), pl.col("last_position")
    where = (
        pl.when(first.is_null())
        .then(pl.lit("a token (which one: --statistics max_abs_token)"))
        .when(first == last)
        .then(pl.format("token {} alone", first))
        .otherwise(pl.format("tokens at {} positions from {} to {}", "positions", first, last))
    )
    ends = pl.format("from the {} of layer {} to the {} of layer {}", "site", "layer", "last_site", "last_layer")
    return evidence.massive.select(
        "stack",
        "layer",
        "last_layer",
        "site",
        "dimension",
        value="size",
        evidence=pl.format(
            "dimension {} reaches {} on {}, {} times the stream's typical entry, {}",
            "dimension",
            figures(pl.col("size")),
            where,
            figures(pl.col("times"), 2),
            ends,
        ),
    )


def _heads_that_ignore_content(evidence: Evidence) -> pl.DataFrame:
    is_positional = pl.max_horizontal(*(f"awake_{name}" for name in POSITIONAL)) >= _POSITIONAL
    exempt = (is_positional | pl.col("is_at_rest")).fill_null(False)
    return evidence.heads.filter((pl.col("mutual_information_nats") < MIN_INFORMATION_NATS) & ~exempt).select(
        *HEAD,
        value="mutual_information_nats",
        low="mutual_information_nats_low",
        high="mutual_information_nats_high",
        evidence=pl.format(
            "query and key share {} nats of mutual information", figures(pl.col("mutual_information_nats"))
        ),
    )


def _norm_growth(evidence: Evidence) -> pl.DataFrame:
    median = pl.col("stream_norm_median")
    stream = evidence.residual.filter((pl.col("site") == "attention") & median.is_not_null())
    ends = stream.group_by("stack", maintain_order=True).agg(
        layer=pl.col("layer").min(),
        last_layer=pl.col("layer").max(),
        first=median.sort_by("layer").first(),
        last=median.sort_by("layer").last(),
    )
    return (
        ends.with_columns(value=pl.col("last") / pl.col("first"))
        .filter(pl.col("value") >= GROWTH_TIMES)
        .select(
            "stack",
            "layer",
            "last_layer",
            "value",
            site=pl.lit("attention"),
            evidence=pl.format(
                "the median token's norm is {} where the attention of layer {} reads the stream, and {} in layer {}: {} times",
                figures(pl.col("first")),
                "layer",
                figures(pl.col("last")),
                "last_layer",
                figures(pl.col("value")),
            ),
        )
    )


FINDINGS = (
    Rule(
        "attention sink",
        "normal",
        f"heads with a share at rest ≥ {_AT_REST:g}, corrected for chance",
        "heads with nothing to do attend to the first token, or to massive ones; normal in trained models, above all causal ones",
        "Xiao 2024, Gu 2025",
        ("heads.mass_first",),
        _attention_sinks,
        refuse=_no_kinds,
    ),
    Rule(
        "head at rest",
        "normal",
        f"share at rest ≥ {_AT_REST:g}, corrected for chance",
        "much of its attention has nothing to do on these documents; what the head does awake is its second label",
        "Gu 2025",
        ("heads.mass_first",),
        _heads_at_rest,
        refuse=_no_kinds,
    ),
    Rule(
        "sink that writes",
        "normal",
        f"head at rest on the first token, and value_ratio_first ≥ {WRITES:g}",
        "resting adds the value of the first token to every position; most sinks write little (value drain)",
        "Kobayashi 2020, Gu 2025",
        ("heads.value_ratio_first",),
        _writing_sinks,
        refuse=_no_kinds,
    ),
    Rule(
        "massive activation",
        "normal",
        f"max_abs ≥ {MASSIVE_SIZE:g} and ≥ {MASSIVE_TIMES:,.0f} times the typical entry of the stream after the update, "
        f"{HALF_NORMAL_MEDIAN:g} · (median norm of its tokens) / √d",
        "a few entries dwarf the rest of the stream and work as constant biases; normal, but they harm low precision and quantisation",
        "Sun 2024",
        ("residual.max_abs",),
        _massive_activations,
        refuse=lambda evidence: reason_unknown(evidence.dataset),
    ),
    Rule(
        "ignores content",
        "normal",
        f"mutual_information_nats < {MIN_INFORMATION_NATS:g}, of a head that is neither at rest nor previous, next or self",
        "every query attends to the same keys: the head averages over the sequence",
        "Cover & Thomas 2006, §2.3",
        ("heads.mutual_information_nats",),
        _heads_that_ignore_content,
        refuse=_no_kinds,
    ),
    Rule(
        "norm growth",
        "normal",
        f"stream_norm_median at the attention sites grows {GROWTH_TIMES:g}-fold or more from the first layer to the last",
        "in pre-norm models the stream grows through depth, so that later updates change less of it",
        "Xiong 2020",
        ("residual.stream_norm_median",),
        _norm_growth,
    ),
)
