"""The transformers configurations of a model, and the attention implementation they select."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def configurations(model: nn.Module) -> list[Any]:
    """Return every transformers configuration that a module of the model holds; empty for other models."""
    configs: dict[int, Any] = {}
    queue = [getattr(module, "config", None) for module in model.modules()]
    while queue:
        config = queue.pop()
        if config is None or id(config) in configs or not hasattr(config, "_attn_implementation_internal"):
            continue
        configs[id(config)] = config
        queue += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(configs.values())


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Make the model's configurations select this attention implementation, and restore theirs afterwards."""
    before = [(config, config._attn_implementation_internal) for config in configurations(model)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def is_language_model(model_class: type) -> bool:
    """Whether models of a class of transformers are causal language models with their head."""
    return model_class.__name__.endswith(("ForCausalLM", "LMHeadModel"))
