"""The part of a model that a run measures, the inputs it is given, and its layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from attlas.extract.capture.discovery.patch_layout import PIXELS, find_patch_layout, grids_of
from attlas.extract.capture.discovery.trace import trace_of
from attlas.extract.capture.layout import Layout
from attlas.extract.capture.tensors import first_tensor
from attlas.extract.corpus.names import real_name
from attlas.extract.engines.patches import Grid
from attlas.extract.errors import CaptureError, Refusal, first_line
from attlas.extract.layouts import layout_of
from attlas.extract.memory import is_out_of_memory
from attlas.extract.model.images import ImagePreprocessing, preprocess_image, read_planned_image
from attlas.extract.model.inputs import MASK_OF
from attlas.extract.model.modality import accepts_input, measured_part, vision_part
from attlas.extract.model.probe_inputs import PROBE_LENGTHS, random_ids
from attlas.extract.model.special_tokens import SpecialTokens, special_tokens

Stacks = Literal["encoder", "all"]
TOKEN_INPUTS = ("input_ids",)
TOKEN_TYPES = "token_type_ids"


@dataclass(frozen=True)
class ImageCorpus:
    """The images of a run: their folder, how they become pixels, and where their patches are among the tokens."""

    folder: Path
    preprocessing: ImagePreprocessing
    grids: Mapping[str, Grid] = field(default_factory=dict)

    def pixels(self, name: str, sha256: str) -> Float[np.ndarray, "channel row column"]:
        """The pixels of the image with this readable name. Raises Refusal if it has changed since it was planned."""
        return self.preprocessing.pixels(read_planned_image(self.folder / real_name(name), sha256))


@dataclass(frozen=True)
class MeasuredModel:
    """The measured part of a model, its layout, and its inputs that hold a sequence.

    `special` is set if the model is also given the tokenizer's token types. `padding_matters` is set if padding behind a
    sequence changes the model's output for it.
    """

    model: nn.Module
    inputs: tuple[str, ...]
    layout: Layout
    images: ImageCorpus | None = None
    special: SpecialTokens | None = None
    padding_matters: bool = False

    @property
    def input_names(self) -> list[str]:
        """Names of everything the model is given for a sequence."""
        types = [] if self.special is None else [TOKEN_TYPES]
        return [*self.inputs, *(MASK_OF[name] for name in self.inputs if name in MASK_OF), *types]


def examine_text_model(model: nn.Module, tokenizer: Any, *, stacks: Stacks, device: torch.device) -> MeasuredModel:
    """Examine a text model on random ids of its tokenizer. Raises Refusal if it needs more than token ids.

    Of an encoder–decoder model, `stacks` selects the encoder alone, or all of it with the same tokens for its decoder.
    """
    with_decoder = stacks == "all" and getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    inputs = ("input_ids", "decoder_input_ids") if with_decoder else TOKEN_INPUTS
    part = measured_part(model, dict.fromkeys([*inputs, *(MASK_OF[name] for name in inputs)]))
    probe = _random_text_inputs(inputs, max(tokenizer.get_vocab().values(), default=0))
    probe = {name: tensor.to(device) for name, tensor in probe.items()}
    layout = _text_layout(part, probe)
    special = special_tokens(tokenizer)
    takes_types = special.types is not None and accepts_input(part, TOKEN_TYPES)
    if takes_types:
        _refuse_types_beyond_table(part, special)
    padding_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    padding_matters = _padding_matters(part, probe, padding_id)
    return MeasuredModel(
        part, inputs, layout, special=special if takes_types else None, padding_matters=padding_matters
    )


def examine_image_model(
    model: nn.Module, processor: Any, folder: Path, *, device: torch.device, dtype: torch.dtype
) -> MeasuredModel:
    """Examine the vision part of a model on an image of noise from its own image processor. Raises Refusal."""
    tower = vision_part(model)
    assert tower is not None, "models without a vision part are refused on loading"
    part = measured_part(tower, {PIXELS: None})
    pixels = _noise_pixels(processor)
    inputs = {PIXELS: torch.from_numpy(np.stack([pixels, pixels[:, ::-1].copy()])).to(device, dtype)}
    layout = _image_layout(part, inputs)
    patch_layout = find_patch_layout(part, layout, inputs)
    if patch_layout is None:
        raise Refusal(
            f"a run must know how many tokens an image becomes; {type(part).__name__} does not show them before its first "
            "attention layer; measure it with attlas.measure"
        )
    special = 0 if patch_layout.grid is None else patch_layout.tokens - patch_layout.grid.patches
    preprocessing = ImagePreprocessing(processor, pixels.shape, patch_layout.tokens, special)
    return MeasuredModel(part, (PIXELS,), layout, ImageCorpus(folder, preprocessing, grids_of(part, layout, inputs)))


def _random_text_inputs(inputs: Sequence[str], largest_id: int) -> dict[str, torch.Tensor]:
    """A few random ids for each input, without padding."""
    ids = {name: random_ids(largest_id + 1, PROBE_LENGTHS[name]) for name in inputs}
    return ids | {MASK_OF[name]: torch.ones_like(tensor) for name, tensor in ids.items()}


def _padding_matters(model: nn.Module, inputs: Mapping[str, torch.Tensor], padding_id: int) -> bool:
    """Whether padding changes the model's output for the tokens before it, as convolutions over tokens do."""
    length = next(iter(inputs.values())).shape[1] * 2 // 3
    masks = MASK_OF.values()
    padded = {name: x.clone() for name, x in inputs.items()}
    for name, x in padded.items():
        x[:, length:] = 0 if name in masks else padding_id
    unpadded = {name: x[:, :length] for name, x in inputs.items()}
    batch = next(iter(inputs.values())).shape[0]
    try:
        alone, before_padding = (
            first_tensor(trace_of(model, given, batch=batch, events=False).output) for given in (unpadded, padded)
        )
    except Exception:  # a model that fails on padding is run without it
        return True
    if alone is None or before_padding is None or alone.dim() != 3:
        return False  # no state per token to compare
    if alone.shape[1] != length or before_padding.shape[1] <= length:
        return False
    tolerance = max(1e-3, 8 * torch.finfo(alone.dtype).eps)
    difference = (before_padding[:, :length].double() - alone.double()).norm(dim=-1)
    return bool((difference > tolerance * alone.double().norm(dim=-1)).any())


