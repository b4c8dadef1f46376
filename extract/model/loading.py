"""Load a transformers model from safetensors, and check that every weight it computes with is there."""

from __future__ import annotations

import logging
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attlas.extract.capture.configurations import is_language_model
from attlas.extract.errors import Refusal, shortlist

if TYPE_CHECKING:
    from torch import nn

# weights a checkpoint may lack: AutoModel adds poolers to models saved with another head; masks are used in training only
_UNUSED = re.compile(r"(^|\.)(pooler(\.|$)|position_ids$|masked_spec_embed$|mask_token$)")
# weights that were packed to 4 bits take 8 times as much in float32
_DECLARED_PER_STORED, _DECLARED_ALLOWED = 12, 1 << 28
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from: the user's name for it, and the path and options for `from_pretrained`."""

    name: str
    path: str
    local: bool
    options: Mapping[str, Any]
    stored_bytes: int | None = None  # of the weights of a folder that has no say in what code runs


def load_model(source: ModelSource, *, dtype: Any, with_head: bool = False) -> nn.Module:
    """Load the class AutoModel chooses, or the one config.json names if only that fits the weights (T5's encoder).

    `with_head`: a causal language model that was saved with its head is loaded with it.
    Missing weights that no measurement depends on, such as a pooler's, become zero: random ones would give a different
    model each time. Raises Refusal if any other weight is missing or has another shape.
    """
    from transformers import AutoModel

    if source.stored_bytes is not None:
        _refuse_oversized(source, source.stored_bytes)
    if with_head and (language_model := _language_model(source)) is not None:
        model, report = _from_pretrained(language_model, source, dtype)
        if not _mismatch(model, report):
            return model
    model, report = _from_pretrained(AutoModel, source, dtype)
    mismatch = _mismatch(model, report)
    saved_class = _saved_class(model) if mismatch else None
    if saved_class is not None:
        model, report = _from_pretrained(saved_class, source, dtype)
        mismatch = _mismatch(model, report) and mismatch
    if mismatch:
        verb = "copy or save" if source.local else "choose"
        raise Refusal(f"{mismatch}; {verb} the model that config.json describes")
    with torch.no_grad():
        for name in report["missing_keys"]:
            model.get_parameter_or_buffer(name).zero_()  # pyright: ignore
    return model


