"""Pruning candidates: heads without which little seems to be lost, and how far that agrees with what is lost.

Proxies, of which each says that less is lost:
* `output_share`, the head's `output_norm` over the sum of its layer's heads, if it is small: the head writes little;
* `rest`, the share of attention at rest, corrected for chance (`attlas.analysis.kinds`), if it is large: the head is mostly idle;
* `redundancy`, the similarity to the nearest other head (`attlas.analysis.redundancy`), if it is large: another head looks where it looks.

`mean_rank` is the mean of the head's ranks by the proxies that are known of it, 1 for the head of the stack without which
least seems to be lost; ties share a rank. A proxy is not an effect: what heads do together, and what later layers make of them, is in none of them
(Michel 2019 and Voita 2019 measure by removing heads). Where the table `ablations` was measured (`--statistics ablations --ablate heads`), `final_change` is
what removing this head alone changes, and `proxy_correlations` says how well each proxy ranks the heads by it. In MiniLM on 12 documents of
Python's reference manual Spearman's ρ is 0.63 for `output_share`, −0.21 for `rest` and 0.26 for `redundancy`, which there points the
wrong way, so that `mean_rank`, 0.36, is worse than `output_share` alone.

    import attlas
    from attlas.analysis import proxy_correlations, pruning_candidates

    dataset = attlas.open_dataset("data/demo")
    pruning_candidates(dataset).head(10)
    proxy_correlations(dataset)  # if it has ablations
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from attlas.analysis.chance import MASSIVE
from attlas.analysis.dataset import Dataset
from attlas.analysis.heads import HEAD, head_means
from attlas.analysis.inference import CONFIDENCE, estimates, student_quantile, wide
from attlas.analysis.kinds import HeadShares
from attlas.analysis.redundancy import head_redundancy
from attlas.analysis.similarity import StackSimilarity, reason_unknown
from attlas.analysis.summaries import averaged_columns
from attlas.extract.store import Refusal

# of each proxy whether less is lost where it is small (1) or large (−1)
PROXIES = {"output_share": 1, "rest": -1, "redundancy": -1}
EFFECTS = ("final_change", "loss_change_nats")
SCHEMA = {
    "stack": pl.String,
    "layer": pl.Int16,
    "head": pl.Int16,
    "mean_rank": pl.Float64,
    "output_share": pl.Float64,
    "output_norm": pl.Float64,
    "output_norm_low": pl.Float64,
    "output_norm_high": pl.Float64,
    "rest": pl.Float64,
    "rest_low": pl.Float64,
    "rest_high": pl.Float64,
    "redundancy": pl.Float64,
    "nearest_layer": pl.Int16,
    "nearest_head": pl.Int16,
    "final_change": pl.Float64,
    "final_change_low": pl.Float64,
    "final_change_high": pl.Float64,
    "loss_change_nats": pl.Float64,
    "loss_change_nats_low": pl.Float64,
    "loss_change_nats_high": pl.Float64,
}


def pruning_candidates(
    dataset: Dataset,
    *,
    shares: HeadShares | None = None,
    similarities: Sequence[StackSimilarity] | None = None,
) -> pl.DataFrame:
    """Heads by how little seems to be lost without them: a row per head, SCHEMA, sorted by stack and `mean_rank`.

    `mean_rank`: the mean rank over the known ones of PROXIES, from 1. `output_norm`, `rest` and, if measured, EFFECTS have intervals
    clustered by document; chance is taken as known. Values that were not measured are null: `redundancy` without `pairs`, `final_change`
    without `ablations`, `loss_change_nats` also of models that are no causal language models. shares, similarities: if they are at hand.
    """
    measured = HeadShares.of(dataset) if shares is None else shares
    frames = [_written(dataset), _redundancy(dataset, similarities), _effects(dataset)]
    rows = _rest(measured)
    for frame in frames:
        rows = rows.join(frame, on=HEAD, how="left", maintain_order="left")
    missing = [pl.lit(None, dtype).alias(name) for name, dtype in SCHEMA.items() if name not in rows.columns]
    ranks = [(sign * pl.col(name)).rank("average").over("stack") for name, sign in PROXIES.items()]
    rows = rows.with_columns(missing).with_columns(mean_rank=pl.mean_horizontal(ranks))
    return rows.select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items()).sort(
        "stack", "mean_rank", "layer", "head", nulls_last=True
    )


def proxy_correlations(dataset: Dataset, *, candidates: pl.DataFrame | None = None) -> pl.DataFrame:
    """How well proxies rank heads by what is lost without them: a row per stack, effect and proxy.

    Columns: `stack`, `effect` (of EFFECTS), `proxy` (of PROXIES, and `mean_rank`), `spearman`, the rank correlation over heads, `expected`, the
    sign it has if the proxy is right, and `heads`, those that have both; no row if there are none. `spearman` is null where a value is the
    same for all heads, and of fewer than 3 heads.
    candidates: the frame of `pruning_candidates`, if it is at hand. Raises Refusal if no head was ablated.
    """
    _check_ablations(dataset)
    rows = pruning_candidates(dataset) if candidates is None else candidates
    frames = [
        _correlation(rows, effect, proxy, sign)
        for effect in EFFECTS
        for proxy, sign in {**PROXIES, "mean_rank": 1}.items()
    ]
    return pl.concat(frames).sort("stack", maintain_order=True)


def removal_effects(dataset: Dataset) -> pl.DataFrame:
    """What removing a head changes, with intervals clustered by document: a row per head.

    Token-weighted means over the sequences of the sample: of each of EFFECTS `<effect>`, `_low`, `_high` and `_se`; `documents` and `note`.
    Whether heads were set to zero or to their mean is in the manifest. Raises Refusal if no head was ablated.
    """
    _check_ablations(dataset)
    tokens = dataset.scan("sequences").select("sequence_id", weight=pl.col("tokens").cast(pl.Float64))
    rows = dataset.scan("ablations").filter(pl.col("part") == "head").join(tokens, on="sequence_id")
    sums = pl.concat(_document_sums(rows, effect) for effect in EFFECTS)
    return wide(estimates(sums, HEAD, min_documents=dataset.min_documents).collect(), HEAD, EFFECTS)


def reason_not_ablated(dataset: Dataset) -> str | None:
    """Why it is not known what removing a head changes; None if it is."""
    is_head = pl.col("part") == "head"
    if "ablations" in dataset.tables and dataset.scan("ablations").select(is_head.any()).collect().item():
        return None
    return "not measured: ablations of heads; measure with --statistics ablations --ablate heads, which runs the sample again without each"


def _check_ablations(dataset: Dataset) -> None:
    reason = reason_not_ablated(dataset)
    if reason is not None:
        raise Refusal(reason)


def _document_sums(rows: pl.LazyFrame, column: str) -> pl.LazyFrame:
    """The sums over documents that `estimates` takes, with all documents listed."""
    weight, value = pl.col("weight"), pl.col(column).cast(pl.Float64)
    nothing = dict.fromkeys(("deviation_squares", "deviation_products", "weight_squares"), pl.lit(0.0))
    return (
        rows.filter(value.is_not_null())
        .group_by(*HEAD, "document_id")
        .agg(mean=(weight * value).sum() / weight.sum(), weight=weight.sum())
        .with_columns(column=pl.lit(column), documents=pl.lit(1, pl.Int64), **nothing)
    )


def _written(dataset: Dataset) -> pl.DataFrame:
    if "output_norm" not in averaged_columns(dataset, "heads"):
        return pl.DataFrame(schema={name: SCHEMA[name] for name in HEAD})
    share = pl.col("output_norm") / pl.col("output_norm").sum().over("stack", "layer")
    names = ("output_norm", "output_norm_low", "output_norm_high")
    return head_means(dataset, ["output_norm"]).select(*HEAD, *names, output_share=share.fill_nan(None))


def _rest(shares: HeadShares) -> pl.DataFrame:
    """`rest` with the interval of the mass that it is of."""
    first, massive = (shares.means[name] for name in ("mass_first", MASSIVE))
    is_massive = np.nan_to_num(massive) > np.nan_to_num(first)
    errors = np.where(is_massive, shares.errors[MASSIVE], shares.errors["mass_first"])
    corrected = (1 - shares.chance.lone) * (1 - np.nan_to_num(shares.chance.levels["mass_first"]))
    margin = student_quantile(shares.freedom, CONFIDENCE) * errors / corrected
    margins = pl.Series("margin", margin, pl.Float64, nan_to_null=True)
    return (
        shares.frame()
        .select(*HEAD, "rest")
        .with_columns(rest_low=pl.col("rest") - margins, rest_high=pl.col("rest") + margins)
    )


def _redundancy(dataset: Dataset, similarities: Sequence[StackSimilarity] | None) -> pl.DataFrame:
    if similarities is None and reason_unknown(dataset) is not None:
        return pl.DataFrame(schema={name: SCHEMA[name] for name in HEAD})
    found = head_redundancy(dataset, similarities=similarities)
    return found.select(*HEAD, "nearest_layer", "nearest_head", redundancy="bhattacharyya")


def _effects(dataset: Dataset) -> pl.DataFrame:
    if reason_not_ablated(dataset) is not None:
        return pl.DataFrame(schema={name: SCHEMA[name] for name in HEAD})
    return removal_effects(dataset).select(
        *HEAD, *(f"{name}{end}" for name in EFFECTS for end in ("", "_low", "_high"))
    )


def _correlation(candidates: pl.DataFrame, effect: str, proxy: str, sign: int) -> pl.DataFrame:
    known = candidates.filter(pl.col(effect).is_not_null() & pl.col(proxy).is_not_null())
    spearman = pl.corr(effect, proxy, method="spearman").fill_nan(None)
    return known.group_by("stack").agg(
        effect=pl.lit(effect),
        proxy=pl.lit(proxy),
        spearman=pl.when(pl.len() >= 3).then(spearman),
        expected=pl.lit(sign, pl.Int8),
        heads=pl.len().cast(pl.Int64),
    )
