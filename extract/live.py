"""Measure a model in memory, such as one that is being trained, into a dataset: a run without loading."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from attlas.extract.capture.compiled import unwrap_model
from attlas.extract.capture.undisturbed import undisturbed
from attlas.extract.errors import Refusal
from attlas.extract.instrument import instrument_of
from attlas.extract.model.encoder import Encoder
from attlas.extract.model.modality import refuse_wrong_modality
from attlas.extract.model.tokenizer import check_vocabulary
from attlas.extract.options import RunOptions
from attlas.extract.run import finish, measure_shard, plan_run
from attlas.extract.store import Location, Store


def run_live(model: nn.Module, tokenizer: Any, options: RunOptions) -> Location:
    """Measure a corpus of texts with a model in memory; returns the dataset's location.

    options: as of a run; `model` and `revision` are the names that the dataset has, `device` and `dtype` those of the weights, in
    which it runs also if it trains in mixed precision. The model runs in eval mode, and is left as it was, with all random number
    generators. A finished dataset is kept. Raises Refusal for what can't be measured.
    """
    encoder = live_encoder(model, tokenizer, name=options.model, revision=options.revision)
    options = replace(options, device="auto", dtype="auto")
    with undisturbed(encoder.model, encoder.device):
        _unwrap_mixed_precision(encoder.model)
        try:
            planned = plan_run(options, instrument=instrument_of(encoder, options))
            if not planned.is_complete:
                worker = planned.open_worker()
                for shard in planned.remaining:
                    measure_shard(worker, shard)
            return finish(options.out)
        finally:
            Store.at(options.out).unlock()


def _unwrap_mixed_precision(model: nn.Module) -> None:
    """Take off the autocast that accelerate puts around `forward`: a model is measured in the type of its weights, as a saved one."""
    original = vars(model).get("_original_forward")
    if original is not None:
        vars(model)["forward"] = original


def live_encoder(model: nn.Module, tokenizer: Any, *, name: str, revision: str | None = None) -> Encoder:
    """A model in memory, as it is, with its tokenizer. Raises Refusal for one whose weights are in parts elsewhere."""
    model = unwrap_model(model)
    tensors = list(chain(model.parameters(), model.buffers()))
    _refuse_partial_weights(model)
    refuse_wrong_modality(model, "texts")
    check_vocabulary(name, model, tokenizer)
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    return Encoder(name=name, revision=revision, model=model, tokenizer=tokenizer, device=device, dtype=dtype)


def _refuse_partial_weights(model: nn.Module) -> None:
    """Raise Refusal for weights of which this process holds a part: FSDP's and tensor parallelism's, DeepSpeed's stage 3."""
    for name, kind in _partial_weights(model):
        raise Refusal(
            f"a model is measured with all its weights; {name} is {kind}, of which this process holds a part; "
            "measure the checkpoints that training saves: attlas run --model CHECKPOINT"
        )


def _partial_weights(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            yield name, "a DTensor"
        elif hasattr(parameter, "ds_id"):
            yield name, "a parameter of DeepSpeed's stage 3"
        elif parameter.is_meta:
            yield name, "on the meta device"