def _refuse_types_beyond_table(model: nn.Module, special: SpecialTokens) -> None:
    """Raise Refusal if the tokenizer's token types exceed the model's embedding table for them."""
    tables = (m for n, m in model.named_modules() if n.rpartition(".")[2] == "token_type_embeddings")
    rows = min((t.num_embeddings for t in tables if isinstance(t, torch.nn.Embedding)), default=None)
    largest = int(special.types_of(special.count + 1).max())
    if rows is not None and largest >= rows:
        raise Refusal(
            f"the model must have an embedding for every token type; {type(model).__name__} has {rows}, and its tokenizer "
            f"gives type {largest}; use the tokenizer that belongs to the model"
        )


def _text_layout(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Layout:
    """The layout on token ids alone. Raises Refusal for a model that needs more, such as images beside its text."""
    try:
        return layout_of(model, inputs)
    except (Refusal, CaptureError):
        raise
    except Exception as error:
        reason = None if is_out_of_memory(error) else _own_failure(model, inputs)
        if reason is None:
            raise
        raise Refusal(
            f"a run gives a text model {' and '.join(name for name in inputs if name in PROBE_LENGTHS)} alone; "
            f"{type(model).__name__} fails without other inputs ({reason}); save the part of it that reads text, or pass "
            "all of its inputs to attlas.measure"
        ) from error


def _own_failure(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> str | None:
    """The model's own error on these inputs, outside of any observation; None if it runs."""
    try:
        with torch.inference_mode():
            model(**inputs)
    except Exception as error:  # any error of the model's code
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _noise_pixels(processor: Any) -> Float[np.ndarray, "channel row column"]:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    return preprocess_image(processor, Image.fromarray(noise))


def _image_layout(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Layout:
    try:
        return layout_of(model, inputs)
    except (Refusal, CaptureError):
        raise
    except (ValueError, RuntimeError) as error:
        raise Refusal(
            f"a model must accept the pixels that its image processor makes; {type(model).__name__} does not accept "
            f"{list(inputs[PIXELS].shape[1:])} ({first_line(error)}); use the preprocessor_config.json that belongs to it"
        ) from error
