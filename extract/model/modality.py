"""Whether a model reads texts or images, and which part of it does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from attlas.extract.capture.discovery.patch_layout import PIXELS
from attlas.extract.errors import Refusal

Modality = Literal["texts", "images"]
# main inputs of models that read no text
_OTHER_INPUTS = (PIXELS, "pixel_values_videos", "input_features", "input_values")


def accepts_input(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters


def vision_part(model: nn.Module) -> nn.Module | None:
    """The outermost module whose main input is pixels: the model itself, or its vision tower."""
    if not hasattr(model, "config") and accepts_input(model, PIXELS):  # a user's own module
        return model
    parts = (m for m in model.modules() if getattr(m, "config", None) is not None)
    return next((m for m in parts if getattr(m, "main_input_name", None) == PIXELS), None)


def measured_part(model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    """The encoder of an encoder–decoder model that is given no inputs for its decoder, or else the model."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return model
    encoder: Any = model.get_encoder()  # pyright: ignore
    parameters = inspect.signature(encoder.forward).parameters if isinstance(encoder, nn.Module) else {}
    return encoder if set(inputs) <= set(parameters) else model


def refuse_wrong_modality(model: nn.Module, modality: Modality) -> None:
    """Raise Refusal if the corpus holds images and the model does not read images, or the other way round."""
    main_input = getattr(model, "main_input_name", "input_ids")
    if modality == "images" and vision_part(model) is None:
        raise Refusal(
            f"an image needs a model that reads {PIXELS}; {type(model).__name__} reads {main_input}; "
            "use texts, or a vision model"
        )
    if modality == "texts" and main_input in _OTHER_INPUTS:
        raise Refusal(
            f"a text needs a model that reads input_ids; {type(model).__name__} reads {main_input}; "
            + ("use images, or a text model" if main_input == PIXELS else "use a text model")
        )
