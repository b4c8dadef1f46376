"""Run a model with one of its heads or sublayers left out, and say what comes out without it.

A part is left out by setting its vectors to zero, or to their means over a corpus. A batch of copies of one sequence goes through
the model, with another part left out of each copy. Layers below all of these parts compute the same as in the plain pass, so what
they gave there is used again, where that is found to change nothing.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attlas.extract.capture.compiled import compilation_disabled
from attlas.extract.capture.configurations import is_language_model
from attlas.extract.capture.layer_lists import LayerLists, lineage
from attlas.extract.capture.layout import Layout
from attlas.extract.capture.rng import fixed_rng
from attlas.extract.capture.runtime.part_edits import Edit, edit_parts
from attlas.extract.capture.runtime.part_means import PartMeans
from attlas.extract.capture.runtime.parts import PARTS, ModelPart, Part, parts_of
from attlas.extract.capture.tensors import first_tensor

# tokens of the copies that go through the model together
_TOKENS = 4096
# the share by which states may differ when what lower layers gave is used again
_SAME = 1e-4


@dataclass(frozen=True)
class Ablating:
    """Which parts are left out, and the means that their vectors are set to; without means, to zero."""

    parts: tuple[Part, ...] = PARTS
    means: PartMeans | None = None


@dataclass(frozen=True)
class Outcome:
    """What a model gives for one sequence, or for copies of it: its last states, and the loss at each next token if it has any."""

    states: Float[Tensor, "copy *token width"]
    losses: Float[Tensor, "copy next"] | None


class SequenceAblations:
    """One sequence and a model whose parts can be left out. `inputs` are the model's, for a batch of this sequence alone."""

    def __init__(
        self, model: nn.Module, layout: Layout, inputs: Mapping[str, Any], ablating: Ablating | None = None
    ) -> None:
        self._model, self._layout, self._inputs = model, layout, inputs
        self._ablating = ablating or Ablating()
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
    def left_out(self) -> list[ModelPart]:
        """The parts that are left out, one at a time: those that can be reached and, if means are asked for, have one."""
        means = self._ablating.means
        return [p for p in parts_of(self._layout, self._ablating.parts) if means is None or p.key in means]

    def outcomes(self) -> Iterator[tuple[list[ModelPart], Outcome]]:
        """Every part, some of a layer at a time, with what the model gives without each.

        The layers below are not computed: parts of two layers in one pass would have the higher one's computed for nothing.
        """
        states = self.plain.states
        at_once = max(1, _TOKENS * states.shape[-1] // states.numel())
        ordered = sorted(self.left_out, key=_layer_number)
        for _, of_layer in groupby(ordered, key=_layer_number):
            for chosen in _even_groups(list(of_layer), at_once):
                yield chosen, self._run(len(chosen), chosen)

    def _run(self, copies: int, without: Sequence[ModelPart], *, below: int | None = None) -> Outcome:
        """A pass over so many copies, each without its part. Layers below the first one, or `below`, are not computed."""
        lowest = min((part.attention for part in without), default=0) if below is None else below
        known = {name: output for name, output in self._outputs.items() if self._last_in[name] < lowest}
        with ExitStack() as stack, torch.inference_mode(), compilation_disabled(), fixed_rng():
            for name, output in known.items():
                module = self._model.get_submodule(name)
                module.forward = _constant(_copies(output, copies))
                stack.callback(delattr, module, "forward")
            skipped = sum(name in known for name in self._layer_of)
            self._leave_out(stack, without, copies, skipped)
            last_inputs = _last_input(stack, self._model)
            output = self._model(**_copies(dict(self._inputs), copies))
        return _outcome(output, last_inputs, self._inputs)

    def _leave_out(self, stack: ExitStack, without: Sequence[ModelPart], copies: int, skipped: int) -> None:
        """Leave these parts out of the pass that is made within the stack, each of its copy."""
        heads: dict[int, list[tuple[int, ModelPart]]] = {}
        updates: list[tuple[Any, Edit]] = []
        for copy, part in enumerate(without):
            if part.site is None:
                heads.setdefault(part.attention, []).append((copy, part))
            else:
                updates.append((part.site, partial(self._replace_update, copy, part)))
        contexts = {number: partial(self._replace_heads, of_layer) for number, of_layer in heads.items()}
        edit_parts(stack, self._model, self._layout, contexts=contexts, updates=updates, copies=copies, skipped=skipped)

    def _replace_heads(self, heads: Sequence[tuple[int, ModelPart]], contexts: Tensor) -> None:
        for copy, part in heads:
            contexts[copy, part.head] = self._value(part, contexts)

    def _replace_update(self, copy: int, part: ModelPart, update: Tensor) -> None:
        update[copy] = self._value(part, update)

    def _value(self, part: ModelPart, vectors: Tensor) -> Tensor | float:
        """What a part's vectors are set to."""
        means = self._ablating.means
        return 0.0 if means is None else torch.from_numpy(means[part.key]).to(vectors)

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


def _layer_number(part: ModelPart) -> int:
    return part.attention


def _even_groups(parts: Sequence[ModelPart], most: int) -> Iterator[list[ModelPart]]:
    """The parts in groups of at most so many, as few as possible and of nearly the same size."""
    groups = -(-len(parts) // most)
    for number in range(groups):
        yield list(parts[len(parts) * number // groups : len(parts) * (number + 1) // groups])


_SHARES: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


# --- layers below


def _layer_modules(model: nn.Module, layout: Layout) -> list[str | None]:
    """The name of the layer around each attention layer.

    None where calls can't be told apart, or the layer's forward function was replaced, which may do more than the layer.
    """
    if layout.ignored_calls:
        return [None] * len(layout.attentions)
    modules = dict(model.named_modules())
    around = {name for attention in layout.attentions for name in lineage(attention.module)}
    # a list of layers does not run
    lists = LayerLists((name for name in around if not isinstance(modules.get(name), nn.ModuleList)), modules)
    names = [lists.layer_of(attention.module) for attention in layout.attentions]
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
