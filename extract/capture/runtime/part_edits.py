"""Reach the parts of a model in a pass: the contexts of heads, and what sublayers add to the residual stream.

An edit is given the vectors of a part just after they are made. It may read them, or change them in place, which is then what
the model goes on with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from attlas.extract.capture.intercept.assemble import intercept_attention
from attlas.extract.capture.intercept.request import Request, interception_disabled
from attlas.extract.capture.layout import INTERCEPTED, Attention, Layout, Site
from attlas.extract.capture.tensors import first_tensor, input_tensor
from attlas.extract.errors import CaptureError

# of the contexts of a layer [copy, head, *position, width], or of what a sublayer adds [copy, *position, width]
Edit = Callable[[Tensor], None]


def is_reachable(attention: Attention) -> bool:
    """Whether a head's contexts can be changed: in the attention call, or where the output projection reads them."""
    return _is_in_call(attention) or attention.projection is not None


def edit_parts(
    stack: ExitStack,
    model: nn.Module,
    layout: Layout,
    *,
    contexts: Mapping[int, Edit],
    updates: Sequence[tuple[Site, Edit]],
    copies: int = 1,
    skipped: int = 0,
) -> None:
    """Make these edits in the pass that is made within the stack, over so many copies of a sequence.

    `contexts` has the edit of an attention layer's contexts by its number in the layout. `skipped` are the attention layers at
    the beginning that the pass does not compute.
    """
    in_calls = {number: edit for number, edit in contexts.items() if _is_in_call(layout.attentions[number])}
    if in_calls:
        receiver = _ContextEdits(layout, in_calls, copies, skipped)
        methods = layout.methods & INTERCEPTED
        stack.enter_context(intercept_attention(model, receiver, methods, finds_imported=layout.imports_attention))
    for number in contexts.keys() - in_calls.keys():
        _edit_projection_input(stack, model, layout, number, contexts[number], copies)
    for site, edit in updates:
        _edit_update(stack, model, site, edit, copies)


def _is_in_call(attention: Attention) -> bool:
    """Whether a head's contexts can be changed in the attention call."""
    return attention.method in INTERCEPTED and not attention.in_pieces


def _by_copy(rows: Tensor, copies: int, *, batch_last: bool = False) -> Tensor:
    """Rows [row, …] as [copy, window, …]: a sequence may have several windows."""
    if batch_last:
        return rows.unflatten(0, (-1, copies)).transpose(0, 1)
    return rows.unflatten(0, (copies, -1))


class _ContextEdits:
    """Receives the attention calls of a pass, and edits the contexts of some layers."""

    def __init__(self, layout: Layout, edits: Mapping[int, Edit], copies: int, skipped: int) -> None:
        self._attentions = layout.attentions
        self._ignored = layout.ignored_calls
        self._edits, self._copies = edits, copies
        self._calls = count()
        self._numbers = iter(
            number
            for number, attention in enumerate(layout.attentions)
            if number >= skipped and attention.method in INTERCEPTED
        )

    def attend(self, request: Request) -> Tensor:
        with interception_disabled():
            output = request.call_original()
            if next(self._calls) in self._ignored:
                return output
            number = next(self._numbers, None)
            if number is None:
                raise CaptureError(f"expected {len(self._attentions)} attention calls, the model makes more")
            edit = self._edits.get(number)
            return output if edit is None else self._edited(output, self._attentions[number], edit)

    def _edited(self, output: Tensor, attention: Attention, edit: Edit) -> Tensor:
        edited = output.clone(memory_format=torch.contiguous_format)
        # the heads of a single token may come as queries of the key heads
        of_heads = edited.view(len(output), attention.heads, -1, output.shape[-1])
        edit(_by_copy(of_heads, self._copies, batch_last=attention.batch_last).movedim(2, 1))
        return edited

    def receive_product(self, product: Any) -> None: ...

    def receive_recorded_call(self, call: Any) -> None: ...


def _edit_projection_input(
    stack: ExitStack, model: nn.Module, layout: Layout, number: int, edit: Edit, copies: int
) -> None:
    """Edit contexts where the output projection of a layer reads those of all heads side by side."""
    attention = layout.attentions[number]
    assert attention.projection is not None, "only such layers are reachable"
    earlier = sum(a.projection == attention.projection for a in layout.attentions[:number])
    calls = count()

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        read = input_tensor(args, kwargs)
        if next(calls) != earlier or read is None:
            return None
        edited = read.clone()
        of_heads = _by_copy(edited, copies, batch_last=attention.batch_last).unflatten(-1, (attention.heads, -1))
        edit(of_heads.movedim(-2, 1))
        if args:
            return (edited, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): edited}

    module = model.get_submodule(attention.projection)
    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _edit_update(stack: ExitStack, model: nn.Module, site: Site, edit: Edit, copies: int) -> None:
    """Edit what a sublayer adds to the stream where its module writes it."""
    assert site.update is not None, "a sublayer has an update"
    point = site.update.point
    calls = count()

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if next(calls) != point.call:
            return None
        wrote = first_tensor(output)
        assert wrote is not None, "the point is a tensor"
        edited = wrote.clone()
        edit(_by_copy(edited.transpose(0, 1) if site.token_first else edited, copies))
        return edited if wrote is output else _with_first_tensor(output, wrote, edited)

    module = model.get_submodule(point.module)
    stack.callback(module.register_forward_hook(hook).remove)


def _with_first_tensor(output: Any, old: Tensor, new: Tensor) -> Any:
    """A module's output with one of its tensors replaced."""
    if isinstance(output, dict):
        return type(output)({key: new if value is old else value for key, value in output.items()})
    return type(output)(new if value is old else value for value in output)
