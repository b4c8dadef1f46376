"""Find the normalisation layers in a trace, by what they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from attlas.extract.capture.discovery.trace import Event
from attlas.extract.capture.layout import Norm

_TOLERANCE = 2e-2  # half precision rounds; another operation is far off


def norms_in(events: Iterable[Event], modules: Mapping[str, nn.Module], width: int) -> Iterator[Norm]:
    """Yield every call of a module without children that normalises vectors of this width."""
    for event in events:
        module = modules[event.module]
        if event.input is None or event.output is None or not is_leaf(module):
            continue
        same_shape = event.input.shape[-1] == width and event.input.shape == event.output.shape
        if same_shape and not torch.equal(event.input, event.output):  # a dropout returns its input
            epsilon = _epsilon(module)
            kind = _norm_kind(module, event.input, event.output, epsilon)
            if kind is not None:
                yield Norm(event.module, event.call, kind, epsilon, width)


def is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _epsilon(module: nn.Module) -> float:
    """ε under either of its usual names. Torch's RMSNorm without one uses that of the type."""
    for name in ("eps", "variance_epsilon"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    return torch.finfo(torch.float32).eps


def _norm_kind(module: nn.Module, x: Tensor, output: Tensor, epsilon: float) -> Literal["layer", "rms"] | None:
    parameters = dict(module.named_parameters(recurse=False))
    if any(p.dim() != 1 or p.shape[-1] != x.shape[-1] for p in parameters.values()):
        return None
    gain = parameters.get("weight", torch.ones(x.shape[-1])).to(x)
    bias = parameters.get("bias", torch.zeros(x.shape[-1])).to(x)
    centred = x - x.mean(-1, keepdim=True)
    kinds: tuple[tuple[Literal["layer", "rms"], Tensor], ...] = (("layer", centred), ("rms", x))
    for kind, vector in kinds:
        unit = vector / (vector.square().mean(-1, keepdim=True) + epsilon).sqrt()
        # some families store γ − 1
        if _is_close(unit * gain + bias, output) or _is_close(unit * (1 + gain) + bias, output):
            return kind
    return None


def _is_close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _TOLERANCE * b.norm())
