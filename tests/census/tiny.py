"""Any architecture of transformers as a tiny seeded model with inputs, built from its configuration alone.

`python -m tests.census.tiny [model_type ...]` prints for each whether it builds, runs and returns patterns.
"""

import importlib
import importlib.util
import inspect
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from tests.census.pool import PATIENCE, map_in_processes
from tests.census.shrink import shrink_config

Modality = Literal["text", "vision", "audio", "multimodal"]
MAX_PARAMETERS = 3_000_000
GAIN = 1.5
VISION = ("pixel", "image", "video", "visual", "grid_thw", "patch")
AUDIO = ("input_values", "input_features", "audio", "speech", "spectro", "waveform")


@dataclass(frozen=True)
class TinyModel:
    """A model in eval mode, float32, and a batch of two for its forward pass."""

    model_type: str
    modality: Modality
    model: nn.Module
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class NotBuilt:
    """An architecture without a tiny model, and the reason in one line."""

    model_type: str
    modality: Modality
    reason: str


def architectures() -> dict[str, Modality]:
    """The modality of every `model_type` that AutoModel maps."""
    return {model_type: modality(model_type) for model_type in MODEL_MAPPING_NAMES}


def config_of(model_type: str) -> PreTrainedConfig:
    """The shrunk configuration."""
    return shrink_config(model_type, _merged_table("EXCEPTIONS"), _merged_table("SIZES"))


def build(model_type: str, *, attention: str | None = None, gain: float = GAIN) -> TinyModel | NotBuilt:
    """The tiny model and its inputs; `attention` is transformers' `attn_implementation`, None its default."""
    kind = modality(model_type)
    try:
        torch.manual_seed(0)
        model = _model(config_of(model_type), attention)
        randomise(model, gain)
        torch.manual_seed(1)
        return TinyModel(model_type, kind, model, _inputs(kind, model_type, model))
    except Exception as error:
        return NotBuilt(model_type, kind, reason_of(error))


def forward(built: TinyModel, **options: Any) -> Any:
    """The model's output for its inputs, without a cache if that is possible."""
    if "use_cache" in forward_parameters(type(built.model)):
        options = {"use_cache": False, **options}
    with torch.no_grad():
        return built.model(**built.inputs, **options)


def modality(model_type: str) -> Modality:
    """The modality of an architecture, from the parameters of its forward pass; time series count as text."""
    try:
        model = model_class(model_type)
        names = forward_parameters(model)
    except Exception:  # the class, or a package that it needs, is missing
        return (
            "audio"
            if {"sampling_rate", "sample_rate"} & set(CONFIG_MAPPING[model_type].default_config_fields())
            else "text"
        )
    text = "input_ids" in names or "decoder_input_ids" in names
    vision = any(name.startswith(VISION) for name in names)
    audio = any(name.startswith(AUDIO) for name in names)
    if text + vision + audio > 1:
        return "multimodal"
    if not (text or vision or audio):  # it takes hidden states: use what the class declares
        vision = bool({"image", "video"} & set(_as_list(model.input_modalities)))
        audio = "audio" in model.input_modalities or model.main_input_name.startswith(AUDIO)
    return "vision" if vision else "audio" if audio else "text"


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def model_class(model_type: str) -> Any:
    """AutoModel's class for a `model_type`; the first if there are several."""
    model = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    return model[0] if isinstance(model, (tuple, list)) else model


@cache
def forward_parameters(model: type[nn.Module]) -> tuple[str, ...]:
    """The parameter names of a model's forward pass."""
    return tuple(inspect.signature(model.forward).parameters)


# location of packages on this machine
_FOLDER = re.compile(r"/\S*?/site-packages/")


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    message = " ".join(_FOLDER.sub("", str(error)).split())
    return f"{type(error).__name__}: {message[:200]}"


def randomise(model: nn.Module, gain: float) -> None:
    """Replace the weights by random ones, in place, so that no pattern is nearly uniform and no two heads are equal.

    `gain` scales the usual standard deviation of matrices.
    """
    generator = torch.Generator().manual_seed(0)
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                _randomise(parameter, owners[id(parameter)], names[id(parameter)], generator, gain)


def _randomise(p: Tensor, owner: nn.Module, name: str, generator: torch.Generator, gain: float) -> None:
    noise = torch.randn(p.shape, generator=generator)
    if isinstance(owner, nn.Embedding):
        p.copy_(noise)
    elif p.ndim >= 2:
        p.copy_(noise * gain / math.sqrt(_fan_in(p, owner)))
    elif p.ndim == 1:
        # around the initial value: one for scales, or zero if the model adds the one itself; others for decay rates
        start = torch.where(p.isfinite() & (p.abs() < 100), p, 0.0)
        p.copy_(start + noise * {"bias": 0.1, "weight": 0.2}.get(name, 0.5))


