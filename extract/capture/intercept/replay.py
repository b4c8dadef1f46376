"""Capture attention whose pattern the model never computes as a matrix: over blocks, by hashing, for a sample of keys.

Contexts are linear in the values, wherever the weights come from. So the module is replayed with one-hot vectors for values.
Its contexts are then the weights, each in the channel of its key: as many keys per replay as a head is wide, and more if no
query sees two keys that share a channel. Each replay draws the same random numbers. The cost is one run of the module per
replay and one layer's pattern in memory, so this method is tried last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attlas.extract.capture.intercept.recorded_call import Change, RecordedCall
from attlas.extract.capture.intercept.request import interception_disabled
from attlas.extract.capture.layout import ReplaySpec
from attlas.extract.engines.visibility import Axis
from attlas.extract.errors import CaptureError

# up to this many blocks of keys, finding out which queries see which blocks costs more replays than it saves
_FEW_BLOCKS = 4


class ReplayedModules:
    """Records each call of a module to be replayed, and passes it to `receive` when the module returns."""

    def __init__(self, receive: Callable[[RecordedCall], None]) -> None:
        self._receive = receive
        self._running: RecordedCall | None = None

    @property
    def is_running(self) -> bool:
        """Whether such a module is running or being replayed: attention calls are then part of its own."""
        return self._running is not None

    @contextmanager
    def hooks(self, model: nn.Module, names: Iterable[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in names:
                module = model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._end).remove)
            yield

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._running = RecordedCall(module, args, kwargs)

    def _end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        assert self._running is not None, "it began"
        with interception_disabled():
            self._receive(self._running)
        self._running = None


class ReplayedAttention(NamedTuple):
    """The attention of a replayed module. States are the tokens and any padding that the module adds by itself.

    `value` is None if a key's value is not the same for all queries.
    """

    pattern: Float[Tensor, "batch head query key"]
    contexts: Float[Tensor, "batch head state head_width"]
    value: Float[Tensor, "batch head key head_width"] | None


def replay_attention(
    call: RecordedCall, spec: ReplaySpec, *, heads: int, axis: Axis | None, name: str
) -> ReplayedAttention:
    """Replay a module to get its pattern over the tokens of an axis, or over all states without one.

    Raises CaptureError if the weights of a real token are not a distribution over tokens.
    """

    def split_heads(states: Tensor) -> Float[Tensor, "batch head state head_width"]:
        return states.unflatten(-1, (heads, -1)).transpose(1, 2)

    contexts = split_heads(_first(call.fill_cache(spec.readers)))
    states, width = contexts.shape[-2:]
    tokens = states if axis is None else axis.tokens

    def weights(channels: Iterable[tuple[range, int]]) -> Float[Tensor, "batch head query head_width"]:
        return split_heads(replay_contexts(call, spec, _one_hot_values(spec, (states, width), channels)))[:, :, :tokens]

    pattern = _pattern(weights, tokens, width)
    _assert_distribution(pattern, axis, name)
    values = [output for submodule in spec.values for output in call.cache[submodule]]
    value = values[0].transpose(0, 1) if spec.token_first else values[0]
    value = split_heads(value)[:, :, :tokens] if len(values) == 1 and value.shape[1] == states else None
    if value is not None and not is_close(pattern @ value, contexts[:, :, :tokens]):
        raise CaptureError(
            f"run again on what it has read, a module must do what it did; the weights and values that {name} shows then "
            "do not make its contexts"
        )
    return ReplayedAttention(pattern, contexts, value)


def replay_contexts(call: RecordedCall, spec: ReplaySpec, change: Change) -> Float[Tensor, "batch token width"]:
    """Replay a module with changed values, and return its contexts with the heads side by side."""
    return _first(call.replay(dict.fromkeys(spec.values, change), spec.readers))


def is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by little more than rounding, relative to the larger of them."""
    a, b = a.float(), b.float()
    tolerance = max(1e-3, 8 * torch.finfo(a.dtype).eps)
    return bool((a - b).norm() <= tolerance * torch.maximum(a.norm(), b.norm()))


