"""Find the modules whose attention shows only when they are replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attlas.extract.capture.discovery.trace import Call, Trace, is_causal_mask
from attlas.extract.capture.intercept.recorded_call import Change, RecordedCall, linear_submodules
from attlas.extract.capture.intercept.replay import is_close, replay_attention, replay_contexts
from attlas.extract.capture.layout import ReplaySpec
from attlas.extract.capture.rng import fixed_rng
from attlas.extract.capture.tensors import first_tensor, is_stream
from attlas.extract.engines.visibility import Axis, whole_axis
from attlas.extract.errors import CaptureError

# a module with more linear submodules than this holds several layers
_MOST_LINEAR = 16


class _Replayable(NamedTuple):
    """How to replay a module, and its number of heads."""

    spec: ReplaySpec
    heads: int


def find_replayed_calls(
    model: nn.Module, inputs: Mapping[str, Any], trace: Trace
) -> tuple[list[Call], CaptureError | None]:
    """Return the attention calls that only replay shows, and why one of them is refused, if one is."""
    ids = [x for name, x in inputs.items() if name.endswith("input_ids") and x.dim() == 2]
    search = _Search(trace, {value.shape[1]: whole_axis(len(value), value.shape[1], value.device) for value in ids})
    attending = {name for call in trace.calls for name in call.modules}
    with ExitStack() as stack, torch.inference_mode(), fixed_rng():
        for name, module in model.named_modules():
            if name and name not in attending and 2 <= len(linear_submodules(module)) <= _MOST_LINEAR:
                stack.callback(module.register_forward_pre_hook(search.start_hook, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(search.end_hook(name)).remove)
        model(**inputs)
    return sorted(search.calls, key=lambda call: call.time), search.refusal


@dataclass
class _Search:
    """Replays modules as they end, inner before outer: the innermost module that attends is the one that counts."""

    trace: Trace
    axes: Mapping[int, Axis]  # of the inputs' tokens, by their number
    calls: list[Call] = field(default_factory=list)
    refusal: CaptureError | None = None
    recorded: list[RecordedCall] = field(default_factory=list)  # of the modules that are running
    attending: set[str] = field(default_factory=set)
    by_kind: dict[tuple[type, int, int], _Replayable | None] = field(default_factory=dict)  # by class and size
    counts: dict[str, int] = field(default_factory=dict)

    def start_hook(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.recorded.append(RecordedCall(module, args, kwargs))

    def end_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            recorded = self.recorded.pop()
            number = self.counts[name] = self.counts.get(name, -1) + 1
            states = first_tensor(output)
            holds_attention = any(other.startswith(f"{name}.") for other in self.attending)
            if holds_attention or not is_stream(states) or len(states) != self.trace.batch:
                return
            replayable = self._replayable(module, recorded, states.shape[1])
            if replayable is None:
                return
            self.attending.add(name)
            try:
                self._add(name, number, recorded, replayable, states.shape[1])
            except CaptureError as error:
                self.refusal = self.refusal or error

        return hook

    def _replayable(self, module: nn.Module, recorded: RecordedCall, states: int) -> _Replayable | None:
        """Modules of one class and size are alike, so only the first is examined."""
        kind = (type(module), sum(parameter.numel() for parameter in module.parameters()), states)
        if kind not in self.by_kind:
            try:
                self.by_kind[kind] = _examine(recorded, self.trace.batch)
            except Exception:  # the model's own code, given values that its authors did not think of
                self.by_kind[kind] = None
        return self.by_kind[kind]

    def _axis(self, states: int) -> Axis | None:
        """The axis of the inputs' tokens that these states are, padding that the model adds left out."""
        lengths = [tokens for tokens in self.axes if tokens <= states]
        return self.axes[max(lengths)] if lengths else None

    def _add(self, name: str, number: int, recorded: RecordedCall, replayable: _Replayable, states: int) -> None:
        """Add the call at the time when the module began, so that whatever reads its contexts comes after it."""
        spec, heads = replayable
        pattern, contexts, _ = replay_attention(recorded, spec, heads=heads, axis=self._axis(states), name=name)
        ends = [event.time for event in self.trace.events if event.module == name]
        began, ended = ends[number - 1] if number else 0, ends[number]
        inside = (e.time for e in self.trace.events if e.module.startswith(f"{name}.") and began < e.time <= ended)
        around = [n for n in dict.fromkeys(self.trace.started) if n in ("", name) or name.startswith(f"{n}.")]
        reader = None if spec.reader is None else recorded.module.get_submodule(spec.reader)
        call = Call(
            time=min(inside),
            method="replay",
            modules=tuple(sorted(around, key=len)),
            batch=len(pattern),
            heads=heads,
            queries=pattern.shape[-2],
            keys=pattern.shape[-1],
            contexts=contexts.transpose(1, 2).flatten(2).float(),
            pattern=pattern.double(),
            causal=is_causal_mask(pattern > 0),
            is_cross_attention=False,
            projection=getattr(reader, "weight", None),
            replay=spec,
        )
        self.calls.append(call)


