"""How many tokens a model and its tokenizer take at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 1_000_000_000  # transformers says a larger number where a tokenizer states no length
_STATED = ("max_position_embeddings", "n_positions", "max_encoder_position_embeddings")
_PARTS = ("text_config", "text_encoder", "encoder", "decoder")  # of a configuration, that may state it instead
_OF_DISTANCE = ("relative_attention_num_buckets", "relative_attention", "alibi")


def max_positions(model: nn.Module) -> int | None:
    """How many tokens the model's positions reach; None where nothing sets a limit.

    A table with a padding row (RoBERTa) numbers its positions from behind that row. What knows distances alone (T5, DeBERTa,
    ALiBi) takes any length, whatever its configuration says; −1 (XLNet), 0 and None say the same.
    """
    stated = _stated(getattr(model, "config", None))
    if stated is None or (_is_of_distance(model.config) and not _has_table(model)):
        return None
    tables = [
        m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1)
        for m in _tables(model)
        if m.num_embeddings == stated
    ]
    return min([stated, *tables])


def tokenizer_length(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The length that a tokenizer states; None where it states none."""
    return _sane(tokenizer.model_max_length)


def _stated(config: Any) -> int | None:
    """The least of what the configuration, or else its parts for texts, says."""
    own = [length for name in _STATED if (length := _sane(getattr(config, name, None))) is not None]
    if own or config is None:
        return min(own, default=None)
    parts = [getattr(config, name, None) for name in _PARTS]
    return min((n for p in parts if p is not None and (n := _stated(p)) is not None), default=None)


def _sane(length: Any) -> int | None:
    whole = isinstance(length, int | float) and not isinstance(length, bool) and 0 < length < NO_LIMIT
    return int(length) if whole else None


def _is_of_distance(config: Any) -> bool:
    return any(getattr(config, name, None) for name in _OF_DISTANCE)


def _has_table(model: nn.Module) -> bool:
    return any(True for _ in _tables(model))


def _tables(model: nn.Module) -> Iterator[nn.Embedding]:
    """Tables of absolute positions."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rsplit(".", 1)[-1]:
            yield module
