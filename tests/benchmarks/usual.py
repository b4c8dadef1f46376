"""usual/*: the way it is usually done, every pattern in memory and the statistics in torch.

The statistics are those of `heads` and `residual` that follow from what the model returns: scores, contexts and the
stream between attention and MLP are not among it, so this side does less.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from extract.encoder import Encoder
from extract.engines import choose
from extract.measurement import layout_of
from extract.pipeline import BATCH_TOKENS
from extract.shard import Instrument, measured_tables
from extract.statistics.attention import TOKEN_CLASSES
from extract.store import Store
from extract.tokens import token_classes
from tests.benchmarks.harness import Result, interleaved
from tests.benchmarks.workloads import Workload, demo

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def parquet_against_usual(encoder: Encoder, work: Workload, repeats: int) -> Result:
    """From a batch of ids without padding to Parquet, both ways."""
    classes = token_classes(encoder.tokenizer)
    engine = choose("auto")
    instrument = Instrument(encoder, layout_of(encoder.model), engine, BATCH_TOKENS, classes)
    eager = eager_copy(encoder.model)
    class_of = torch.from_numpy(classes[work.ids].astype(np.int64))
    with tempfile.TemporaryDirectory() as folder:

        def ours() -> None:
            tables, _ = measured_tables(instrument, _sequences(work.ids), shard=0)
            for name, table in tables.items():
                Store(Path(folder)).write_part(name, 0, table)

        def theirs() -> None:
            for name, table in usual_tables(eager, work.ids, class_of).items():
                pq.write_table(table, Path(folder) / f"{name}.parquet")

        for _ in range(2):
            ours()
            theirs()
        return interleaved(ours, theirs, repeats=repeats).rates(work.tokens, "tokens/s")


def eager_copy(model: nn.Module) -> nn.Module:
    """The model with attention that gives its patterns."""
    copied: Any = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    return copied


def minilm_usual(work: Workload, repeats: int) -> Result:
    return parquet_against_usual(demo(), work, repeats)


def _sequences(ids: Tensor) -> pa.Table:
    numbers = np.arange(len(ids))
    return pa.table({"sequence_id": numbers, "document_id": numbers, "token_ids": ids.tolist()})


def usual_tables(model: nn.Module, ids: Int[Tensor, "batch token"], classes: Int[Tensor, "batch token"]):
    """One row per sequence, layer and head, and one per sequence and layer."""
    with torch.inference_mode():
        out = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
        copies = repetitions(ids)
        heads = [head_statistics(p, copies, classes) for p in out.attentions]
        states = out.hidden_states
        residual = [residual_statistics(x, after) for x, after in pairwise(states)]
        return {"heads": _table(heads, ("sequence", "head")), "residual": _table(residual, ("sequence",))}


def repetitions(ids: Int[Tensor, "batch token"]) -> tuple[Tensor, Tensor]:
    """Of [batch, 1, query, key], 1 or 0: the key is another copy of the query; it follows an earlier copy."""
    same = (ids[:, :, None] == ids[:, None, :]) & ~torch.eye(ids.shape[1], dtype=torch.bool)
    follows = same.roll(1, dims=-1).tril()
    follows[..., 0] = False
    return same[:, None].float(), follows[:, None].float()


def head_statistics(
    p: Float[Tensor, "batch head query key"],
    copies: tuple[Tensor, Tensor],
    classes: Int[Tensor, "batch key"],
) -> dict[str, Float[Tensor, "batch head"]]:
    """Means over rows, each formula as it is written, nothing computed twice."""
    n = p.shape[-1]
    place = torch.arange(n, dtype=p.dtype)
    d = place[None, :] - place[:, None]
    entropy = torch.special.entr(p).sum(-1)
    distance = (p * d.abs()).sum(-1).mean(-1)
    offset = (p * d).sum(-1)
    spread = ((p * d.square()).sum(-1) - offset.square()).clamp_min(0).sqrt()
    own, previous, following = (p.diagonal(k, -2, -1).sum(-1) / n for k in (0, -1, 1))
    backward = p.tril(-1).sum((-1, -2)) / n
    received = p.mean(-2)
    received_entropy = torch.special.entr(received).sum(-1)
    received_max, received_max_key = received.max(-1)
    by_class = received @ torch.nn.functional.one_hot(classes, len(TOKEN_CLASSES)).to(p.dtype)
    same, induction = ((p * where).sum((-1, -2)) / n for where in copies)
    return {
        "entropy_nats": entropy.mean(-1),
        "entropy_std_nats": entropy.std(-1, correction=0),
        "entropy_normalized": entropy.mean(-1) / math.log(n),
        "attended_keys": entropy.exp().mean(-1),
        "collision_probability": p.square().sum(-1).mean(-1),
        "max_weight": p.amax(-1).mean(-1),
        "distance_tokens": distance,
        "offset_tokens": offset.mean(-1),
        "offset_std_tokens": spread.mean(-1),
        "distance_vs_uniform": distance / d.abs().mean(),
        "mass_self": own,
        "mass_previous": previous,
        "mass_next": following,
        "mass_backward": backward,
        "mass_forward": 1 - own - backward,
        "mass_first": received[..., 0],
        **{f"mass_{name}": by_class[..., number] for number, name in enumerate(TOKEN_CLASSES)},
        "mass_same_token": same,
        "mass_induction": induction,
        "received_entropy_nats": received_entropy,
        "mutual_information_nats": received_entropy - entropy.mean(-1),
        "received_max": received_max,
        "received_max_key": received_max_key,
    }


def residual_statistics(
    x: Float[Tensor, "batch token width"], after: Float[Tensor, "batch token width"]
) -> dict[str, Float[Tensor, " batch"]]:
    """The stream around one layer, as far as hidden states show it."""
    n, width = x.shape[1:]
    update = after - x
    norm, update_norm, after_norm = (t.norm(dim=-1) for t in (x, update, after))
    units = after / after_norm[..., None]
    size = after.abs()
    largest = size.amax(1)
    return {
        "stream_norm": norm.mean(-1),
        "update_norm": update_norm.mean(-1),
        "update_ratio": (update_norm / norm).mean(-1),
        "update_cosine": torch.cosine_similarity(x, update, dim=-1).mean(-1),
        "step_cosine": torch.cosine_similarity(x, after, dim=-1).mean(-1),
        "norm_gain": (after_norm / norm).mean(-1),
        "anisotropy": (units.sum(1).square().sum(-1) - n) / (n * (n - 1)),
        "max_abs": largest.amax(-1),
        "outlier_dim": largest.argmax(-1),
        "outlier_ratio": (size.amax(-1) / after_norm).mean(-1) * width**0.5,
        "kurtosis": units.pow(4).sum(-1).mean(-1) * width,
    }


def _table(layers: Sequence[Mapping[str, Tensor]], axes: tuple[str, ...]) -> pa.Table:
    """The layers' statistics one below the other, with the numbers of layer and axes."""
    columns = {name: torch.stack([layer[name] for layer in layers]).numpy() for name in layers[0]}
    shape = next(iter(columns.values())).shape
    numbers = zip(("layer", *axes), np.indices(shape), strict=True)
    return pa.table({name: values.ravel() for name, values in (*numbers, *columns.items())})
