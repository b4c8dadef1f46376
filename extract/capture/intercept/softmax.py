"""Capture attention that a model computes itself: a softmax over keys, multiplied with values.

Such code calls no function of its own that could be replaced. So every softmax is followed, with all tensors made from its
output, up to a product with values. The model holds its whole pattern in memory anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attlas.extract.capture.intercept.request import interception_disabled

_SOFTMAX = {"softmax"}
_PRODUCTS = {"matmul", "bmm", "einsum", "__matmul__", "__rmatmul__"}
# operations of any kind after which a softmax is no longer followed: few are needed, but values may be computed in between
_MOST_OPERATIONS = 64


@dataclass(frozen=True)
class Product:
    """A softmax and the product of its result with values, in the model's own shapes."""

    scores: Float[Tensor, "*scores"]  # the input of the softmax
    dim: int  # the dimension it normalises
    softmax: Float[Tensor, "*scores"]
    pattern: Float[Tensor, "*rows key"]  # the first factor of the product
    value: Float[Tensor, "*keys value_width"]
    contexts: Float[Tensor, "*contexts"]
    equation: str | None  # of an einsum


@dataclass(frozen=True)
class ManualAttention:
    """An attention call computed by the model, in the usual order of dimensions.

    `dim_order` says how to find batch and heads in such a product again: for einsum, their letters in order; for more than
    two leading dimensions, the index of the head dimension; otherwise it is empty.
    """

    scores: Float[Tensor, "batch head query key"]
    pattern: Float[Tensor, "batch head query key"]
    value: Float[Tensor, "batch head key value_width"]
    contexts: Float[Tensor, "batch head query value_width"]
    sinks: Float[Tensor, "batch head query"] | None = None  # scores of an outcome that is not a key
    dim_order: str = ""


@dataclass
class _Pending:
    """A softmax whose product has not come yet. The tensors made from it are kept alive, so that no id is reused."""

    scores: Tensor
    dim: int
    softmax: Tensor
    derived: list[Tensor]
    operations: int = 0


