"""What a model is given: the sequences of a batch, their real tokens, and a few tokens to examine it by."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from extract.capture.batch import Batch, Tokens
from extract.capture.probe import PROBE_DECODER_TOKENS, PROBE_SEQUENCES, PROBE_TOKENS
from extract.engines.visibility import axis_of, whole_axis
from extract.errors import Refusal
from extract.model.input_names import refuse_unknown_names

# the input that says which tokens of another are real
MASK_OF = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
# how many tokens of each a probe has: other numbers, since equal ones could be taken for each other
PROBED = {"input_ids": PROBE_TOKENS, "decoder_input_ids": PROBE_DECODER_TOKENS}
# inputs that are about tokens of text alone; a model that takes others is examined on the user's own
TEXT_INPUTS = {*MASK_OF, *MASK_OF.values(), "token_type_ids", "position_ids", "use_cache", "output_attentions"}


def named_inputs(
    model: nn.Module, arguments: tuple[Any, ...], inputs: Mapping[str, Any], *, options: Sequence[str] = ()
) -> dict[str, Any]:
    """All inputs by the names of the model's forward; None is left out. `options` are what `measure` takes besides.

    Raises Refusal where there is no tensor among them, or where forward does not take them.
    """
    _refuse_what_is_no_tensor(arguments, inputs)
    refuse_unknown_names(model, inputs, options)
    try:
        signature = inspect.signature(model.forward)
        signature.bind_partial(*arguments, **inputs)
        bound = signature.bind_partial(*arguments).arguments
    except TypeError as error:
        raise Refusal(f"inputs are those of {type(model).__name__}.forward; {error}; pass them by name") from error
    named = {name: value for name, value in {**bound, **inputs}.items() if value is not None}
    if not any(isinstance(value, torch.Tensor) for value in named.values()):
        raise Refusal(
            f"measure needs the tensors that the model reads, such as input_ids of shape [batch, token]; "
            f"got {', '.join(named) or 'nothing'}; pass them by name"
        )
    ids = named.get("input_ids")
    if "input_ids" in named and (not isinstance(ids, torch.Tensor) or ids.dim() < 2):
        raise Refusal(f"measure needs input_ids of shape [batch, token]; got {_described(ids)}; pass a 2-d tensor")
    return named


def _refuse_what_is_no_tensor(arguments: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
    """Refuse a batch that was not spread by **, text that was not tokenised, and lists or arrays that are no tensors."""
    for value in arguments:
        if isinstance(value, Mapping):
            raise Refusal(
                f"inputs are given by their names; got a {type(value).__name__} of {', '.join(map(str, value)) or 'nothing'}; "
                "write measure(model, **batch)"
            )
    for name, value in [*((None, value) for value in arguments), *inputs.items()]:
        told = f"{name} as " if name else ""
        if isinstance(value, str) or (_is_array(value) and _holds(value, str)):
            raise Refusal(
                f"a model reads tensors; got {told}text; write measure(model, **tokenizer(texts, padding=True, "
                'return_tensors="pt"))'
            )
        if _is_array(value) and _holds(value, bool | int | float):
            raise Refusal(
                f"a model reads tensors; got {told}a {type(value).__name__} of numbers; write torch.tensor(…), or call the "
                'tokenizer with return_tensors="pt"'
            )


def _is_array(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _holds(value: Any, kind: Any) -> bool:
    """Whether the first thing in nested lists, or the entries of an array, are of this kind."""
    if isinstance(value, np.ndarray):
        return value.size > 0 and isinstance(value.flat[0].item(), kind)
    return _holds(value[0], kind) if isinstance(value, list | tuple) and value else isinstance(value, kind)


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def main_input(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The tensor that holds the sequences: the model's main input where it names one, else the first."""
    name = getattr(model, "main_input_name", "input_ids")
    named = inputs.get(name) if isinstance(name, str) else None
    if isinstance(named, torch.Tensor):
        return named
    return next(value for value in inputs.values() if isinstance(value, torch.Tensor))


