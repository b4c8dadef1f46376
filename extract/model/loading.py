"""A transformers model from safetensors, with every weight that it computes with found in them."""

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

from extract.errors import Refusal

if TYPE_CHECKING:
    from torch import nn

# what a checkpoint may lack: AutoModel adds poolers to what was saved with another head; masks are for training
_UNUSED = re.compile(r"(^|\.)(pooler(\.|$)|position_ids$|masked_spec_embed$|mask_token$)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from: how the user named it, and what transformers is given for it."""

    name: str
    path: str
    local: bool
    options: Mapping[str, Any]


def load_model(source: Source, *, dtype: Any) -> nn.Module:
    """AutoModel's class, or the config's own where only that one is in the weights (an encoder of T5 alone).

    Weights that nothing measured depends on, such as a pooler's, are zero where they are missing: random ones would
    make another model of every load. Raises Refusal where any other is missing, or has another shape.
    """
    from transformers import AutoModel

    model, found = _loaded(AutoModel, source, dtype)
    wrong = _wrong(model, found)
    own = _own_class(model) if wrong else None
    if own is not None:
        model, found = _loaded(own, source, dtype)
        wrong = _wrong(model, found) and wrong
    if wrong:
        raise Refusal(f"{wrong}; {'copy or save' if source.local else 'choose'} the model that config.json describes")
    with torch.no_grad():
        for name in found["missing_keys"]:
            model.get_parameter_or_buffer(name).zero_()  # pyright: ignore
    return model


def _unloadable(source: Source, error: Exception, report: list[str]) -> Refusal:
    """The refusal for what transformers said of a model: its error, and the lines of its report that explain it."""
    unmade = [line.partition(" | ")[0].strip() for line in "\n".join(report).splitlines() if "| CONVERSION" in line]
    said = f"of its weights {_some(unmade)} can't be made" if unmade else in_short(error)
    if source.local:
        from transformers import __version__

        remedy = "mend that, or save the model again with save_pretrained"
        if isinstance(error, ImportError):  # of weights that are packed in a way of their own
            remedy = "install it, or save the model again without quantization"
        return Refusal(
            f"a model folder is one that transformers {__version__} loads; {source.name} is not "
            f"({type(error).__name__}: {said}); {remedy}"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    hint = (
        "the hub is switched off by HF_HUB_OFFLINE; unset it, or give a folder"
        if offline
        else "check the name or give a folder"
    )
    return Refusal(f"--model takes demo, a folder or a hub name; {source.name} could not be loaded ({said}); {hint}")


def _loaded(kind: Any, source: Source, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """(model, what was found) with SDPA attention, or eager where the model has no other."""
    attention, given = "sdpa", {}
    for _ in range(3):
        with _its_report() as report, _without_bars():
            try:
                return kind.from_pretrained(
                    source.path,
                    attn_implementation=attention,
                    use_safetensors=True,
                    dtype=dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # so that they are known by name
                    **source.options,
                    **given,
                )
            except MemoryError:
                raise
            except Exception as error:
                if "`output_attentions`" in str(error) and not given:
                    given = {"config": _without_patterns(source)}
                    continue
                if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                    attention = "eager"
                    continue
                raise _unloadable(source, error, report) from error
    raise AssertionError("the loop returns or raises")


def _without_patterns(source: Source) -> Any:
    """The model's configuration, asking for no patterns: they are seen all the same, and SDPA attention gives none."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.path, **source.options)
    waiting = [config]
    while waiting:
        one = waiting.pop()
        one.output_attentions = False
        waiting += [part for name in one.sub_configs if (part := getattr(one, name, None)) is not None]
    return config


def _own_class(model: Any) -> Any:
    """The class that config.json names as the one that was saved, where AutoModel has chosen another."""
    import transformers

    for name in getattr(model.config, "architectures", None) or []:
        own = getattr(transformers, name, None)
        if isinstance(own, type) and issubclass(own, transformers.PreTrainedModel) and own is not type(model):
            return own
    return None


def _wrong(model: Any, found: Mapping[str, Any]) -> str | None:
    """What does not agree between a model and its weights, in words; None where all does."""
    kind = type(model).__name__
    shapes = {k: (theirs, ours) for k, theirs, ours in found["mismatched_keys"] if not _UNUSED.search(k)}
    if shapes:
        name, (theirs, ours) = min(shapes.items())
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        return (
            f"weights have the shapes that config.json says; in {kind} {name} is {list(ours)}, "
            f"in the weights {list(theirs)}{more}"
        )
    missing = [k for k in found["missing_keys"] if not _UNUSED.search(k)]
    if missing:
        return f"every weight of {kind} must be in the safetensors; {len(missing)} are missing: {_some(missing)}"
    beyond = _layers_beyond(model, found["unexpected_keys"])
    if beyond:
        return f"every layer in the safetensors must have its place in {kind}; {len(beyond)} weights have none: {_some(beyond)}"
    return None


def _layers_beyond(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Weights that are like some of the model's but for a layer's number; those of heads are like none."""
    prefix = f"{model.base_model_prefix}."
    own = {_NUMBER.sub("*", name).removeprefix(prefix) for name in model.state_dict()}
    return [k for k in unexpected if _NUMBER.sub("*", k).removeprefix(prefix) in own]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - _SHOWN
    return ", ".join(ordered[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _its_report() -> Iterator[list[str]]:
    """transformers logs a table of each weight that is not where it looked; it is kept here and judged instead."""
    logger, kept = logging.getLogger("transformers.modeling_utils"), []

    def keep(record: logging.LogRecord) -> bool:
        kept.append(record.getMessage())
        return "LOAD REPORT" not in kept[-1]

    logger.addFilter(keep)
    try:
        yield kept
    finally:
        logger.removeFilter(keep)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' bars for reading weights run through the caller's own display; those of downloads are wanted."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging as bars

    shown, downloads_shown = bars.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    bars.disable_progress_bar()  # the hub's too
    if downloads_shown:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
        if not downloads_shown:
            hub.disable_progress_bars()


def in_short(error: BaseException) -> str:
    """What an error says, in one line and not more than a few."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(" ".join(lines[:2]), 240, placeholder=" …")
