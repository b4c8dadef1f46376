"""Attention that a model computes by hand: a softmax over keys that is then multiplied with values.

Nothing of it has a name, so it is followed: what comes out of a softmax, and what is made of that, up to the product with
values. The model makes its pattern itself, so memory is its own; the statistics read it in blocks, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attlas.extract.capture.intercept.sdpa import interception_disabled

_SOFTMAX = {"softmax"}
_PRODUCTS = {"matmul", "bmm", "einsum", "__matmul__", "__rmatmul__"}
# operations between a softmax and its product, those of other tensors included; few, and values may be made among them
_PATIENCE = 64


@dataclass(frozen=True)
class Product:
    """A softmax, and the product of what came of it with values; as the model has them."""

    scores: Float[Tensor, "*scores"]  # what the softmax read
    over: int  # the dimension it normalised
    softmax: Float[Tensor, "*scores"]
    pattern: Float[Tensor, "*rows key"]  # the product's factor
    value: Float[Tensor, "*keys value_width"]
    contexts: Float[Tensor, "*contexts"]
    equation: str | None  # of an einsum


@dataclass(frozen=True)
class ManualAttention:
    """An attention call that the model has made, in the usual order of dimensions."""

    scores: Float[Tensor, "batch head query key"]
    pattern: Float[Tensor, "batch head query key"]
    value: Float[Tensor, "batch head key value_width"]
    contexts: Float[Tensor, "batch head query value_width"]
    sinks: Float[Tensor, "batch head query"] | None = None  # scores of an outcome that is no key
    order: str = ""  # see `Attention.order`


@dataclass
class _Open:
    """A softmax whose product has not come, and everything made of it; kept, so that no other object takes its id."""

    scores: Tensor
    over: int
    softmax: Tensor
    made: list[Tensor]
    age: int = 0


class SoftmaxTracker(TorchFunctionMode):
    """Tell of every product of a softmax with values, as it is made."""

    def __init__(self, finished: Callable[[Product], None]) -> None:
        super().__init__()
        self._finished = finished
        self._open: list[_Open] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if self._open and isinstance(result, torch.Tensor):
            self._follow(name, args, result)
        if name in _SOFTMAX and isinstance(result, torch.Tensor) and result.dim() >= 3:
            scores, *rest = (*args, *(kwargs[n] for n in ("input", "dim") if n in kwargs))
            self._open.append(_Open(scores, (rest[0] if rest else -1) % result.dim(), result, [result]))
        return result

    def _follow(self, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        operands = [a for a in _flat(args) if isinstance(a, torch.Tensor)]
        for softmax in self._open:
            softmax.age += 1
            factor = next((a for a in operands if any(a is made for made in softmax.made)), None)
            if factor is None:
                continue
            if name not in _PRODUCTS:
                softmax.made.append(result)
                continue
            softmax.age = _PATIENCE  # done
            equation = next((a for a in args if isinstance(a, str)), None)
            if len(operands) == 2 and operands[0] is factor:
                with interception_disabled():
                    self._finished(
                        Product(softmax.scores, softmax.over, softmax.softmax, factor, operands[1], result, equation)
                    )
        self._open = [softmax for softmax in self._open if softmax.age < _PATIENCE]


def _flat(args: Any) -> list[Any]:
    return [b for a in args for b in (_flat(a) if isinstance(a, list | tuple) else [a])]


def manual_attention_of(
    product: Product,
    *,
    batch: int,
    heads: int | None = None,
    order: str = "",
    head_counts: frozenset[int] = frozenset(),
) -> ManualAttention | None:
    """The call as [batch, head, query, key]; None where the product is no attention of a batch of so many rows.

    `heads` and `order` are what an earlier look at the same call has found; `head_counts` those that the model may have,
    for what has more dimensions than the usual. Windows of a sequence count as sequences.
    """
    if product.equation is None:
        return _of_matrices(product, batch, heads, order, head_counts)
    return _of_equation(product, batch, order, head_counts)


def _of_matrices(
    product: Product, batch: int, heads: int | None, order: str, head_counts: frozenset[int]
) -> ManualAttention | None:
    p, v = product.pattern, product.value
    lead = p.shape[:-2]
    if product.over != product.softmax.dim() - 1 or v.shape[-2] != p.shape[-1]:
        return None
    rows, keys = p.numel() // p.shape[-1], p.shape[-1]
    if product.softmax.numel() not in (rows * keys, rows * (keys + 1)):
        return None
    if len(lead) == 1:
        heads = heads or _heads_of(lead[0] // batch, head_counts)
        if lead[0] % heads:
            return None
        lead = (lead[0] // heads, heads)
    if len(lead) < 2:
        return None
    at = int(order) if order else _head_dimension(lead, head_counts)
    of_heads = (
        _heads_second(t.expand(*product.pattern.shape[:-2], *t.shape[-2:]).reshape(*lead, *t.shape[-2:]), at)
        for t in (p, v, product.contexts)
    )
    pattern, value, contexts = of_heads
    scores = _heads_second(product.scores.reshape(*lead, p.shape[-2], -1), at)
    order = "" if len(lead) == 2 else str(at)
    if scores.shape[-1] == keys:
        return ManualAttention(scores, pattern, value, contexts, order=order)
    return ManualAttention(scores[..., :-1], pattern, value, contexts, sinks=scores[..., -1], order=order)


def _heads_of(several: int, head_counts: frozenset[int]) -> int:
    """How many heads a sequence has in a dimension where they may be multiplied by windows."""
    dividing = [n for n in head_counts if n and several % n == 0]
    return several if several in head_counts or not dividing else max(dividing)


def _head_dimension(lead: tuple[int, ...], head_counts: frozenset[int]) -> int:
    """Which of the dimensions before query and key are heads: the second, unless another alone is as many as heads are."""
    alike = [n for n, size in enumerate(lead) if n and size in head_counts]
    return alike[0] if len(alike) == 1 else 1


def _heads_second(tensor: Tensor, at: int) -> Tensor:
    """All dimensions before query and key as two: batch with its windows, and heads."""
    return tensor.movedim(at, -3).flatten(0, -4)


def _of_equation(product: Product, batch: int, order: str, head_counts: frozenset[int]) -> ManualAttention | None:
    """Which letter is what: keys are summed, queries are not the values', widths not the pattern's; the rest is common."""
    assert product.equation is not None
    factors, _, out = product.equation.replace(" ", "").partition("->")
    p, _, v = factors.partition(",")
    if not {*p, *v, *out} <= {*"abcdefghijklmnopqrstuvwxyz"} or not len(p) == len(v) == len(out) >= 4:
        return None
    common, query, key = ({*p} & {*v} & {*out}), {*p} - {*v}, {*p} - {*out}
    if len(common) != len(p) - 2 or len(query) != 1 or len(key) != 1 or product.softmax.shape != product.pattern.shape:
        return None
    key, query, width = key.pop(), query.pop(), ({*v} - {*p}).pop()
    if p.index(key) != product.over:
        return None
    sizes = dict(zip(p, product.pattern.shape, strict=True))
    order = order or _batch_to_head(sorted(common, key=p.index), sizes, batch, head_counts)
    of = {"p": order + query + key, "v": order + key + width, "out": order + query + width}
    return ManualAttention(
        _permuted(product.scores, p, of["p"]),
        _permuted(product.pattern, p, of["p"]),
        _permuted(product.value, v, of["v"]),
        _permuted(product.contexts, out, of["out"]),
        order=order,
    )


def _batch_to_head(letters: list[str], sizes: dict[str, int], batch: int, head_counts: frozenset[int]) -> str:
    """The common letters, batch first, head last, windows between."""
    letters = sorted(letters, key=lambda letter: sizes[letter] != batch)
    alike = [letter for letter in letters[1:] if sizes[letter] in head_counts]
    head = alike[0] if len(alike) == 1 else letters[1]
    return "".join([*(letter for letter in letters if letter != head), head])


def _permuted(tensor: Tensor, have: str, want: str) -> Tensor:
    return tensor.permute([have.index(letter) for letter in want]).flatten(0, -4)
