"""How many tokens a model and its tokenizer accept at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 1_000_000_000  # transformers uses a larger number for a tokenizer without a maximum length
_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_encoder_position_embeddings")
_TEXT_CONFIGS = ("text_config", "text_encoder", "encoder", "decoder")  # sub-configurations that may state a length
_RELATIVE_NAMES = ("relative_attention_num_buckets", "relative_attention", "alibi")


def max_positions(model: nn.Module) -> int | None:
    """The number of positions the model has; None if nothing limits its length.

    An embedding table with a padding row (RoBERTa) starts counting behind that row. Models with relative positions only
    (T5, DeBERTa, ALiBi) take any length, whatever their configuration states; −1 (XLNet), 0 and None mean no limit too.
    """
    stated = _stated_length(getattr(model, "config", None))
    if stated is None or (_has_relative_positions(model.config) and not _has_position_table(model)):
        return None
    tables = [
        m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1)
        for m in _position_tables(model)
        if m.num_embeddings == stated
    ]
    return min([stated, *tables])


def tokenizer_length(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The tokenizer's maximum length; None if it states none."""
    return _valid_length(tokenizer.model_max_length)


def _stated_length(config: Any) -> int | None:
    """The smallest length stated in the configuration, or else in its sub-configurations for text."""
    lengths = [length for name in _LENGTH_NAMES if (length := _valid_length(getattr(config, name, None))) is not None]
    if lengths or config is None:
        return min(lengths, default=None)
    parts = [getattr(config, name, None) for name in _TEXT_CONFIGS]
    return min((n for p in parts if p is not None and (n := _stated_length(p)) is not None), default=None)


def _valid_length(length: Any) -> int | None:
    valid = isinstance(length, int | float) and not isinstance(length, bool) and 0 < length < NO_LIMIT
    return int(length) if valid else None


def _has_relative_positions(config: Any) -> bool:
    return any(getattr(config, name, None) for name in _RELATIVE_NAMES)


def _has_position_table(model: nn.Module) -> bool:
    return any(True for _ in _position_tables(model))


def _position_tables(model: nn.Module) -> Iterator[nn.Embedding]:
    """Embedding tables of absolute positions."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rsplit(".", 1)[-1]:
            yield module