def _from_pretrained(model_class: Any, source: ModelSource, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """Load the model with SDPA attention, or eager if it has no other; returns it with transformers' loading report."""
    attention, config = "sdpa", {}
    for _ in range(3):
        with _captured_load_report() as messages, _weight_bars_disabled():
            try:
                return model_class.from_pretrained(
                    source.path,
                    attn_implementation=attention,
                    use_safetensors=True,
                    dtype=dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # the report then names the weights
                    **source.options,
                    **config,
                )
            except MemoryError:
                raise
            except Exception as error:
                if "`output_attentions`" in str(error) and not config:
                    config = {"config": _config_without_attentions(source)}
                    continue
                if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                    attention = "eager"
                    continue
                raise _loading_refusal(source, error, messages) from error
    raise AssertionError("the loop returns or raises")


def _refuse_oversized(source: ModelSource, stored: int) -> None:
    """Refuse a configuration whose model is much larger than the stored weights, before memory is taken for it.

    Weights that are missing or of other shapes are allocated and filled before they can be compared.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(source.path, **source.options)
        with torch.device("meta"), no_init_weights():
            model = AutoModel.from_config(config)
    except Exception:  # loading the model itself says what is wrong
        return
    declared = sum(weight.nbytes for weight in model.parameters())
    if declared > max(_DECLARED_PER_STORED * stored, _DECLARED_ALLOWED):
        raise Refusal(
            f"a model's weights are stored in its folder; config.json of {source.name} describes {declared / 1e9:,.1f} GB of them, and "
            f"the safetensors have {stored / 1e9:,.3f} GB; use the configuration that the weights were saved with"
        )


def _config_without_attentions(source: ModelSource) -> Any:
    """The model's configuration with `output_attentions` off: SDPA rejects it, and attlas does not need it."""
    from transformers import AutoConfig

    top = AutoConfig.from_pretrained(source.path, **source.options)
    queue = [top]
    while queue:
        config = queue.pop()
        config.output_attentions = False
        queue += [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    return top


def _saved_class(model: Any) -> Any:
    """The class that config.json says was saved, if AutoModel chose another one."""
    return next((saved for saved in _saved_classes(model.config) if saved is not type(model)), None)


def _language_model(source: ModelSource) -> Any:
    """The class of the causal language model that config.json says was saved; None if it is no such model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.path, **source.options)
    except Exception:  # loading the model itself says what is wrong
        return None
    return next((saved for saved in _saved_classes(config) if is_language_model(saved)), None)


def _saved_classes(config: Any) -> list[Any]:
    import transformers

    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or []]
    return [saved for saved in named if isinstance(saved, type) and issubclass(saved, transformers.PreTrainedModel)]


def _loading_refusal(source: ModelSource, error: Exception, messages: list[str]) -> Refusal:
    """The refusal for a failed load, from transformers' error and the messages it logged."""
    lines = "\n".join(messages).splitlines()
    unconverted = [line.partition(" | ")[0].strip() for line in lines if "| CONVERSION" in line]
    reason = f"its weights {shortlist(sorted(unconverted))} can't be converted" if unconverted else short_message(error)
    if not source.local:
        return Refusal(
            f"a model is demo, a folder or a hub name; {source.name} could not be loaded ({reason}); {_hub_hint()}"
        )
    from transformers import __version__

    remedy = "fix that, or save the model again with save_pretrained"
    if isinstance(error, ImportError):  # quantized weights need a package
        remedy = "install it, or save the model again without quantization"
    return Refusal(
        f"transformers {__version__} must be able to load the model folder; {source.name} fails to load "
        f"({type(error).__name__}: {reason}); {remedy}"
    )


def _hub_hint() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE keeps it from reaching the hub; unset it, or give a folder"
    return "check the name or give a folder"


def _mismatch(model: Any, report: Mapping[str, Any]) -> str | None:
    """The first disagreement between a model and its weights, as text; None if they agree."""
    name = type(model).__name__
    shapes = {key: (saved, expected) for key, saved, expected in report["mismatched_keys"] if not _UNUSED.search(key)}
    if shapes:
        weight, (saved, expected) = min(shapes.items())
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        return (
            f"weights must have the shapes that config.json states; {weight} of {name} should be {list(expected)} and is saved "
            f"as {list(saved)}{more}"
        )
    missing = [key for key in report["missing_keys"] if not _UNUSED.search(key)]
    if missing:
        return f"the safetensors must hold every weight of {name}; {len(missing)} are missing: {shortlist(sorted(missing))}"
    extra = _weights_of_extra_layers(model, report["unexpected_keys"])
    if extra:
        return f"{name} must have every layer in the safetensors; {len(extra)} weights belong to none: {shortlist(sorted(extra))}"
    return None


def _weights_of_extra_layers(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Unexpected weights named like the model's own except for the layer number; those of heads match none."""
    prefix = f"{model.base_model_prefix}."
    names = {_NUMBER.sub("*", name).removeprefix(prefix) for name in model.state_dict()}
    return [key for key in unexpected if _NUMBER.sub("*", key).removeprefix(prefix) in names]


@contextmanager
def _captured_load_report() -> Iterator[list[str]]:
    """Collect what transformers logs while loading, and keep its table of missing weights off the terminal."""
    logger, messages = logging.getLogger("transformers.modeling_utils"), []

    def capture(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return "LOAD REPORT" not in messages[-1]

    logger.addFilter(capture)
    try:
        yield messages
    finally:
        logger.removeFilter(capture)


@contextmanager
def _weight_bars_disabled() -> Iterator[None]:
    """Disable transformers' progress bars for weights, which would break the caller's display; keep those of downloads."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging as bars

    enabled, downloads_enabled = bars.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    bars.disable_progress_bar()  # disables the hub's bars as well
    if downloads_enabled:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            bars.enable_progress_bar()
        if not downloads_enabled:
            hub.disable_progress_bars()


def short_message(error: BaseException) -> str:
    """The first two lines of an error's message as one line of at most 240 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(" ".join(lines[:2]), 240, placeholder=" …")
