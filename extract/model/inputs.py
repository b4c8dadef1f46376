"""What the inputs of a model say about a batch: its main input, its number of sequences, its tokens and padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from attlas.extract.capture.runtime.batch import Batch, Tokens
from attlas.extract.engines.visibility import axis_of, whole_axis
from attlas.extract.errors import Refusal

# the padding mask of each input of token ids
MASK_OF = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
# inputs of text models; a model with any other input is examined on the user's own inputs
TEXT_INPUTS = {*MASK_OF, *MASK_OF.values(), "token_type_ids", "position_ids", "use_cache", "output_attentions"}


def main_input(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The tensor with the sequences: the model's main input if it names one, else the first tensor."""
    name = getattr(model, "main_input_name", "input_ids")
    value = inputs.get(name) if isinstance(name, str) else None
    if isinstance(value, torch.Tensor):
        return value
    return next(value for value in inputs.values() if isinstance(value, torch.Tensor))


def sequence_count(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """The number of sequences in a batch. torch's own attention modules have tokens first by default."""
    tensor = main_input(model, inputs)
    if patch_grid(model, inputs) is not None:
        return 1  # the patches of one image, see `split_packed_images`
    if not tensor.is_floating_point() or hasattr(model, "config"):
        return len(tensor)
    if tensor.dim() == 2:
        return 1  # one sequence without a batch dimension
    return tensor.shape[1 if is_sequence_first(model) else 0]


def is_sequence_first(model: nn.Module) -> bool:
    """Whether tokens are the first dimension of the model's inputs, and sequences the second."""
    return any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in model.modules())


def is_padded(inputs: Mapping[str, Any]) -> bool:
    """Whether the attention mask marks padding."""
    mask = inputs.get("attention_mask")
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all())


def patch_grid(model: nn.Module, inputs: Mapping[str, Any]) -> Int[Tensor, "image 3"] | None:
    """Frames, rows and columns of patches of each image, if the main input is the patches of all images in a row."""
    patches = len(main_input(model, inputs)) if "input_ids" not in inputs else 0
    for value in inputs.values():
        is_table = isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dim() == 2
        if is_table and value.shape[1] == 3 and int(value.prod(-1).sum()) == patches:
            return value
    return None


def batch_of(model: nn.Module, inputs: Mapping[str, Any], classes: Tensor | None = None) -> Batch:
    """The facts about a batch that follow from its inputs. `classes` holds the class of every id of the vocabulary."""
    texts = {}
    for name, mask in MASK_OF.items():
        ids = inputs.get(name)
        if isinstance(ids, torch.Tensor) and ids.dim() >= 2 and not ids.is_floating_point():
            texts[name] = _tokens(ids, inputs.get(mask), mask, classes)
    return Batch(sequence_count(model, inputs), texts)


def _tokens(
    ids: Int[Tensor, "batch token *several"],
    mask: Tensor | None,
    mask_name: str,
    classes: Int[Tensor, " vocabulary"] | None,
) -> Tokens:
    if ids.dim() > 2:  # several ids per token, as audio codecs have
        return Tokens(_tokens(ids.flatten(2)[..., 0], mask, mask_name, None).axis)
    token_classes = None if classes is None else classes[ids].long()
    if mask is None:
        return Tokens(whole_axis(ids.shape[0], ids.shape[1], ids.device), ids, token_classes)
    if mask.dim() != 2:  # a mask over pairs of tokens: padding is what no query attends to
        return Tokens(None, ids, token_classes)
    if mask.shape != ids.shape:
        raise Refusal(f"{mask_name} must have the shape of the ids, {tuple(ids.shape)}; got {tuple(mask.shape)}")
    axis = axis_of(mask != 0)
    if axis is None:
        raise Refusal(
            f"the tokens of a sequence must be contiguous, with padding to their left or right; this {mask_name} has gaps; "
            "remove the padding inside the sequences"
        )
    if not bool((axis.length > 0).all()):
        row = int((axis.length == 0).nonzero()[0])
        raise Refusal(f"a sequence must have at least one token; row {row} of {mask_name} has none; remove it")
    return Tokens(axis, ids, token_classes)