def _fan_in(p: Tensor, owner: nn.Module) -> int:
    if isinstance(owner, Conv1D):
        return p.shape[0]
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return p[0].numel()
    return p.shape[-1]


def _model(config: PreTrainedConfig, attention: str | None) -> nn.Module:
    if model_class(config.model_type).forward is nn.Module.forward:
        raise NotImplementedError("the class has no forward pass of its own")
    options: dict[str, Any] = {"dtype": torch.float32}
    if attention is not None:
        options["attn_implementation"] = attention
    if (size := _parameters(config, options)) > MAX_PARAMETERS:
        raise ValueError(f"too large: {size:,} parameters")
    model = AutoModel.from_config(config, **options).eval().float()
    if (size := sum(p.numel() for p in model.parameters())) > MAX_PARAMETERS:
        raise ValueError(f"too large: {size:,} parameters")
    return model


def _parameters(config: PreTrainedConfig, options: dict[str, Any]) -> int:
    """The number of parameters, without allocating them; 0 if the model cannot be built on the meta device."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModel.from_config(config, **options).parameters())
    except Exception:
        return 0


def _inputs(kind: Modality, model_type: str, model: nn.Module) -> dict[str, Tensor]:
    """The inputs from the module of the modality: `inputs` in text.py, vision.py, audio.py or multimodal.py."""
    return importlib.import_module(f"tests.census.{kind}").inputs(model_type, model)


@cache
def _merged_table(table: str) -> dict[str, Any]:
    """A table merged from the four modules: EXCEPTIONS by model_type, or SIZES by field name."""
    merged: dict[str, Any] = {}
    for kind in ("text", "vision", "audio", "multimodal"):
        if importlib.util.find_spec(f"tests.census.{kind}"):
            merged |= getattr(importlib.import_module(f"tests.census.{kind}"), table, {})
    return merged


def main(model_types: list[str]) -> None:
    """Print a line per architecture, of all or of the given ones or modalities."""
    modalities = architectures()
    wanted = [t for t in modalities if not model_types or t in model_types or modalities[t] in model_types]
    counts: Counter[str] = Counter()
    for model_type, found in map_in_processes(_line, wanted):
        line = found or f"{model_type}\t{modalities[model_type]}\tnot built\tdied, or took more than {PATIENCE} s"
        print(line, flush=True)
        counts[line.split("\t")[2]] += 1
    print(dict(counts))


def _line(model_type: str) -> str:
    built = build(model_type)
    if isinstance(built, NotBuilt):
        return "\t".join([model_type, built.modality, "not built", built.reason])
    default = cast(Any, built.model).config._attn_implementation
    head = [model_type, built.modality]
    try:
        if not is_finite(forward(built)):
            return "\t".join([*head, "not finite", default, ""])
    except Exception as error:
        return "\t".join([*head, "forward fails", default, reason_of(error)])
    return "\t".join([*head, "runs", default, describe_patterns(model_type)])


def is_finite(output: Any) -> bool:
    """Whether all numbers that a forward pass returned are finite."""
    if isinstance(output, Tensor):
        return bool(output.isfinite().all())
    if isinstance(output, Mapping):
        return all(is_finite(value) for value in output.values())
    return not isinstance(output, (tuple, list)) or all(is_finite(value) for value in output)


def describe_patterns(model_type: str) -> str:
    """Number and shapes of the tensors that eager attention returns with `output_attentions`, by field."""
    built = build(model_type, attention="eager")
    if isinstance(built, NotBuilt):
        return f"no eager: {built.reason}"
    try:
        output = forward(built, output_attentions=True)
    except Exception as error:
        return f"no eager: {reason_of(error)}"
    return "; ".join(f"{name} {_shapes(value)}" for name, value in _patterns(output)) or "no patterns"


def _patterns(output: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    """The `attentions` fields of an output and of the outputs of its towers."""
    for name, value in output.items():
        if isinstance(value, dict):
            yield from _patterns(value, f"{within}{name}.")
        elif name.endswith("attentions") and value is not None and len(value):
            yield f"{within}{name}", value


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        value = [value]
    counts = Counter(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in value)
    return " ".join(f"{count}x{shape}" for shape, count in counts.items())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    main(sys.argv[1:])
