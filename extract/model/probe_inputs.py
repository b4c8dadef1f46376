"""The small inputs on which a model is examined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from attlas.extract.capture.discovery.trace import PROBE_DECODER_TOKENS, PROBE_SEQUENCES, PROBE_TOKENS
from attlas.extract.errors import Refusal
from attlas.extract.model.inputs import TEXT_INPUTS, sequence_count

# tokens of each input; the numbers differ so that the dimensions can't be confused
PROBE_LENGTHS = {"input_ids": PROBE_TOKENS, "decoder_input_ids": PROBE_DECODER_TOKENS}


def probe_inputs(model: nn.Module, inputs: Mapping[str, Any] | None) -> tuple[dict[str, Any], int]:
    """Inputs to examine a model on, and their number of sequences: random ids, or the first rows of `inputs`.

    Without `inputs` the model must be a text model.
    """
    names = {"input_ids"} if inputs is None else set(inputs)
    vocabulary = _vocabulary_size(model)
    several = inputs is not None and "input_ids" in inputs and inputs["input_ids"].dim() > 2  # ids per token
    if "input_ids" in names and names <= TEXT_INPUTS and vocabulary is not None and not several:
        probe = {name: _ids(model, vocabulary, tokens) for name, tokens in PROBE_LENGTHS.items() if name in names}
        return probe, PROBE_SEQUENCES
    if inputs is None:
        raise Refusal(
            f"a model is examined on random token ids; {type(model).__name__} states no vocabulary size; pass its inputs "
            "to attlas.measure"
        )
    sequences = sequence_count(model, inputs)
    if not hasattr(model, "config"):
        return dict(inputs), sequences  # only the model knows which dimension is which
    first = min(sequences, 2)
    sliced = {
        name: value[:first] if isinstance(value, torch.Tensor) and value.dim() and len(value) == sequences else value
        for name, value in inputs.items()
    }
    return sliced, first


def random_ids(vocabulary: int, tokens: int) -> Int[Tensor, "sequence token"]:
    """Random ids for a probe, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (PROBE_SEQUENCES, tokens), generator=generator)


def _vocabulary_size(model: nn.Module) -> int | None:
    try:
        embeddings = model.get_input_embeddings()  # pyright: ignore
    except (AttributeError, NotImplementedError):
        embeddings = None
    stated = getattr(getattr(model, "config", None), "vocab_size", None)
    return getattr(embeddings, "num_embeddings", None) or (stated if isinstance(stated, int) else None)


def _ids(model: nn.Module, vocabulary: int, tokens: int) -> Int[Tensor, "batch token"]:
    ids = random_ids(vocabulary, tokens)
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    if padding is not None and vocabulary > 1:
        # some families count positions without padding tokens
        ids = ids.where(ids != padding, (padding + 1) % vocabulary)
    return ids.to(next(model.parameters()).device)
