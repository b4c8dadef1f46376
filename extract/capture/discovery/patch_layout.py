"""Where the patches of an image stand among a model's tokens, found by changing one patch at a time.

A configuration may state sizes, but not whether class tokens stand first, whether patches come row by row, or whether
a model merges, shuffles or drops them. What the first attention layer reads when a single patch is another says it all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.compiled import uncompiled
from attlas.extract.capture.discovery.trace import fixed_rng
from attlas.extract.capture.intercept.sdpa import is_stream
from attlas.extract.capture.layout import Layout
from attlas.extract.engines.patches import Grid

PIXELS = "pixel_values"
# a token counts as changed from this share of the largest change on; others differ by rounding alone
_CHANGED = 1e-3


@dataclass(frozen=True)
class PatchLayout:
    """What a stack makes of an image: how many tokens, and where the patches stand among them if that is known."""

    stack: str
    tokens: int
    grid: Grid | None


_SIGHTS: weakref.WeakKeyDictionary[nn.Module, dict[Any, PatchLayout | None]] = weakref.WeakKeyDictionary()


def find_patch_layout(model: nn.Module, layout: Layout, inputs: Mapping[str, Any]) -> PatchLayout | None:
    """What the model makes of images of this shape, found once; None where it reads none or does not let it be seen."""
    pixels = inputs.get(PIXELS)
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4 or not pixels.is_floating_point():
        return None
    known = _SIGHTS.setdefault(model, {})
    others = sorted((n, None if isinstance(v, torch.Tensor) else repr(v)) for n, v in inputs.items())
    key = (pixels.shape[1:], *others)
    if key not in known:
        known[key] = _found(model, layout, inputs, pixels)
    return known[key]


def _found(model: nn.Module, layout: Layout, inputs: Mapping[str, Any], pixels: Tensor) -> PatchLayout | None:
    attention = next((a for a in layout.attentions if a.queries is None), layout.attentions[0])
    plain = torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(0)).to(pixels)
    seen = _seen(model, attention.module, _with_images(inputs, plain[None]))
    if seen is None or seen.tokens is None:
        return None
    tokens = seen.tokens.numel() // seen.tokens.shape[-1]
    unknown = PatchLayout(attention.stack, tokens, None)
    if seen.patches is None or len(seen.tokens) != 1 or seen.tokens.dim() != 3:
        return unknown
    (rows, columns), stride = seen.patches
    places = sorted({(r, c) for r in (0, min(1, rows - 1), rows - 1) for c in (0, min(1, columns - 1), columns - 1)})
    images = torch.stack([plain, *(_changed(plain, row, column, stride) for row, column in places)])
    again = _seen(model, attention.module, _with_images(inputs, images))
    if again is None or again.tokens is None or again.tokens.shape != (len(images), *seen.tokens.shape[1:]):
        return unknown
    stands = [_only_change(other - again.tokens[0]) for other in again.tokens[1:]]
    first = stands[0]  # of the patch in the upper left corner
    if first is None or stands != [first + row * columns + column for row, column in places]:
        return unknown
    return PatchLayout(attention.stack, tokens, Grid(rows, columns, first, tokens))


def _with_images(inputs: Mapping[str, Any], images: Tensor) -> dict[str, Any]:
    """The inputs with other images; what else there is of each sequence is that of the first."""
    sequences = len(inputs[PIXELS])
    given = {
        name: value[:1].expand(len(images), *value.shape[1:])
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == sequences
        else value
        for name, value in inputs.items()
    }
    return given | {PIXELS: images}


def _changed(image: Tensor, row: int, column: int, stride: tuple[int, int]) -> Float[Tensor, "channel row column"]:
    """The image with one patch upside down and stronger."""
    image = image.clone()
    patch = image[:, row * stride[0] : (row + 1) * stride[0], column * stride[1] : (column + 1) * stride[1]]
    patch.copy_(2 * patch.flip(-1, -2) + 1)
    return image


def _only_change(difference: Float[Tensor, "token width"]) -> int | None:
    """The one token that has changed; None where there are several or none."""
    size = difference.float().norm(dim=-1)
    changed = (size > _CHANGED * size.max()).nonzero().flatten().tolist()
    return changed[0] if len(changed) == 1 else None


class _Reached(Exception):
    """The first attention layer is about to begin: nothing behind it is of interest."""


@dataclass
class _Seen:
    """What came by before the first attention layer: its tokens, and the grid and stride of the patches' convolution."""

    pixels: tuple[int, ...]
    tokens: Tensor | None = None
    patches: tuple[tuple[int, int], tuple[int, int]] | None = None
    ended: bool = field(default=False)


def _seen(model: nn.Module, attention: str, inputs: Mapping[str, Any]) -> _Seen | None:
    """Run the model up to an attention module; None where it does not come to it with these inputs."""
    seen = _Seen(tuple(inputs[PIXELS].shape))
    with _hooked(model, attention, seen), torch.inference_mode(), fixed_rng(), uncompiled():
        try:
            model(**inputs)
        except _Reached:
            return seen
        except Exception:  # inputs that this model takes in other ways: what it sees stays unknown
            return None
    return None


@contextmanager
def _hooked(model: nn.Module, attention: str, seen: _Seen) -> Iterator[None]:
    def convolved(module: nn.Conv2d, args: tuple[Any, ...], output: Tensor) -> None:
        if args and tuple(args[0].shape) == seen.pixels:
            seen.patches = (output.shape[-2], output.shape[-1]), (module.stride[0], module.stride[1])

    def holds(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = next((x for x in (*args, *kwargs.values()) if is_stream(x)), None)
        seen.tokens = seen.tokens if tokens is None else tokens

    def begins(*_: Any) -> None:
        raise _Reached

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                stack.callback(module.register_forward_hook(convolved).remove)
        # the innermost module may be handed something else than the stream: then the one around it counts
        parts = attention.split(".") if attention else []
        for depth in range(1, len(parts) + 1):
            inside = model.get_submodule(".".join(parts[:depth]))
            stack.callback(inside.register_forward_pre_hook(holds, with_kwargs=True).remove)
        stack.callback(model.get_submodule(attention).register_forward_pre_hook(begins).remove)
        yield
