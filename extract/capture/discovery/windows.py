"""Attention over windows or images of a sequence: several calls in a row, or several rows of one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from attlas.extract.capture.discovery.call_filters import split_ignored_calls
from attlas.extract.capture.discovery.module_tree import owner_of
from attlas.extract.capture.discovery.trace import LARGEST_PATTERN, Call, CallInputs, Trace, approx_equal, trace_of
from attlas.extract.errors import CaptureError


def join_windows(model: nn.Module, trace: Trace) -> Trace:
    """Join the calls that a module makes one after the other for the windows or images of its input."""
    calls: list[Call] = []
    for _, group in groupby(trace.calls, key=lambda call: _invocation(model, call)):
        windows = list(group)
        first, total = windows[0], sum(call.queries for call in windows)
        kinds = {(call.method, call.batch, call.heads, call.keys - call.queries) for call in windows}
        if len(windows) == 1 or kinds != {(first.method, 1, first.heads, 0)} or total != _rows_read(model, first):
            calls += windows
            continue
        contexts = torch.cat([call.contexts for call in windows], 1)
        calls.append(
            replace(
                first,
                queries=total,
                keys=total,
                contexts=contexts,
                pattern=_block_diagonal(windows),
                inputs=_join_inputs([call.inputs for call in windows]),
            )
        )
    return replace(trace, calls=calls)


def may_be_in_pieces(model: nn.Module, trace: Trace, call: Call) -> bool:
    """Whether a module may make several calls on other inputs: here it makes one, over all rows of its input."""
    is_whole = call.batch == 1 and call.queries == call.keys == _rows_read(model, call) and not call.is_cross_attention
    invocation = _invocation(model, call)
    return is_whole and sum(_invocation(model, other) == invocation for other in trace.calls) == 1


def batch_last_calls(model: nn.Module, inputs: Mapping[str, Any], trace: Trace) -> set[int]:
    """Return the calls whose rows are the first window of every sequence, then the second of every sequence, and so on.

    Found by changing the order of the sequences. Raises CaptureError if windows are in neither this order nor by sequence.
    """
    numbers = [n for n, call in enumerate(trace.calls) if call.batch != trace.batch and call.batch % trace.batch == 0]
    if trace.batch == 1 or not numbers:
        return set()
    contexts_by_call = _contexts_of_rolled(model, inputs, trace, numbers)
    batch_last = set()
    for number, (contexts, rolled) in contexts_by_call.items():
        if approx_equal(contexts.unflatten(0, (trace.batch, -1)).roll(1, 0), rolled):
            continue
        if not approx_equal(contexts.unflatten(0, (-1, trace.batch)).roll(1, 1), rolled):
            raise CaptureError(
                f"windows of a sequence stand together in a batch, or the first of each first; those of "
                f"{owner_of(model, trace.calls[number])} of {type(model).__name__} do neither"
            )
        batch_last.add(number)
    return batch_last


def _contexts_of_rolled(
    model: nn.Module, inputs: Mapping[str, Any], trace: Trace, numbers: Sequence[int]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """The contexts of these calls, and those of the same calls with the sequences in another order."""
    rolled_inputs = {
        name: x.roll(1, 0) if isinstance(x, torch.Tensor) and x.dim() and len(x) == trace.batch else x
        for name, x in inputs.items()
    }
    interface = any(call.method == "interface" for call in trace.calls)
    rolled = trace_of(model, rolled_inputs, batch=trace.batch, interface=interface, events=False)
    rolled = join_windows(model, split_ignored_calls(rolled, inputs)[0])
    before, after = _by_module(model, trace.calls), _by_module(model, rolled.calls)
    contexts = {}
    for number in numbers:
        call = trace.calls[number]
        owner = owner_of(model, call)
        calls, rolled_calls = before.get(owner, []), after.get(owner, [])
        if len(calls) != len(rolled_calls):
            raise CaptureError(
                f"a model does the same every time; {owner} of {type(model).__name__} attended {len(calls)} times, then "
                f"{len(rolled_calls)}"
            )
        same_call = next(other for each, other in zip(calls, rolled_calls, strict=True) if each is call)
        contexts[number] = call.contexts, same_call.contexts
    return contexts


def _by_module(model: nn.Module, calls: Sequence[Call]) -> dict[str, list[Call]]:
    by_module: dict[str, list[Call]] = {}
    for call in calls:
        by_module.setdefault(owner_of(model, call), []).append(call)
    return by_module


def _block_diagonal(windows: Sequence[Call]) -> torch.Tensor | None:
    patterns = [call.pattern for call in windows if call.pattern is not None]
    if len(patterns) < len(windows) or sum(p.shape[-1] for p in patterns) ** 2 * len(patterns[0][0]) > LARGEST_PATTERN:
        return None
    by_head = zip(*(pattern[0] for pattern in patterns), strict=True)
    return torch.stack([torch.block_diag(*of_head) for of_head in by_head])[None]


def _join_inputs(windows: Sequence[CallInputs | None]) -> CallInputs | None:
    """Queries, keys and values of windows as those of one call."""
    if None in windows:
        return None

    def join(name: str) -> Any:
        tensors = [getattr(inputs, name) for inputs in windows]
        return None if any(tensor is None for tensor in tensors) else torch.cat(tensors, 2)

    return CallInputs(join("value"), join("query"), join("key"), windows[0].scale)  # pyright: ignore


def _invocation(model: nn.Module, call: Call) -> tuple[str, int]:
    """The module that makes a call and when it started. A call outside any module is an invocation of its own."""
    owner = owner_of(model, call)
    return (owner, call.started[call.modules.index(owner)]) if owner and call.started else ("", call.time)


def _rows_read(model: nn.Module, call: Call) -> int:
    owner = owner_of(model, call)
    return call.rows_read[call.modules.index(owner)] if owner and call.rows_read else 0
