"""Split a batch into inputs that a model can be given one after the other.

Needed if the images of several sequences are packed into one tensor, or if padding changes the model's own numbers. A model
treats each sequence independently, so giving them separately changes nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from attlas.extract.engines.visibility import axis_of
from attlas.extract.errors import Refusal
from attlas.extract.model.inputs import is_padded, patch_grid, sequence_count


def split_packed_images(model: nn.Module, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a batch whose images are packed into one tensor by sequence; return any other batch whole.

    For a vision tower that is given packed images alone, each image is a sequence.
    """
    grid = patch_grid(model, inputs)
    if grid is not None:
        ones = [1] * len(grid)
        return _split(inputs, ones, {len(grid): ones, int(grid.prod(-1).sum()): grid.prod(-1).tolist()})
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or len(ids) == 1:
        return [dict(inputs)]
    media = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.dim() > 1 and x.is_floating_point()]
    packed = any(len(x) not in (1, len(ids)) for x in media)  # a tensor of one row may hold all images side by side
    return split_by_sequence(model, inputs) if packed else [dict(inputs)]


def split_by_sequence(model: nn.Module, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a batch into its sequences, each with its own images and without padding.

    Raises Refusal if the inputs do not show which images belong to which sequence.
    """
    sequences = sequence_count(model, inputs)
    tensors = {n: x for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.dim()}
    sizes: dict[int, list[int]] = {sequences: [1] * sequences}
    for name, grid in tensors.items():  # frames, rows and columns of patches of each image or video
        if not grid.is_floating_point() and grid.dim() == 2 and grid.shape[1] == 3 and "grid" in name:
            patches = grid.prod(-1).tolist()
            images = _images_per_sequence(model, inputs, name, patches)
            sizes[len(grid)] = images
            sizes[sum(patches)] = [sum(group) for group in _group(patches, images)]
    for name, x in tensors.items():
        if len(x) not in sizes:
            sizes[len(x)] = _images_per_sequence(model, inputs, name, [1] * len(x))
    return [_without_padding(part) for part in _split(inputs, sizes[sequences], sizes)]


def _without_padding(part: dict[str, Any]) -> dict[str, Any]:
    """The inputs of one sequence without its padding; unchanged if its tokens are not contiguous."""
    if not is_padded(part):
        return part
    axis = axis_of(part["attention_mask"] != 0)
    if axis is None or not int(axis.length):
        return part
    real = slice(int(axis.start), int(axis.start + axis.length))

    def is_per_token(name: str, value: Any) -> bool:
        has_tokens = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == (1, axis.tokens)
        return has_tokens and not name.startswith(("pixel", "input_features", "input_values"))

    return {name: value[:, real] if is_per_token(name, value) else value for name, value in part.items()}


def _split(inputs: Mapping[str, Any], parts: Sequence[int], sizes: Mapping[int, Sequence[int]]) -> list[dict[str, Any]]:
    """Split every tensor along its first dimension into one piece per part; `sizes` maps its length to those of the
    pieces. Values of any other length go to every part.
    """
    split: list[dict[str, Any]] = [{} for _ in parts]
    for name, value in inputs.items():
        lengths = sizes.get(len(value)) if isinstance(value, torch.Tensor) and value.dim() else None
        pieces = [value] * len(split) if lengths is None else value.split(list(lengths))
        for part, piece in zip(split, pieces, strict=True):
            part[name] = piece
    return split


def _images_per_sequence(model: nn.Module, inputs: Mapping[str, Any], name: str, weights: Sequence[int]) -> list[int]:
    """The number of images of each sequence, from the placeholder tokens in `input_ids`.

    An image takes a number of placeholders in proportion to its weight.
    """
    ids = inputs.get("input_ids")
    sequences = sequence_count(model, inputs)
    placeholder = _placeholder_id(model, "video" if "video" in name else "image")
    if isinstance(ids, torch.Tensor) and placeholder is not None:
        counts = (ids == placeholder).flatten(1).sum(-1).tolist()
        ends, images = [0, *accumulate(weights)], []
        for count in accumulate(counts):
            end = count * sum(weights) / max(1, sum(counts))
            if end not in ends:
                break
            images.append(ends.index(end) - sum(images))
        if len(images) == sequences and sum(images) == len(weights):
            return images
    if len(weights) == sequences:
        return [1] * sequences
    raise Refusal(
        f"the inputs must show which images belong to which sequence; {name} has {len(weights)} for {sequences} sequences, "
        "and the placeholders in input_ids do not match; pass the inputs of one sequence at a time"
    )


def _placeholder_id(model: nn.Module, kind: str) -> int | None:
    config = getattr(model, "config", None)
    values = (getattr(config, f"{kind}_token_{suffix}", None) for suffix in ("id", "index"))
    return next((value for value in values if isinstance(value, int)), None)


def _group(items: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Consecutive groups of so many items each."""
    ends = [0, *accumulate(counts)]
    return [list(items[first:last]) for first, last in pairwise(ends)]
