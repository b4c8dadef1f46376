"""Dense patterns from models that return theirs in blocks or for a sample of queries.

Written from the documentation of each model's `attentions` in transformers, independently of how they are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def dense_pattern(pattern: Tensor, config: Any, tokens: int, sampled: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """A pattern as [batch, head, query, key] from a model-specific layout; other patterns are returned unchanged.

    `sampled` are softmaxes [batch · head, query, key] with their queries [batch · head, query].
    """
    window = getattr(config, "attention_window", None)
    if window is not None and pattern.shape[-1] == window[0] + 1:
        return _from_windows(pattern)
    if getattr(config, "local_radius", None) is not None and pattern.dim() == 5:
        return _from_blocks(pattern, tokens)
    for prefix in ("", "conf_"):
        size, past = (getattr(config, f"{prefix}attention_{n}", None) for n in ("chunk_size", "context_left"))
        if isinstance(size, int) and isinstance(past, int) and pattern.dim() == 5 and pattern.shape[3] == size:
            return _from_chunks(pattern, past - 1)
    for softmax, queries in sampled if hasattr(config, "sampling_factor") else ():
        if softmax.numel() == pattern.numel() and torch.equal(softmax.reshape(pattern.shape), pattern):
            return _from_sample(pattern, queries.view(pattern.shape[:-1]))
    return pattern


def _from_windows(pattern: Tensor) -> Tensor:
    """Longformer without global tokens: entry k of query i belongs to key i − window / 2 + k."""
    batch, heads, tokens, width = pattern.shape
    dense = pattern.new_zeros(batch, heads, tokens, tokens)
    for i in range(tokens):
        for k in range(width):
            j = i - width // 2 + k
            if 0 <= j < tokens:
                dense[..., i, j] = pattern[..., i, k]
    return dense


def _from_blocks(pattern: Tensor, tokens: int) -> Tensor:
    """LongT5: [batch, block, head, query in the block, key in it and its two neighbours]."""
    batch, blocks, heads, size, _ = pattern.shape
    dense = pattern.new_zeros(batch, heads, tokens, tokens)
    for block in range(blocks):
        for query in range(size):
            for key in range(3 * size):
                i, j = block * size + query, (block - 1) * size + key
                if i < tokens and 0 <= j < tokens:
                    dense[:, :, i, j] = pattern[:, block, :, query, key]
    return dense


def _from_chunks(pattern: Tensor, past: int) -> Tensor:
    """Gemma's audio tower: [batch, head, chunk, query in the chunk, key], with keys from `past` before the chunk on."""
    batch, heads, chunks, size, width = pattern.shape
    tokens = chunks * size
    dense = pattern.new_zeros(batch, heads, tokens, tokens)
    for chunk in range(chunks):
        for query in range(size):
            for key in range(width):
                i, j = chunk * size + query, chunk * size + key - past
                if 0 <= j < tokens:
                    dense[:, :, i, j] = pattern[:, :, chunk, query, key]
    return dense


def _from_sample(pattern: Tensor, queries: Tensor) -> Tensor:
    """Informer: sampled queries have the pattern of the softmax, all others a uniform one."""
    keys = pattern.shape[-1]
    dense = pattern.new_full((*pattern.shape[:-2], keys, keys), 1 / keys)
    return dense.scatter(-2, queries[..., None].expand_as(pattern), pattern)
