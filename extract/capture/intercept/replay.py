"""Attention whose pattern the model never makes as a matrix of queries and keys: over blocks, by hashing, for a sample.

Contexts are linear in the values, whatever their weights came from. So the module is run again on what it has read, with
one-hot vectors for values: then its contexts are the weights, each at the place of its key, for as many keys at a time as
a head is wide, and for more where no query sees two that share a place. What it draws at random is drawn again alike.
This costs a run of the module for each of these, and holds one layer's pattern of a batch: it is the last of the ways in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from math import gcd
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attlas.extract.capture.discovery.trace import Call, Trace, fixed_rng, hides_the_future
from attlas.extract.capture.intercept.sdpa import first_tensor, has_matrix, is_stream, read_tensor
from attlas.extract.capture.layout import Replayed
from attlas.extract.engines.visibility import Axis, whole_axis
from attlas.extract.errors import CaptureError

Change = Callable[[Tensor], Tensor]


# linear modules in one that attends; what has more is layers
_MOST_LINEAR = 16
# blocks of keys up to which it is not worth a run to know who sees which
_FEW = 4


class Run:
    """A module's call, which can be made again with other outputs of the modules in it."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the module runs: it may write into what it reads, and what it draws at random has to be known."""
        self.module = module
        self._args = tuple(map(_copied, args))
        self._kwargs = {name: _copied(value) for name, value in kwargs.items()}
        self._devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
        self._drawn = torch.get_rng_state()
        self._drawn_there = [torch.cuda.get_rng_state(device) for device in self._devices]
        self.known: dict[str, list[Tensor]] = {}

    def know(self, reading: Sequence[str]) -> list[Tensor | None]:
        """Run once, so that the linear modules in it need not run again: up to the contexts, nothing that they read changes.

        Gives what `again` gives; what each of them gave is `known` then.
        """
        self.known, given = self.noted(reading)
        return given

    def noted(self, reading: Sequence[str] = ()) -> tuple[dict[str, list[Tensor]], list[Tensor | None]]:
        """Run once: what each of the linear modules in it gives, in the order in which they run, and what `again` gives."""
        found: dict[str, list[Tensor]] = {}

        def note(name: str) -> Change:
            def change(output: Tensor) -> Tensor:
                found.setdefault(name, []).append(output.clone())
                return output

            return change

        given = self.again({name: note(name) for name in _linear(self.module)}, reading)
        return found, given

    def again(self, changes: Mapping[str, Change], reading: Sequence[str] = ()) -> list[Tensor | None]:
        """What these modules in it read (the largest, of several), and last what it gives, with outputs of others changed."""
        read: dict[nn.Module, Tensor] = {}

        def reads(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = read_tensor(args, kwargs)
            if tensor is not None and (module not in read or tensor.numel() > read[module].numel()):
                read[module] = tensor.clone()

        modules = [self.module.get_submodule(name) for name in reading]
        with _hooks_disabled(self.module), ExitStack() as stack, torch.random.fork_rng(self._devices):
            for module in modules:
                stack.callback(module.register_forward_pre_hook(reads, with_kwargs=True).remove)
            for name, outputs in self.known.items():
                stack.enter_context(_answering(self.module.get_submodule(name), outputs))
            for name, change in changes.items():
                stack.callback(self.module.get_submodule(name).register_forward_hook(_changing(change)).remove)
            torch.set_rng_state(self._drawn)
            for device, state in zip(self._devices, self._drawn_there, strict=True):
                torch.cuda.set_rng_state(state, device)
            given = self.module.forward(
                *map(_copied, self._args), **{name: _copied(value) for name, value in self._kwargs.items()}
            )
        return [*(read.get(module) for module in modules), first_tensor(given)]


def _copied(value: Any) -> Any:
    """What a module may write into: tensors, and a cache of keys and values."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return deepcopy(value) if hasattr(value, "get_seq_length") else value


@contextmanager
def _answering(module: nn.Module, outputs: Sequence[Tensor]) -> Iterator[None]:
    """Let a module give these without being run; whoever gets them may write into them."""
    given, before = iter(outputs), module.__dict__.get("forward")
    module.forward = lambda *_, **__: next(given).clone()
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _changing(change: Change) -> Callable[..., Tensor]:
    return lambda _module, _args, output: change(output)


@contextmanager
def _hooks_disabled(module: nn.Module) -> Iterator[None]:
    """Let nobody hear what a module and those in it do."""
    held = [(m, m._forward_hooks, m._forward_pre_hooks) for m in module.modules()]
    try:
        for m, hooks, pre_hooks in held:
            m._forward_hooks, m._forward_pre_hooks = type(hooks)(), type(pre_hooks)()
        yield
    finally:
        for m, hooks, pre_hooks in held:
            m._forward_hooks, m._forward_pre_hooks = hooks, pre_hooks


class ReplayedAttention(NamedTuple):
    """What running a module again has shown of its attention. `states` are the tokens with what the model pads by itself.

    `value` is None where a key's value is not the same for all queries.
    """

    pattern: Float[Tensor, "batch head query key"]
    contexts: Float[Tensor, "batch head state head_width"]
    value: Float[Tensor, "batch head key head_width"] | None


def replay_attention(run: Run, how: Replayed, *, heads: int, axis: Axis | None, name: str) -> ReplayedAttention:
    """A call over the tokens of an axis, what the model itself pads at the end left out; None: over all that it has.

    Raises CaptureError where the weights of a real token are not those of a pattern over tokens.
    """

    def of_heads(states: Tensor) -> Float[Tensor, "batch head state head_width"]:
        return states.unflatten(-1, (heads, -1)).transpose(1, 2)

    contexts = of_heads(_read(run.know(how.reading)))
    states, width = contexts.shape[-2:]
    tokens = states if axis is None else axis.tokens

    def weights(channels: Iterable[tuple[range, int]]) -> Float[Tensor, "batch head query head_width"]:
        return of_heads(_contexts(run, how, _one_hot(how, (states, width), channels)))[:, :, :tokens]

    pattern = _pattern(weights, tokens, width)
    _refuse_what_is_no_pattern(pattern, axis, name)
    values = [value for name in how.values for value in run.known[name]]
    value = values[0].transpose(0, 1) if how.token_first else values[0]
    value = of_heads(value)[:, :, :tokens] if len(values) == 1 and value.shape[1] == states else None
    if value is not None and not _near(pattern @ value, contexts[:, :, :tokens]):
        raise CaptureError(
            f"run again on what it has read, a module must do what it did; the weights and values that {name} shows then "
            "do not make its contexts"
        )
    return ReplayedAttention(pattern, contexts, value)


def _contexts(run: Run, how: Replayed, change: Change) -> Float[Tensor, "batch token width"]:
    """Heads side by side, as they are read by the output projection or given by the module."""
    return _read(run.again(dict.fromkeys(how.values, change), how.reading))


def _read(found: Sequence[Tensor | None]) -> Tensor:
    contexts = found[0]
    assert contexts is not None, "it was there when the module was examined"
    return contexts


def _pattern(
    weights: Callable[[Iterable[tuple[range, int]]], Float[Tensor, "batch head query head_width"]],
    tokens: int,
    width: int,
) -> Float[Tensor, "batch head query key"]:
    """Blocks of as many keys as a head is wide, those at once of which no query sees two.

    So a window takes as many runs as it has blocks, however long the sequence is; a few show first who sees which.
    """
    blocks = [range(first, min(first + width, tokens)) for first in range(0, tokens, width)]
    groups, seen = [[n] for n in range(len(blocks))], None
    if len(blocks) > _FEW:
        sums = [
            weights((keys, n) for n, keys in enumerate(blocks[first : first + width]))
            for first in range(0, len(blocks), width)
        ]
        seen = torch.cat(sums, -1)[..., : len(blocks)] != 0
        groups = _apart(seen)
    pattern = None
    for group in groups:
        found = weights((range(key, key + 1), place) for n in group for place, key in enumerate(blocks[n]))
        pattern = found.new_empty(*found.shape[:-1], tokens) if pattern is None else pattern
        for n in group:
            of_block = found[..., : len(blocks[n])]
            pattern[..., blocks[n].start : blocks[n].stop] = (
                of_block if seen is None else of_block.where(seen[..., n, None], 0)
            )
    assert pattern is not None, "there are tokens"
    return pattern


def _apart(seen: Bool[Tensor, "batch head query block"]) -> list[list[int]]:
    """The blocks in as few groups as come of taking each into the first where no query that sees it sees another."""
    rows = seen.flatten(0, -2).float()
    together = (rows.T @ rows > 0).tolist()
    groups: list[list[int]] = []
    for block, others in enumerate(together):
        group = next((group for group in groups if not any(others[other] for other in group)), None)
        if group is None:
            groups.append([block])
        else:
            group.append(block)
    return groups


def _one_hot(how: Replayed, shape: tuple[int, int], channels: Iterable[tuple[range, int]]) -> Change:
    """Values that are 1 in one entry of every head: the entry that these keys have; of what is no key, zero."""
    states, width = shape
    of_head = torch.zeros(states, width)
    for keys, place in channels:
        of_head[keys.start : keys.stop, place] = 1

    def change(value: Tensor) -> Tensor:
        other = torch.zeros_like(value)
        by_token = other.transpose(0, 1) if how.token_first else other
        if by_token.dim() == 3 and by_token.shape[1] == states:
            by_token.copy_(of_head.repeat(1, by_token.shape[-1] // width))
        return other

    return change


def _refuse_what_is_no_pattern(pattern: Tensor, axis: Axis | None, name: str) -> None:
    near = max(1e-4, 8 * torch.finfo(pattern.dtype).eps)
    rows, least = pattern.sum(-1, dtype=torch.float32), pattern.amin(-1)
    if axis is not None:
        rows, least = (of_rows.transpose(1, 2)[axis.real] for of_rows in (rows, least))
    empty = rows.abs() <= near  # it sees nothing
    if bool((least < -near).any()) or not bool((((rows - 1).abs() <= near) | empty).all()):
        raise CaptureError(
            f"a pattern is weights of tokens that sum to one; {name} looks at something besides the tokens, or weighs them "
            f"otherwise: its rows sum to {float(rows.min()):.4g} to {float(rows.max()):.4g}"
        )


def _near(a: Tensor, b: Tensor) -> bool:
    a, b = a.float(), b.float()
    near = max(1e-3, 8 * torch.finfo(a.dtype).eps)
    return bool((a - b).norm() <= near * torch.maximum(a.norm(), b.norm()))


def find(model: nn.Module, inputs: Mapping[str, Any], trace: Trace) -> tuple[list[Call], CaptureError | None]:
    """Attention calls that no other way saw, and why one that was found is refused, if one is."""
    ids = [x for name, x in inputs.items() if name.endswith("input_ids") and x.dim() == 2]
    search = _Search(trace, {value.shape[1]: whole_axis(len(value), value.shape[1], value.device) for value in ids})
    attending = {name for call in trace.calls for name in call.inside}
    with ExitStack() as stack, torch.inference_mode(), fixed_rng():
        for name, module in model.named_modules():
            if name and name not in attending and 2 <= len(_linear(module)) <= _MOST_LINEAR:
                stack.callback(module.register_forward_pre_hook(search.begins, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(search.ends(name)).remove)
        model(**inputs)
    return sorted(search.calls, key=lambda call: call.time), search.refusal


def _linear(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if name and has_matrix(m)]


@dataclass
class _Search:
    """Modules run again as they end, the inner ones first: the innermost that attends is what attends."""

    trace: Trace
    axes: Mapping[int, Axis]  # of the inputs' tokens, by their number
    calls: list[Call] = field(default_factory=list)
    refusal: CaptureError | None = None
    runs: list[Run] = field(default_factory=list)
    found: set[str] = field(default_factory=set)
    known: dict[tuple[type, int, int], tuple[Replayed, int] | None] = field(default_factory=dict)  # by class and size
    counts: dict[str, int] = field(default_factory=dict)

    def begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.runs.append(Run(module, args, kwargs))

    def ends(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            run = self.runs.pop()
            number = self.counts[name] = self.counts.get(name, -1) + 1
            states = first_tensor(output)
            outer = any(other.startswith(f"{name}.") for other in self.found)
            if outer or not is_stream(states) or len(states) != self.trace.batch:
                return
            kind = (type(module), sum(parameter.numel() for parameter in module.parameters()), states.shape[1])
            if kind not in self.known:
                try:
                    self.known[kind] = _how(run, self.trace.batch)
                except Exception:  # the model's own code, given values that its authors did not think of
                    self.known[kind] = None
            how = self.known[kind]
            if how is None:
                return
            self.found.add(name)
            try:
                self._add(name, number, run, *how, states.shape[1])
            except CaptureError as refused:
                self.refusal = self.refusal or refused

        return hook

    def _axis(self, states: int) -> Axis | None:
        """Of the tokens that so many states are of, or are but for what the model pads by itself."""
        fewer = [tokens for tokens in self.axes if tokens <= states]
        return self.axes[max(fewer)] if fewer else None

    def _add(self, name: str, number: int, run: Run, how: Replayed, heads: int, states: int) -> None:
        """The call as a probe has it; it stands where the module began, so that what reads its contexts comes after."""
        pattern, contexts, _ = replay_attention(run, how, heads=heads, axis=self._axis(states), name=name)
        ends = [event.time for event in self.trace.events if event.module == name]
        began, ended = ends[number - 1] if number else 0, ends[number]
        within = (e.time for e in self.trace.events if e.module.startswith(f"{name}.") and began < e.time <= ended)
        around = [n for n in dict.fromkeys(self.trace.ran) if n in ("", name) or name.startswith(f"{n}.")]
        call = Call(
            time=min(within),
            way="replay",
            inside=tuple(sorted(around, key=len)),
            batch=len(pattern),
            heads=heads,
            queries=pattern.shape[-2],
            keys=pattern.shape[-1],
            contexts=contexts.transpose(1, 2).flatten(2).float(),
            pattern=pattern.double(),
            causal=hides_the_future(pattern > 0),
            is_cross_attention=False,
            projection=None if how.reader is None else getattr(run.module.get_submodule(how.reader), "weight", None),
            replayed=how,
        )
        self.calls.append(call)


def _how(run: Run, batch: int) -> tuple[Replayed, int] | None:
    """Which of the linear modules in a module make its values, which reads the contexts, and its heads; None: no attention.

    The first thing that values change is the contexts: linearly, and without values there are none.
    """
    outputs = {name: given[0] for name, given in run.noted()[0].items()}
    linear = list(outputs)
    places = {name: _place_of_contexts(run, outputs[name], name, linear) for name in linear}
    values = tuple(name for name in linear if places[name] is not None and name not in places.values())
    readers = {places[name] for name in values}
    if len(readers) != 1:
        return None
    how = Replayed(values, readers.pop() or None, token_first=False)
    contexts, none = (_contexts(run, how, change) for change in (lambda value: value, torch.zeros_like))
    if none.abs().max() > 1e-4 * contexts.abs().max():
        return None
    sizes = {tuple(outputs[name].shape) for name in values}
    batch_first = tuple(contexts.shape)
    token_first = (batch_first[1], batch_first[0], batch_first[2])
    if contexts.dim() != 3 or len(contexts) != batch or sizes not in ({batch_first}, {token_first}):
        return None
    how = how._replace(token_first=sizes == {token_first} and token_first != batch_first)
    heads = _heads(run, how, batch_first, outputs[values[0]])
    return None if heads is None else (how, heads)


def _place_of_contexts(run: Run, output: Tensor, name: str, linear: Sequence[str]) -> str | None:
    """The module that reads the contexts of these values, "" where they are what is given; None: these are no values."""
    later = linear[linear.index(name) + 1 :]
    generator = torch.Generator(output.device).manual_seed(1)
    one, other = (
        torch.rand(output.shape, dtype=torch.float32, device=output.device, generator=generator).to(output.dtype)
        for _ in range(2)
    )
    nothing = torch.zeros_like(one)
    none, of_one, of_other, of_both = (
        run.again({name: _replaced_by(values)}, later) for values in (nothing, one, other, one + other)
    )
    for place, base, a, b, both in zip((*later, ""), none, of_one, of_other, of_both, strict=True):
        if base is None or a is None or b is None or both is None or torch.equal(a, base):
            continue
        linearly = _near(both.float() - base.float(), a.float() + b.float() - 2 * base.float())
        return place if linearly and base.dim() == 3 else None
    return None


def _replaced_by(values: Tensor) -> Change:
    """What is no value of tokens is made none."""
    return lambda output: values.clone() if output.shape == values.shape else torch.zeros_like(output)


def _heads(run: Run, how: Replayed, shape: tuple[int, ...], output: Tensor) -> int | None:
    """How many heads: with values that are the same in all entries, contexts are the same in those of a head.

    None where weights do not depend on what is read, or no token reads another's value: that is no attention.
    """
    batch, tokens, width = shape

    by_token = torch.arange(1.0, tokens + 1)[None, :, None].expand(shape)
    values = (by_token.transpose(0, 1) if how.token_first else by_token).contiguous().to(output)
    contexts = _contexts(run, how, _replaced_by(values)).float()
    others = values.clone()
    (others[0] if how.token_first else others[:, 0]).zero_()
    told = (_contexts(run, how, _replaced_by(others)).float() - contexts)[:, 1:]
    if tokens > 1 and not bool(told.any()):
        return None
    # to a few roundings: a few tokens among much padding, or a nearly even pattern, differ little
    alike = 64 * torch.finfo(output.dtype).eps
    if batch > 1 and bool((contexts - contexts[:1]).norm() <= alike * contexts.norm()):
        return None
    differs = ((contexts[..., 1:] - contexts[..., :-1]).abs().amax((0, 1)) > 1e-4 * contexts.abs().amax()).nonzero()
    return width // gcd(width, *(1 + int(n) for n in differs))
