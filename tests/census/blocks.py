"""Own patterns that a model gives over blocks or for a sample of its queries, put at the places of queries and keys.

Written from what transformers documents of each model's `attentions`, and knowing nothing of how they are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def in_places(pattern: Tensor, config: Any, tokens: int, sampled: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """[batch, head, query, key] of a pattern in a layout of its model's own; any other is given as it is.

    `sampled` are softmaxes [batch · head, query, key] with the queries [batch · head, query] that they were of.
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
    """Longformer without global tokens: entry k of query i is of key i − window / 2 + k."""
    batch, heads, tokens, width = pattern.shape
    whole = pattern.new_zeros(batch, heads, tokens, tokens)
    for i in range(tokens):
        for k in range(width):
            j = i - width // 2 + k
            if 0 <= j < tokens:
                whole[..., i, j] = pattern[..., i, k]
    return whole


def _from_blocks(pattern: Tensor, tokens: int) -> Tensor:
    """LongT5: [batch, block, head, query in the block, key in it and its two neighbours]."""
    batch, blocks, heads, size, _ = pattern.shape
    whole = pattern.new_zeros(batch, heads, tokens, tokens)
    for block in range(blocks):
        for query in range(size):
            for key in range(3 * size):
                i, j = block * size + query, (block - 1) * size + key
                if i < tokens and 0 <= j < tokens:
                    whole[:, :, i, j] = pattern[:, block, :, query, key]
    return whole


def _from_chunks(pattern: Tensor, past: int) -> Tensor:
    """Gemma's audio: [batch, head, chunk, query in the chunk, key from so many before it on]."""
    batch, heads, chunks, size, width = pattern.shape
    tokens = chunks * size
    whole = pattern.new_zeros(batch, heads, tokens, tokens)
    for chunk in range(chunks):
        for query in range(size):
            for key in range(width):
                i, j = chunk * size + query, chunk * size + key - past
                if 0 <= j < tokens:
                    whole[:, :, i, j] = pattern[:, :, chunk, query, key]
    return whole


def _from_sample(pattern: Tensor, queries: Tensor) -> Tensor:
    """Informer: the queries that were drawn look as the softmax says, all others at every key alike."""
    keys = pattern.shape[-1]
    whole = pattern.new_full((*pattern.shape[:-2], keys, keys), 1 / keys)
    return whole.scatter(-2, queries[..., None].expand_as(pattern), pattern)
