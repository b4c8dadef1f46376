"""Run a model with one of its heads or sublayers left out, and say what comes out without it.

A batch of copies of one sequence goes through the model, with another part left out of each copy. Layers below all of these parts
compute the same as in the plain pass, so what they gave there is used again, where that is found to change nothing.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas.extract.capture.compiled import compilation_disabled
from attlas.extract.capture.configurations import is_language_model
from attlas.extract.capture.intercept.assemble import intercept_attention
from attlas.extract.capture.intercept.request import Request, interception_disabled
from attlas.extract.capture.layout import INTERCEPTED, Attention, HookPoint, Layout, Site
from attlas.extract.capture.rng import fixed_rng
from attlas.extract.capture.tensors import first_tensor, input_tensor

Part = Literal["head", "attention", "mlp"]
# tokens of the copies that go through the model together
_TOKENS = 4096
# the share by which states may differ when what lower layers gave is used again
_SAME = 1e-4


@dataclass(frozen=True)
class Ablation:
    """A part to leave out: a head, by the number of its attention layer in the layout, or a sublayer, by its residual site."""

    attention: int
    part: Part
    head: int = -1
    site: Site | None = None


@dataclass(frozen=True)
class Outcome:
    """What a model gives for one sequence, or for copies of it: its last states, and the loss at each next token if it has any."""

    states: Float[Tensor, "copy *token width"]
    losses: Float[Tensor, "copy next"] | None


class SequenceAblations:
    """One sequence and a model whose parts can be left out. `inputs` are the model's, for a batch of this sequence alone."""

    def __init__(self, model: nn.Module, layout: Layout, inputs: Mapping[str, Any]) -> None:
        self._model, self._layout, self._inputs = model, layout, inputs
        # the layer around each attention layer, if what it gave may be used again, and the last attention layer in it
        self._layer_of = _layer_modules(model, layout)
        self._last_in = {name: number for number, name in enumerate(self._layer_of) if name is not None}
        self._outputs: dict[str, Any] = {}
        with _recorded_outputs(model, self._last_in) as outputs:
            self.plain = self._run(1, ())
        self._outputs = outputs
        if not self._may_share():
            self._outputs = {}

    @property
    def repeated(self) -> Bool[Tensor, " next"] | None:
        """Which next tokens have occurred before in the sequence; None without token ids."""
        ids = self._inputs.get("input_ids")
        if not isinstance(ids, torch.Tensor):
            return None
        same = ids[0, 1:, None] == ids[0, None, :-1]
        return same.tril().any(-1)

    @property
    def ablations(self) -> list[Ablation]:
        """All heads whose contexts can be reached, then the sublayers of their layers."""
        found = [
            Ablation(number, "head", head)
            for number, attention in enumerate(self._layout.attentions)
            if _is_reachable(attention)
            for head in range(attention.heads)
        ]
        numbers = {(a.stack, a.layer): n for n, a in reversed([*enumerate(self._layout.attentions)])}
        for site in self._layout.sites:
            number = numbers.get((site.stack, site.layer))
            is_output = site.update is not None and site.update.point.side == "output"
            if number is not None and is_output and site.name in ("attention", "mlp"):
                found.append(Ablation(number, site.name, site=site))  # pyright: ignore[reportArgumentType]
        return found

    def outcomes(self) -> Iterator[tuple[list[Ablation], Outcome]]:
        """Every ablation, some at a time, with what the model gives without each."""
        states = self.plain.states
        at_once = max(1, _TOKENS * states.shape[-1] // states.numel())
        ordered = sorted(self.ablations, key=lambda ablation: ablation.attention)
        for first in range(0, len(ordered), at_once):
            chosen = ordered[first : first + at_once]
            yield chosen, self._run(len(chosen), chosen)

    def _run(self, copies: int, ablations: Sequence[Ablation], *, below: int | None = None) -> Outcome:
        """A pass over so many copies, each without its ablation. Layers below the first one, or `below`, are not computed."""
        lowest = min((a.attention for a in ablations), default=0) if below is None else below
        known = {name: output for name, output in self._outputs.items() if self._last_in[name] < lowest}
        with ExitStack() as stack, torch.inference_mode(), compilation_disabled(), fixed_rng():
            for name, output in known.items():
                module = self._model.get_submodule(name)
                module.forward = _constant(_copies(output, copies))
                stack.callback(delattr, module, "forward")
            skipped = sum(name in known for name in self._layer_of)
            _leave_out(stack, self._model, self._layout, ablations, copies, skipped)
            last_inputs = _last_input(stack, self._model)
            output = self._model(**_copies(dict(self._inputs), copies))
        return _outcome(output, last_inputs, self._inputs)

    def _may_share(self) -> bool:
        """Whether passes over what lower layers gave give what the plain pass gave; tried once for a model."""
        if self._model not in _SHARES:
            _SHARES[self._model] = self._gives_the_same()
        return _SHARES[self._model]

    def _gives_the_same(self) -> bool:
        try:
            again = self._run(2, (), below=len(self._layout.attentions) - 1).states
        except Exception:  # the model's own code, in which layers give what they do not compute
            return False
        plain = self.plain.states
        return again.shape == (2, *plain.shape[1:]) and bool((again - plain).norm() <= _SAME * again.norm())


_SHARES: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _is_reachable(attention: Attention) -> bool:
    """Whether a head's contexts can be changed: in the attention call, or where the output projection reads them."""
    return _is_in_call(attention) or attention.projection is not None


def _is_in_call(attention: Attention) -> bool:
    """Whether a head's contexts can be changed in the attention call."""
    return attention.method in INTERCEPTED and not attention.in_pieces


# --- leaving out


def _leave_out(
    stack: ExitStack, model: nn.Module, layout: Layout, ablations: Sequence[Ablation], copies: int, skipped: int
) -> None:
    """Clear contexts of heads and updates of sublayers in the pass that is made within the stack."""
    heads: dict[int, list[tuple[int, int]]] = {}
    for copy, ablation in enumerate(ablations):
        if ablation.part == "head":
            heads.setdefault(ablation.attention, []).append((copy, ablation.head))
        else:
            assert ablation.site is not None and ablation.site.update is not None, "a sublayer has a site"
            _clear_output(stack, model, ablation.site.update.point, copy, ablation.site)
    in_calls = {n for n in heads if _is_in_call(layout.attentions[n])}
    if in_calls:
        receiver = _Clearing(layout, {n: heads[n] for n in in_calls}, copies, skipped)
        methods = layout.methods & INTERCEPTED
        stack.enter_context(intercept_attention(model, receiver, methods, finds_imported=layout.imports_attention))
    for number in heads.keys() - in_calls:
        _clear_projection_input(stack, model, layout, number, heads[number])


class _Clearing:
    """Receives the attention calls of a pass, and clears the contexts of heads: by layer, pairs of a copy and a head."""

    def __init__(
        self, layout: Layout, heads: Mapping[int, Sequence[tuple[int, int]]], copies: int, skipped: int
    ) -> None:
        self._attentions = layout.attentions
        self._ignored = layout.ignored_calls
        self._heads, self._copies = heads, copies
        self._calls = count()
        self._number = skipped - 1

    def attend(self, request: Request) -> Tensor:
        with interception_disabled():
            output = request.call_original()
            if next(self._calls) in self._ignored:
                return output
            self._number += 1
            while self._attentions[self._number].method not in INTERCEPTED:
                self._number += 1
            pairs = self._heads.get(self._number)
            if not pairs:
                return output
            by_copy = output.clone()
            rows = _rows_of_copies(len(output), self._copies, self._attentions[self._number])
            for copy, head in pairs:
                by_copy[rows == copy, head] = 0
            return by_copy

    def receive_product(self, product: Any) -> None: ...

    def receive_recorded_call(self, call: Any) -> None: ...


def _rows_of_copies(rows: int, copies: int, attention: Attention) -> Int[Tensor, " row"]:
    """The copy that each row of a call belongs to: a sequence may have several windows."""
    numbers = torch.arange(copies)
    return numbers.repeat(rows // copies) if attention.batch_last else numbers.repeat_interleave(rows // copies)


def _clear_projection_input(
    stack: ExitStack, model: nn.Module, layout: Layout, number: int, pairs: Sequence[tuple[int, int]]
) -> None:
    """Clear heads where the output projection of a layer reads their contexts, side by side."""
    attention = layout.attentions[number]
    assert attention.projection is not None, "only such layers are reachable"
    earlier = sum(a.projection == attention.projection for a in layout.attentions[:number])
    calls = count()

    def clear(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        read = input_tensor(args, kwargs)
        if next(calls) != earlier or read is None:
            return None
        cleared = read.clone()
        of_heads = cleared.unflatten(-1, (attention.heads, -1))
        for copy, head in pairs:
            of_heads[copy, ..., head, :] = 0
        return (cleared, *args[1:]), kwargs

    module = model.get_submodule(attention.projection)
    stack.callback(module.register_forward_pre_hook(clear, with_kwargs=True).remove)


def _clear_output(stack: ExitStack, model: nn.Module, point: HookPoint, copy: int, site: Site) -> None:
    """Clear what a module writes at one of its calls, for one copy."""
    calls = count()

    def clear(_module: nn.Module, _args: Any, output: Any) -> Any:
        if next(calls) != point.call:
            return None
        wrote = first_tensor(output)
        assert wrote is not None, "the point is a tensor"
        cleared = wrote.clone()
        cleared[(slice(None), copy) if site.token_first else copy] = 0
        return cleared if wrote is output else _with_first_tensor(output, wrote, cleared)

    module = model.get_submodule(point.module)
    stack.callback(module.register_forward_hook(clear).remove)


def _with_first_tensor(output: Any, old: Tensor, new: Tensor) -> Any:
    """A module's output with one of its tensors replaced."""
    if isinstance(output, dict):
        return type(output)({key: new if value is old else value for key, value in output.items()})
    return type(output)(new if value is old else value for value in output)


# --- layers below


def _layer_name(model: nn.Module, module: str) -> str | None:
    """The outermost element of a list of layers around a module."""
    parts = module.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return None


def _layer_modules(model: nn.Module, layout: Layout) -> list[str | None]:
    """The name of the layer around each attention layer.

    None where calls can't be told apart, or the layer's forward function was replaced, which may do more than the layer.
    """
    if layout.ignored_calls:
        return [None] * len(layout.attentions)
    names = [_layer_name(model, attention.module) for attention in layout.attentions]
    return [None if name is None or "forward" in vars(model.get_submodule(name)) else name for name in names]


@contextmanager
def _recorded_outputs(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The outputs of layers in a pass made within this context, of those that ran once."""
    outputs: dict[str, Any] = {}
    runs = Counter[str]()

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            runs[name] += 1
            outputs[name] = output

        return hook

    with ExitStack() as stack:
        for name in layers:
            stack.callback(model.get_submodule(name).register_forward_hook(record(name)).remove)
        yield outputs
    for name in [name for name, times in runs.items() if times > 1]:
        del outputs[name]


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


def _copies(value: Any, copies: int) -> Any:
    """Tensors of one sequence as those of so many copies of it, in any nesting."""
    if isinstance(value, torch.Tensor):
        return value.repeat(copies, *(1,) * (value.dim() - 1)) if value.dim() and len(value) == 1 else value
    if isinstance(value, dict):
        return {key: _copies(item, copies) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_copies(item, copies) for item in value)
    return value


# --- outcomes


def _last_input(stack: ExitStack, model: nn.Module) -> list[Tensor]:
    """What the language head reads in the pass that is made within the stack, if the model has one."""
    read: list[Tensor] = []
    head = _language_head(model)
    if head is not None:
        hook = head.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
        stack.callback(hook.remove)
    return read


def _language_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    if get is None or not is_language_model(type(model)):
        return None
    head = get()
    return head if isinstance(head, nn.Module) else None


def _outcome(output: Any, last_inputs: Sequence[Tensor], inputs: Mapping[str, Any]) -> Outcome:
    logits, ids = getattr(output, "logits", None), inputs.get("input_ids")
    if last_inputs and isinstance(logits, torch.Tensor) and isinstance(ids, torch.Tensor):
        targets = ids[:, 1:].expand(len(logits), -1)
        losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
        return Outcome(last_inputs[-1].float(), losses)
    states = getattr(output, "last_hidden_state", None)
    states = states if isinstance(states, torch.Tensor) else first_tensor(output)
    assert states is not None, "a model gives tensors"
    return Outcome(states.float(), None)