class SoftmaxTracker(TorchFunctionMode):
    """Calls `receive` for every product of a softmax with values, as soon as it is computed."""

    def __init__(self, receive: Callable[[Product], None]) -> None:
        super().__init__()
        self._receive = receive
        self._pending: list[_Pending] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if self._pending and isinstance(result, torch.Tensor):
            self._follow(name, args, result)
        if name in _SOFTMAX and isinstance(result, torch.Tensor) and result.dim() >= 3:
            scores, *rest = (*args, *(kwargs[n] for n in ("input", "dim") if n in kwargs))
            self._pending.append(_Pending(scores, (rest[0] if rest else -1) % result.dim(), result, [result]))
        return result

    def _follow(self, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        operands = [a for a in _flatten(args) if isinstance(a, torch.Tensor)]
        for softmax in self._pending:
            softmax.operations += 1
            factor = next((a for a in operands if any(a is tensor for tensor in softmax.derived)), None)
            if factor is None:
                continue
            if name not in _PRODUCTS:
                softmax.derived.append(result)
                continue
            softmax.operations = _MOST_OPERATIONS  # complete
            equation = next((a for a in args if isinstance(a, str)), None)
            if len(operands) == 2 and operands[0] is factor:
                with interception_disabled():
                    self._receive(
                        Product(softmax.scores, softmax.dim, softmax.softmax, factor, operands[1], result, equation)
                    )
        self._pending = [softmax for softmax in self._pending if softmax.operations < _MOST_OPERATIONS]


def _flatten(args: Any) -> list[Any]:
    return [item for a in args for item in (_flatten(a) if isinstance(a, list | tuple) else [a])]


def manual_attention_of(
    product: Product,
    *,
    batch: int,
    heads: int | None = None,
    dim_order: str = "",
    head_counts: frozenset[int] = frozenset(),
) -> ManualAttention | None:
    """Return the call as [batch, head, query, key]; None if the product is not attention of a batch of so many rows.

    `heads` and `dim_order` are those of the same call in discovery. `head_counts` are numbers of heads that the model may
    have, to tell dimensions apart. Windows of a sequence count as sequences.
    """
    if product.equation is None:
        return _of_matmul(product, batch, heads, dim_order, head_counts)
    return _of_einsum(product, batch, dim_order, head_counts)


def _of_matmul(
    product: Product, batch: int, heads: int | None, dim_order: str, head_counts: frozenset[int]
) -> ManualAttention | None:
    p, v = product.pattern, product.value
    leading = p.shape[:-2]
    if product.dim != product.softmax.dim() - 1 or v.shape[-2] != p.shape[-1]:
        return None
    rows, keys = p.numel() // p.shape[-1], p.shape[-1]
    if product.softmax.numel() not in (rows * keys, rows * (keys + 1)):
        return None
    if len(leading) == 1:
        heads = heads or _heads_among(leading[0] // batch, head_counts)
        if leading[0] % heads:
            return None
        leading = (leading[0] // heads, heads)
    if len(leading) < 2:
        return None
    head_dim = int(dim_order) if dim_order else _head_dim(leading, head_counts)
    pattern, value, contexts = (
        _batch_and_heads(t.expand(*p.shape[:-2], *t.shape[-2:]).reshape(*leading, *t.shape[-2:]), head_dim)
        for t in (p, v, product.contexts)
    )
    scores = _batch_and_heads(product.scores.reshape(*leading, p.shape[-2], -1), head_dim)
    dim_order = "" if len(leading) == 2 else str(head_dim)
    if scores.shape[-1] == keys:
        return ManualAttention(scores, pattern, value, contexts, dim_order=dim_order)
    return ManualAttention(scores[..., :-1], pattern, value, contexts, sinks=scores[..., -1], dim_order=dim_order)


def _heads_among(count: int, head_counts: frozenset[int]) -> int:
    """The number of heads in a dimension that may hold the heads of several windows."""
    divisors = [n for n in head_counts if n and count % n == 0]
    return count if count in head_counts or not divisors else max(divisors)


def _head_dim(leading: tuple[int, ...], head_counts: frozenset[int]) -> int:
    """Which leading dimension is the heads: the second, unless exactly one has a size that is a number of heads."""
    candidates = [n for n, size in enumerate(leading) if n and size in head_counts]
    return candidates[0] if len(candidates) == 1 else 1


def _batch_and_heads(tensor: Tensor, head_dim: int) -> Tensor:
    """All dimensions before query and key as two: the batch with its windows, and the heads."""
    return tensor.movedim(head_dim, -3).flatten(0, -4)


def _of_einsum(product: Product, batch: int, dim_order: str, head_counts: frozenset[int]) -> ManualAttention | None:
    """Read the letters: keys are summed over, queries are not in the values, the width is not in the pattern."""
    assert product.equation is not None
    factors, _, out = product.equation.replace(" ", "").partition("->")
    p, _, v = factors.partition(",")
    if not {*p, *v, *out} <= {*"abcdefghijklmnopqrstuvwxyz"} or not len(p) == len(v) == len(out) >= 4:
        return None
    common, query, key = ({*p} & {*v} & {*out}), {*p} - {*v}, {*p} - {*out}
    if len(common) != len(p) - 2 or len(query) != 1 or len(key) != 1 or product.softmax.shape != product.pattern.shape:
        return None
    key, query, width = key.pop(), query.pop(), ({*v} - {*p}).pop()
    if p.index(key) != product.dim:
        return None
    sizes = dict(zip(p, product.pattern.shape, strict=True))
    dim_order = dim_order or _batch_to_head(sorted(common, key=p.index), sizes, batch, head_counts)
    return ManualAttention(
        _permute(product.scores, p, dim_order + query + key),
        _permute(product.pattern, p, dim_order + query + key),
        _permute(product.value, v, dim_order + key + width),
        _permute(product.contexts, out, dim_order + query + width),
        dim_order=dim_order,
    )


def _batch_to_head(letters: list[str], sizes: dict[str, int], batch: int, head_counts: frozenset[int]) -> str:
    """The letters in common: batch first, head last, windows in between."""
    letters = sorted(letters, key=lambda letter: sizes[letter] != batch)
    candidates = [letter for letter in letters[1:] if sizes[letter] in head_counts]
    head = candidates[0] if len(candidates) == 1 else letters[1]
    return "".join([*(letter for letter in letters if letter != head), head])


def _permute(tensor: Tensor, letters: str, order: str) -> Tensor:
    return tensor.permute([letters.index(letter) for letter in order]).flatten(0, -4)
