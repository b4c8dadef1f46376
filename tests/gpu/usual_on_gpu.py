"""The usual way on the device: eager patterns, hooks and the same statistics in torch, in float32 from a model in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.usual import call_of, eager_copy, record_module_states, write_grams
from tests.benchmarks.usual_way import (
    TOKEN_CLASSES,
    head_columns,
    norm_quantities,
    pattern_quantities,
    profiles,
    repetitions,
    score_quantities,
    site_columns,
)
from tests.gpu.machine import DEVICE
from tests.gpu.workloads import Workload


def usual_pass(work: Workload, *, at_once: int) -> Callable[[], None]:
    """A pass over the batch, `at_once` sequences at a time, up to the numbers on the host."""
    model = eager_copy(work.model)
    grams = [gram.float() for gram in write_grams(model)]

    def run() -> None:
        # the statistics make their helpers on torch's default device
        with torch.inference_mode(), torch.device(DEVICE):
            parts = [_quantities(model, ids, grams) for ids in work.ids.split(at_once)]
            heads = {name: torch.cat([p[0][name] for p in parts], 1) for name in parts[0][0]}
            columns = head_columns(heads, work.ids % len(TOKEN_CLASSES))
            results = [columns, *(site for _, sites in parts for site in sites)]
            for values in results:
                _to_host(values)
            for profile in profiles(heads).values():
                _to_host(vars(profile))

    return run


def _quantities(model: Any, ids: Tensor, grams: list[Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Quantities of the heads of all layers, and the columns of every site of the stream."""
    with record_module_states(model) as recorded:
        patterns = model(input_ids=ids, output_attentions=True).attentions
    states = {name: (read.float(), wrote.float()) for name, (read, wrote) in recorded.items()}
    same, follows = repetitions(ids)
    heads, attentions = [], []
    for layer, (pattern, gram) in enumerate(zip(patterns, grams, strict=True)):
        call = call_of(states, layer, gram)
        of_layer = pattern_quantities(pattern.float(), same, follows) | score_quantities(call) | norm_quantities(call)
        heads.append(of_layer)
        attentions.append((call.contexts, of_layer["context_norm"]))
    norms = [pair for name, pair in states.items() if name.endswith("LayerNorm")]
    sites = site_columns(norms, attentions, epsilon=model.config.layer_norm_eps)
    return {name: torch.stack([layer[name] for layer in heads]) for name in heads[0]}, sites


def _to_host(values: Mapping[str, Tensor]) -> None:
    for tensor in values.values():
        tensor.cpu()
