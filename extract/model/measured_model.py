"""What a run feeds a model: which part of it is measured, and which of its inputs are given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from extract.capture.grid import PIXELS
from extract.capture.layout import Layout
from extract.capture.probe import trace_of
from extract.capture.seam import first_tensor
from extract.corpus.names import real_name
from extract.engines.patches import Grid
from extract.errors import CaptureError, Refusal, first_line
from extract.memory import is_out_of_memory
from extract.model.images import Eye, pixels_of, read_again
from extract.model.inputs import MASK_OF, PROBED, random_ids
from extract.planning import SpecialTokens, special_tokens

Stacks = Literal["encoder", "all"]
Reads = Literal["texts", "images"]
TEXT = ("input_ids",)
TYPES = "token_type_ids"
# the main inputs of models that read no texts
_OTHER_INPUTS = (PIXELS, "pixel_values_videos", "input_features", "input_values")


@dataclass(frozen=True)
class Images:
    """The images of a run: where they lie, how they are made into pixels, where their patches stand among tokens."""

    folder: Path
    eye: Eye
    grids: Mapping[str, Grid] = field(default_factory=dict)

    def pixels(self, name: str, sha256: str) -> Float[np.ndarray, "channel row column"]:
        """Of the image of this readable name, which must be as it was planned. Raises Refusal."""
        return self.eye.pixels(read_again(self.folder / real_name(name), sha256))


@dataclass(frozen=True)
class Fed:
    """The part of a model that is measured, the inputs of it that hold a sequence, and its layout.

    `special`: where the tokenizer's token types are given to it too, what they follow from. `padding_matters`: whether what
    it gives of a sequence is changed by padding behind it.
    """

    model: nn.Module
    inputs: tuple[str, ...]
    layout: Layout
    images: Images | None = None
    special: SpecialTokens | None = None
    padding_matters: bool = False

    @property
    def named_inputs(self) -> list[str]:
        """All that the model is given of a sequence, by name."""
        types = [] if self.special is None else [TYPES]
        return [*self.inputs, *(MASK_OF[name] for name in self.inputs if name in MASK_OF), *types]


def refuse_other_reader(model: nn.Module, reads: Reads) -> None:
    """Raise Refusal where the corpus is of images and the model reads none, or the other way round."""
    read = getattr(model, "main_input_name", "input_ids")
    if reads == "images" and _part_that_sees(model) is None:
        raise Refusal(
            f"a corpus of images needs a model that reads {PIXELS}; {type(model).__name__} reads {read}; "
            "give texts, or a model of images"
        )
    if reads == "texts" and read in _OTHER_INPUTS:
        raise Refusal(
            f"a corpus of texts needs a model that reads input_ids; {type(model).__name__} reads {read}; "
            + ("give images, or a model of texts" if read == PIXELS else "give a model of texts")
        )


def fed_texts(model: nn.Module, tokenizer: Any, *, stacks: Stacks, device: torch.device) -> Fed:
    """An encoder–decoder model's encoder alone, or all of it with the same tokens for its decoder; else the model.

    Examined on ids of the tokenizer, where the model itself does not say how many there are.
    """
    from extract.measurement import measured_part

    both = stacks == "all" and getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    inputs = ("input_ids", "decoder_input_ids") if both else TEXT
    given = [*inputs, *(MASK_OF[name] for name in inputs)]
    part = measured_part(model, dict.fromkeys(given))
    probe = _of_any_tokens(inputs, max(tokenizer.get_vocab().values(), default=0))
    probe = {name: tensor.to(device) for name, tensor in probe.items()}
    layout = _layout_of_texts(part, probe)
    special = special_tokens(tokenizer)
    typed = special.types is not None and takes(part, TYPES)
    if typed:
        _refuse_types_beyond(part, special)
    padding = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    matters = _padding_matters(part, probe, padding)
    return Fed(part, inputs, layout, special=special if typed else None, padding_matters=matters)


def _padding_matters(model: nn.Module, inputs: Mapping[str, torch.Tensor], padding: int) -> bool:
    """Whether padding behind texts changes what the model gives of their own tokens, as convolutions over tokens do."""
    real = next(iter(inputs.values())).shape[1] * 2 // 3
    masks = MASK_OF.values()
    padded = {name: x.clone() for name, x in inputs.items()}
    for name, x in padded.items():
        x[:, real:] = 0 if name in masks else padding
    apart = {name: x[:, :real] for name, x in inputs.items()}
    batch = next(iter(inputs.values())).shape[0]
    try:
        alone, among = (
            first_tensor(trace_of(model, given, batch=batch, events=False).returned) for given in (apart, padded)
        )
    except Exception:  # whatever the model's code meets with at padding, it gets none
        return True
    if alone is None or among is None or alone.dim() != 3 or alone.shape[1] != real or among.shape[1] <= real:
        return False  # no state for each token to compare
    rounding = max(1e-3, 8 * torch.finfo(alone.dtype).eps)
    difference = (among[:, :real].double() - alone.double()).norm(dim=-1)
    return bool((difference > rounding * alone.double().norm(dim=-1)).any())


def _refuse_types_beyond(model: nn.Module, special: SpecialTokens) -> None:
    """A tokenizer's token types are rows of the model's table of them, where it has one."""
    tables = (m for n, m in model.named_modules() if n.rpartition(".")[2] == "token_type_embeddings")
    rows = min((t.num_embeddings for t in tables if isinstance(t, torch.nn.Embedding)), default=None)
    largest = int(special.types_of(special.count + 1).max())
    if rows is not None and largest >= rows:
        raise Refusal(
            f"token types are rows of the model's table of them; {type(model).__name__} has {rows}, and its tokenizer gives "
            f"type {largest}; use the tokenizer that belongs to the model"
        )


def _layout_of_texts(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Layout:
    """The layout by ids alone. Raises Refusal for a model that needs more, such as images beside its text."""
    from extract.measurement import layout_of

    try:
        return layout_of(model, inputs)
    except (Refusal, CaptureError):
        raise
    except Exception as error:
        said = None if is_out_of_memory(error) else _own_error(model, inputs)
        if said is None:
            raise
        raise Refusal(
            f"a run gives a model of texts {' and '.join(name for name in inputs if name in PROBED)} alone; "
            f"{type(model).__name__} fails with nothing else ({said}); save the part of it that reads text by itself, or "
            "give extract.measure all of its inputs"
        ) from error


def _own_error(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> str | None:
    """What the model itself says of these inputs; None if it takes them."""
    try:
        with torch.inference_mode():
            model(**inputs)
    except Exception as error:  # whatever its code meets with
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _of_any_tokens(inputs: Sequence[str], largest_id: int) -> dict[str, torch.Tensor]:
    """A few ids for each input, without padding."""
    ids = {name: random_ids(largest_id + 1, PROBED[name]) for name in inputs}
    return ids | {MASK_OF[name]: torch.ones_like(of_input) for name, of_input in ids.items()}


def fed_images(model: nn.Module, processor: Any, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Fed:
    """The part of a model that sees, examined on an image of noise as its preprocessor makes it. Raises Refusal."""
    from extract.capture.grid import sight_of
    from extract.measurement import grids_of, measured_part

    seeing = _part_that_sees(model)
    assert seeing is not None, "refused before"
    part = measured_part(seeing, {PIXELS: None})
    pixels = _of_noise(processor)
    inputs = {PIXELS: torch.from_numpy(np.stack([pixels, pixels[:, ::-1].copy()])).to(device, dtype)}
    layout = _layout_for(part, inputs)
    sight = sight_of(part, layout, inputs)
    if sight is None:
        raise Refusal(
            f"a run counts the tokens that an image becomes; {type(part).__name__} does not show them before its first "
            "attention layer; measure it with extract.measure"
        )
    special = 0 if sight.grid is None else sight.tokens - sight.grid.patches
    eye = Eye(processor, pixels.shape, sight.tokens, special)
    return Fed(part, (PIXELS,), layout, Images(folder, eye, grids_of(part, layout, inputs)))


def _of_noise(processor: Any) -> Float[np.ndarray, "channel row column"]:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    return pixels_of(processor, Image.fromarray(noise))


def _layout_for(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Layout:
    from extract.measurement import layout_of

    try:
        return layout_of(model, inputs)
    except (Refusal, CaptureError):
        raise
    except (ValueError, RuntimeError) as error:
        said = first_line(error)
        raise Refusal(
            f"a model takes the pixels that its own preprocessor makes; {type(model).__name__} does not take "
            f"{list(inputs[PIXELS].shape[1:])} ({said}); use the preprocessor_config.json that belongs to it"
        ) from error


def _part_that_sees(model: nn.Module) -> nn.Module | None:
    """The outermost part whose main input is pixels: the model itself, or a tower of it."""
    if not hasattr(model, "config") and takes(model, PIXELS):  # a module of the user's own
        return model
    parts = (m for m in model.modules() if getattr(m, "config", None) is not None)
    return next((m for m in parts if getattr(m, "main_input_name", None) == PIXELS), None)


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward names this input."""
    return name in inspect.signature(model.forward).parameters
