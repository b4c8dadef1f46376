"""One run of a model on a few tokens, with everything kept that its modules read and wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from extract.capture.seam import first_tensor, read_tensor, replaced_sdpa

if TYPE_CHECKING:
    from torch import Tensor

PROBE_TOKENS = 12
# relative to the larger tensor's norm; a wrong candidate differs by its whole size
_SAME = 1e-3


@dataclass(frozen=True)
class Event:
    """A module's call in the probe."""

    time: int
    module: str
    call: int
    read: Tensor | None
    wrote: Tensor | None


@dataclass(frozen=True)
class Call:
    """An attention call in the probe; contexts as [batch, token, head × head_width]."""

    time: int
    heads: int
    contexts: Tensor
    causal: bool
    self_attention: bool


@dataclass
class Trace:
    events: list[Event] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    rounding: float = torch.finfo(torch.float32).eps  # ε of the model's own type
    clock: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock


def trace_of(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    trace = Trace()
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        trace.rounding = torch.finfo(parameter.dtype).eps
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            number = counts[name] = counts.get(name, -1) + 1
            trace.events.append(
                Event(trace.tick(), name, number, _kept(read_tensor(args, kwargs)), _kept(first_tensor(output)))
            )

        return hook

    def watched(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = original(query, key, value, *args, **kwargs)
            contexts = output.transpose(1, 2).flatten(2).float()
            causal = bool(kwargs.get("is_causal")) or _hides_the_future(
                kwargs.get("attn_mask", args[0] if args else None)
            )
            same = query.shape[-2] == key.shape[-2]
            trace.calls.append(Call(trace.tick(), query.shape[1], contexts, causal, same))
            return output

        return call

    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(replaced_sdpa(watched))
        stack.enter_context(torch.inference_mode())
        model(**inputs)
    return trace


def _kept(tensor: Tensor | None) -> Tensor | None:
    """A copy, since later modules may write into it; in float32, for sums that half precision would round."""
    if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)


def _hides_the_future(mask: Any) -> bool:
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return not bool(seen.triu(1).any())


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    a, b = a.reshape(-1), b.reshape(-1)
    return bool((a - b).norm() <= _SAME * torch.maximum(a.norm(), b.norm()))