def sequences_in(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """How many sequences a batch has. torch's own attention takes tokens first unless told otherwise."""
    tensor = main_input(model, inputs)
    if _grid(model, inputs) is not None:
        return 1  # the patches of one image, see `apart`
    if not tensor.is_floating_point() or hasattr(model, "config"):
        return len(tensor)
    if tensor.dim() == 2:
        return 1  # one sequence without a batch
    return tensor.shape[1 if is_sequence_first(model) else 0]


def apart(model: nn.Module, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Inputs that hold the images of several sequences one after the other, sequence by sequence; others as they are.

    A model looks at every sequence by itself, so nothing is changed by giving them to it one at a time. Where a tower is
    given images alone, each is a sequence.
    """
    grid = _grid(model, inputs)
    if grid is not None:
        images = [1] * len(grid)
        return _split(inputs, images, {len(grid): images, int(grid.prod(-1).sum()): grid.prod(-1).tolist()})
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or len(ids) == 1:
        return [dict(inputs)]
    media = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.dim() > 1 and x.is_floating_point()]
    packed = any(len(x) not in (1, len(ids)) for x in media)  # a single row may be a strip of all images
    return one_by_one(model, inputs) if packed else [dict(inputs)]


def one_by_one(model: nn.Module, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each sequence of a batch by itself, with its own images and without the padding of its text.

    Raises Refusal where it cannot be told which images are whose.
    """
    sequences = sequences_in(model, inputs)
    tensors = {n: x for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.dim()}
    sizes: dict[int, list[int]] = {sequences: [1] * sequences}
    for name, grid in tensors.items():  # frames, rows and columns of patches of each image or video
        if not grid.is_floating_point() and grid.dim() == 2 and grid.shape[1] == 3 and "grid" in name:
            patches = grid.prod(-1).tolist()
            images = _images_of_each(model, inputs, name, patches)
            sizes[len(grid)] = images
            sizes[sum(patches)] = [sum(of_one) for of_one in _dealt(patches, images)]
    for name, x in tensors.items():
        if len(x) not in sizes:
            sizes[len(x)] = _images_of_each(model, inputs, name, [1] * len(x))
    return [_without_padding(part) for part in _split(inputs, sizes[sequences], sizes)]


def is_padded(inputs: Mapping[str, Any]) -> bool:
    mask = inputs.get("attention_mask")
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all())


def _without_padding(part: dict[str, Any]) -> dict[str, Any]:
    """What there is for every token of a single sequence, of the real ones alone; those with holes stay as they are."""
    if not is_padded(part):
        return part
    axis = axis_of(part["attention_mask"] != 0)
    if axis is None or not int(axis.length):
        return part
    real = slice(int(axis.start), int(axis.start + axis.length))

    def of_tokens(name: str, value: Any) -> bool:
        whole = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == (1, axis.tokens)
        return whole and not name.startswith(("pixel", "input_features", "input_values"))

    return {name: value[:, real] if of_tokens(name, value) else value for name, value in part.items()}


def _split(inputs: Mapping[str, Any], each: Sequence[int], sizes: Mapping[int, Sequence[int]]) -> list[dict[str, Any]]:
    """Every tensor cut along its first dimension, by sizes that follow from its length; the rest is for all."""
    parts: list[dict[str, Any]] = [{} for _ in each]
    for name, value in inputs.items():
        cut = sizes.get(len(value)) if isinstance(value, torch.Tensor) and value.dim() else None
        of_parts = [value] * len(parts) if cut is None else value.split(list(cut))
        for part, of_part in zip(parts, of_parts, strict=True):
            part[name] = of_part
    return parts


def _images_of_each(model: nn.Module, inputs: Mapping[str, Any], name: str, weights: Sequence[int]) -> list[int]:
    """How many of these images each sequence has: as many as have the tokens that it holds places for."""
    ids = inputs.get("input_ids")
    sequences = sequences_in(model, inputs)
    place = _place_holder(model, "video" if "video" in name else "image")
    if isinstance(ids, torch.Tensor) and place is not None:
        places = (ids == place).flatten(1).sum(-1).tolist()
        ends, images = [0, *accumulate(weights)], []
        for asked in accumulate(places):
            end = asked * sum(weights) / max(1, sum(places))
            if end not in ends:
                break
            images.append(ends.index(end) - sum(images))
        if len(images) == sequences and sum(images) == len(weights):
            return images
    if len(weights) == sequences:
        return [1] * sequences
    raise Refusal(
        f"it must be known which images belong to which sequence; {name} has {len(weights)} for {sequences} sequences, and "
        "their places in input_ids do not tell; give the inputs of one sequence at a time"
    )


def _place_holder(model: nn.Module, kind: str) -> int | None:
    config = getattr(model, "config", None)
    named = (getattr(config, f"{kind}_token_{end}", None) for end in ("id", "index"))
    return next((token for token in named if isinstance(token, int)), None)


def _dealt(items: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    ends = [0, *accumulate(counts)]
    return [list(items[first:last]) for first, last in pairwise(ends)]


def _grid(model: nn.Module, inputs: Mapping[str, Any]) -> Int[Tensor, "image 3"] | None:
    """Frames, rows and columns of patches of each image, where the main input is patches side by side."""
    patches = len(main_input(model, inputs)) if "input_ids" not in inputs else 0
    for value in inputs.values():
        whole = isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dim() == 2
        if whole and value.shape[1] == 3 and int(value.prod(-1).sum()) == patches:
            return value
    return None


def is_sequence_first(model: nn.Module) -> bool:
    return any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in model.modules())


def batch_of(model: nn.Module, inputs: Mapping[str, Any], classes: Tensor | None = None) -> Batch:
    """What is known of a batch from its inputs. `classes` are those of the vocabulary's ids."""
    texts = {}
    for name, mask in MASK_OF.items():
        ids = inputs.get(name)
        if isinstance(ids, torch.Tensor) and ids.dim() >= 2 and not ids.is_floating_point():
            texts[name] = _tokens(ids, inputs.get(mask), mask, classes)
    return Batch(sequences_in(model, inputs), texts)


def _tokens(
    ids: Int[Tensor, "batch token *several"],
    mask: Tensor | None,
    name: str,
    classes: Int[Tensor, " vocabulary"] | None,
) -> Tokens:
    if ids.dim() > 2:  # several ids to a token: codes of sound
        first = _tokens(ids.flatten(2)[..., 0], mask, name, None)
        return Tokens(first.axis)
    of_ids = None if classes is None else classes[ids].long()
    if mask is None:
        return Tokens(whole_axis(ids.shape[0], ids.shape[1], ids.device), ids, of_ids)
    if mask.dim() != 2:  # a mask of pairs of tokens: what no query sees is padding
        return Tokens(None, ids, of_ids)
    if mask.shape != ids.shape:
        raise Refusal(f"{name} must be shaped like the ids {tuple(ids.shape)}; got {tuple(mask.shape)}")
    axis = axis_of(mask != 0)
    if axis is None:
        raise Refusal(
            f"the real tokens of a sequence must stand together (padding left or right of them); this {name} has "
            "holes; remove the padding inside the sequences"
        )
    if not bool((axis.length > 0).all()):
        row = int((axis.length == 0).nonzero()[0])
        raise Refusal(f"a sequence has at least one real token; row {row} of {name} has none; leave it out")
    return Tokens(axis, ids, of_ids)


def probe_inputs(model: nn.Module, inputs: Mapping[str, Any] | None) -> tuple[dict[str, Any], int]:
    """Small inputs to examine a model on, and their number of sequences: a few tokens, or the first rows of `inputs`.

    Without inputs a model is taken to be one of text.
    """
    names = {"input_ids"} if inputs is None else set(inputs)
    vocabulary = _vocabulary(model)
    several = inputs is not None and "input_ids" in inputs and inputs["input_ids"].dim() > 2
    if "input_ids" in names and names <= TEXT_INPUTS and vocabulary is not None and not several:
        probe = {name: _ids(model, vocabulary, tokens) for name, tokens in PROBED.items() if name in names}
        return probe, PROBE_SEQUENCES
    if inputs is None:
        raise Refusal(
            f"a model is examined on a few tokens; {type(model).__name__} states no vocabulary; it is no model of text"
        )
    sequences = sequences_in(model, inputs)
    few = min(sequences, 2)
    if not hasattr(model, "config"):
        return dict(inputs), sequences  # which dimension is which is known to the model alone
    sliced = {
        name: value[:few] if isinstance(value, torch.Tensor) and value.dim() and len(value) == sequences else value
        for name, value in inputs.items()
    }
    return sliced, few


def _vocabulary(model: nn.Module) -> int | None:
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
        ids = ids.where(ids != padding, (padding + 1) % vocabulary)  # some families number positions past padding
    return ids.to(next(model.parameters()).device)


def random_ids(vocabulary: int, tokens: int) -> Int[Tensor, "sequence token"]:
    """Ids of a probe, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (PROBE_SEQUENCES, tokens), generator=generator)