def _first(tensors: Sequence[Tensor | None]) -> Tensor:
    contexts = tensors[0]
    assert contexts is not None, "discovery read it"
    return contexts


def _pattern(
    weights: Callable[[Iterable[tuple[range, int]]], Float[Tensor, "batch head query head_width"]],
    tokens: int,
    width: int,
) -> Float[Tensor, "batch head query key"]:
    """Fill the pattern in blocks of as many keys as a head is wide.

    Blocks that no query sees two of share a replay, so a window takes the same number of replays however long the sequence
    is. A few replays first find out which query sees which block.
    """
    blocks = [range(first, min(first + width, tokens)) for first in range(0, tokens, width)]
    groups, sees_block = [[n] for n in range(len(blocks))], None
    if len(blocks) > _FEW_BLOCKS:
        sums = [
            weights((keys, n) for n, keys in enumerate(blocks[first : first + width]))
            for first in range(0, len(blocks), width)
        ]
        sees_block = torch.cat(sums, -1)[..., : len(blocks)] != 0
        groups = _group_blocks(sees_block)
    pattern = None
    for group in groups:
        of_group = weights((range(key, key + 1), channel) for n in group for channel, key in enumerate(blocks[n]))
        pattern = of_group.new_empty(*of_group.shape[:-1], tokens) if pattern is None else pattern
        for n in group:
            of_block = of_group[..., : len(blocks[n])]
            pattern[..., blocks[n].start : blocks[n].stop] = (
                of_block if sees_block is None else of_block.where(sees_block[..., n, None], 0)
            )
    assert pattern is not None, "there are tokens"
    return pattern


def _group_blocks(sees_block: Bool[Tensor, "batch head query block"]) -> list[list[int]]:
    """Group blocks greedily: each joins the first group none of whose blocks is seen by a query that sees it."""
    rows = sees_block.flatten(0, -2).float()
    seen_together = (rows.T @ rows > 0).tolist()
    groups: list[list[int]] = []
    for block, together in enumerate(seen_together):
        group = next((group for group in groups if not any(together[other] for other in group)), None)
        if group is None:
            groups.append([block])
        else:
            group.append(block)
    return groups


def _one_hot_values(spec: ReplaySpec, shape: tuple[int, int], channels: Iterable[tuple[range, int]]) -> Change:
    """Values that are 1 in one channel of every head, given for ranges of keys, and 0 everywhere else."""
    states, width = shape
    of_head = torch.zeros(states, width)
    for keys, channel in channels:
        of_head[keys.start : keys.stop, channel] = 1

    def change(value: Tensor) -> Tensor:
        one_hot = torch.zeros_like(value)
        by_token = one_hot.transpose(0, 1) if spec.token_first else one_hot
        if by_token.dim() == 3 and by_token.shape[1] == states:
            by_token.copy_(of_head.repeat(1, by_token.shape[-1] // width))
        return one_hot

    return change


def _assert_distribution(pattern: Tensor, axis: Axis | None, name: str) -> None:
    tolerance = max(1e-4, 8 * torch.finfo(pattern.dtype).eps)
    sums, least = pattern.sum(-1, dtype=torch.float32), pattern.amin(-1)
    if axis is not None:
        sums, least = (of_rows.transpose(1, 2)[axis.real] for of_rows in (sums, least))
    sees_nothing = sums.abs() <= tolerance
    if bool((least < -tolerance).any()) or not bool((((sums - 1).abs() <= tolerance) | sees_nothing).all()):
        raise CaptureError(
            f"a pattern is weights of tokens that sum to one; {name} looks at something besides the tokens, or weighs them "
            f"otherwise: its rows sum to {float(sums.min()):.4g} to {float(sums.max()):.4g}"
        )