def _examine(recorded: RecordedCall, batch: int) -> _Replayable | None:
    """Find which linear submodules make a module's values, which reads its contexts, and its heads; None if it does not attend.

    The contexts are the first thing that values change. They are linear in the values, and zero without them.
    """
    outputs = {name: tensors[0] for name, tensors in recorded.linear_outputs()[0].items()}
    linear = list(outputs)
    readers = {name: _reader_of_contexts(recorded, outputs[name], name, linear) for name in linear}
    values = tuple(name for name in linear if readers[name] is not None and name not in readers.values())
    of_values = {readers[name] for name in values}
    if len(of_values) != 1:
        return None
    spec = ReplaySpec(values, of_values.pop() or None, token_first=False)
    contexts = replay_contexts(recorded, spec, lambda value: value)
    without_values = replay_contexts(recorded, spec, torch.zeros_like)
    if without_values.abs().max() > 1e-4 * contexts.abs().max():
        return None
    shapes = {tuple(outputs[name].shape) for name in values}
    batch_first = tuple(contexts.shape)
    token_first = (batch_first[1], batch_first[0], batch_first[2])
    if contexts.dim() != 3 or len(contexts) != batch or shapes not in ({batch_first}, {token_first}):
        return None
    spec = spec._replace(token_first=shapes == {token_first} and token_first != batch_first)
    heads = _heads(recorded, spec, batch_first, outputs[values[0]])
    return None if heads is None else _Replayable(spec, heads)


def _reader_of_contexts(recorded: RecordedCall, output: Tensor, name: str, linear: Sequence[str]) -> str | None:
    """The submodule that reads the contexts of these values, "" if the module returns them, None if these are no values."""
    later = linear[linear.index(name) + 1 :]
    generator = torch.Generator(output.device).manual_seed(1)
    a, b = (
        torch.rand(output.shape, dtype=torch.float32, device=output.device, generator=generator).to(output.dtype)
        for _ in range(2)
    )
    results = (recorded.replay({name: _constant(values)}, later) for values in (torch.zeros_like(a), a, b, a + b))
    for reader, of_zero, of_a, of_b, of_both in zip((*later, ""), *results, strict=True):
        if of_zero is None or of_a is None or of_b is None or of_both is None or torch.equal(of_a, of_zero):
            continue
        is_linear = is_close(of_both.float() - of_zero.float(), of_a.float() + of_b.float() - 2 * of_zero.float())
        return reader if is_linear and of_zero.dim() == 3 else None
    return None


def _constant(values: Tensor) -> Change:
    """Replace an output by these values, or by zeros if it has another shape: it is then not one value per token."""
    return lambda output: values.clone() if output.shape == values.shape else torch.zeros_like(output)


def _heads(recorded: RecordedCall, spec: ReplaySpec, shape: tuple[int, ...], output: Tensor) -> int | None:
    """The number of heads: with values that are equal in all channels, contexts are equal in all channels of a head.

    None if no token reads another's value, or if the weights do not depend on the input: that is not attention.
    """
    batch, tokens, width = shape
    by_token = torch.arange(1.0, tokens + 1)[None, :, None].expand(shape)
    values = (by_token.transpose(0, 1) if spec.token_first else by_token).contiguous().to(output)
    contexts = replay_contexts(recorded, spec, _constant(values)).float()
    changed = values.clone()
    (changed[0] if spec.token_first else changed[:, 0]).zero_()
    difference = (replay_contexts(recorded, spec, _constant(changed)).float() - contexts)[:, 1:]
    if tokens > 1 and not bool(difference.any()):
        return None
    # to a few roundings, since patterns of a few tokens, or nearly even ones, differ little between sequences
    tolerance = 64 * torch.finfo(output.dtype).eps
    if batch > 1 and bool((contexts - contexts[:1]).norm() <= tolerance * contexts.norm()):
        return None
    steps = (contexts[..., 1:] - contexts[..., :-1]).abs().amax((0, 1))
    boundaries = (steps > 1e-4 * contexts.abs().amax()).nonzero()
    return width // gcd(width, *(1 + int(n) for n in boundaries))
