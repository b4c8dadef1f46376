"""Find where the patches of an image stand among a model's tokens, by changing one patch at a time.

A configuration may state sizes, but not whether class tokens come first, whether patches come row by row, or whether the
model merges, shuffles or drops them. The input of the first attention layer tells all of this.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.compiled import compilation_disabled
from attlas.extract.capture.layout import Layout
from attlas.extract.capture.rng import fixed_rng
from attlas.extract.capture.tensors import is_stream
from attlas.extract.engines.patches import Grid

PIXELS = "pixel_values"
# a token counts as changed from this share of the largest change; others differ by rounding only
_CHANGED = 1e-3


@dataclass(frozen=True)
class PatchLayout:
    """What a stack makes of an image: its number of tokens, and where the patches stand among them if that is known."""

    stack: str
    tokens: int
    grid: Grid | None


_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[Any, PatchLayout | None]] = weakref.WeakKeyDictionary()


def find_patch_layout(model: nn.Module, layout: Layout, inputs: Mapping[str, Any]) -> PatchLayout | None:
    """Return the patch layout for images of this shape, cached; None if the model reads no images or it can't be found."""
    pixels = inputs.get(PIXELS)
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4 or not pixels.is_floating_point():
        return None
    layouts = _CACHE.setdefault(model, {})
    others = sorted((n, None if isinstance(v, torch.Tensor) else repr(v)) for n, v in inputs.items())
    key = (pixels.shape[1:], *others)
    if key not in layouts:
        layouts[key] = _patch_layout(model, layout, inputs, pixels)
    return layouts[key]


def grids_of(model: nn.Module, layout: Layout, inputs: Mapping[str, Any]) -> dict[str, Grid]:
    """The patch grid of the stack that reads the images, by the stack's name; empty if there is none or it is unknown."""
    patch_layout = find_patch_layout(model, layout, inputs)
    return {} if patch_layout is None or patch_layout.grid is None else {patch_layout.stack: patch_layout.grid}


def _patch_layout(model: nn.Module, layout: Layout, inputs: Mapping[str, Any], pixels: Tensor) -> PatchLayout | None:
    attention = next((a for a in layout.attentions if a.queries is None), layout.attentions[0])
    image = torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(0)).to(pixels)
    recording = _run_to_attention(model, attention.module, _replace_images(inputs, image[None]))
    if recording is None or recording.tokens is None:
        return None
    tokens = recording.tokens.numel() // recording.tokens.shape[-1]
    without_grid = PatchLayout(attention.stack, tokens, None)
    if recording.patches is None or len(recording.tokens) != 1 or recording.tokens.dim() != 3:
        return without_grid
    (rows, columns), stride = recording.patches
    # the corners of the grid and the neighbours of the first patch
    patches = sorted({(r, c) for r in (0, min(1, rows - 1), rows - 1) for c in (0, min(1, columns - 1), columns - 1)})
    images = torch.stack([image, *(_change_patch(image, row, column, stride) for row, column in patches)])
    changed = _run_to_attention(model, attention.module, _replace_images(inputs, images))
    if changed is None or changed.tokens is None or changed.tokens.shape != (len(images), *recording.tokens.shape[1:]):
        return without_grid
    positions = [_only_changed_token(other - changed.tokens[0]) for other in changed.tokens[1:]]
    first = positions[0]  # of the patch in the upper left corner
    if first is None or positions != [first + row * columns + column for row, column in patches]:
        return without_grid
    return PatchLayout(attention.stack, tokens, Grid(rows, columns, first, tokens))


def _replace_images(inputs: Mapping[str, Any], images: Tensor) -> dict[str, Any]:
    """The inputs with other images. All other inputs are those of the first sequence."""
    sequences = len(inputs[PIXELS])
    replaced = {
        name: value[:1].expand(len(images), *value.shape[1:])
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == sequences
        else value
        for name, value in inputs.items()
    }
    return replaced | {PIXELS: images}


def _change_patch(image: Tensor, row: int, column: int, stride: tuple[int, int]) -> Float[Tensor, "channel row column"]:
    """The image with one patch turned upside down and made stronger."""
    image = image.clone()
    patch = image[:, row * stride[0] : (row + 1) * stride[0], column * stride[1] : (column + 1) * stride[1]]
    patch.copy_(2 * patch.flip(-1, -2) + 1)
    return image


def _only_changed_token(difference: Float[Tensor, "token width"]) -> int | None:
    """The one token that has changed; None if there are several or none."""
    size = difference.float().norm(dim=-1)
    changed = (size > _CHANGED * size.max()).nonzero().flatten().tolist()
    return changed[0] if len(changed) == 1 else None


class _AttentionReached(Exception):
    """The first attention layer is about to run; the rest of the pass is not needed."""


@dataclass
class _Recording:
    """The tokens that the first attention layer reads, and the grid and stride of the convolution that makes patches."""

    pixels: tuple[int, ...]
    tokens: Tensor | None = None
    patches: tuple[tuple[int, int], tuple[int, int]] | None = None


def _run_to_attention(model: nn.Module, attention: str, inputs: Mapping[str, Any]) -> _Recording | None:
    """Run the model up to an attention module; None if it does not get there on these inputs."""
    recording = _Recording(tuple(inputs[PIXELS].shape))
    with _hooks(model, attention, recording), torch.inference_mode(), fixed_rng(), compilation_disabled():
        try:
            model(**inputs)
        except _AttentionReached:
            return recording
        except Exception:  # the model takes its inputs in another way, so the layout stays unknown
            return None
    return None


@contextmanager
def _hooks(model: nn.Module, attention: str, recording: _Recording) -> Iterator[None]:
    def record_patches(module: nn.Conv2d, args: tuple[Any, ...], output: Tensor) -> None:
        if args and tuple(args[0].shape) == recording.pixels:
            recording.patches = (output.shape[-2], output.shape[-1]), (module.stride[0], module.stride[1])

    def record_tokens(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = next((x for x in (*args, *kwargs.values()) if is_stream(x)), None)
        recording.tokens = recording.tokens if tokens is None else tokens

    def stop(*_: Any) -> None:
        raise _AttentionReached

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                stack.callback(module.register_forward_hook(record_patches).remove)
        # the innermost module may read something else than the stream: then the input of the one around it counts
        parts = attention.split(".") if attention else []
        for depth in range(1, len(parts) + 1):
            around = model.get_submodule(".".join(parts[:depth]))
            stack.callback(around.register_forward_pre_hook(record_tokens, with_kwargs=True).remove)
        stack.callback(model.get_submodule(attention).register_forward_pre_hook(stop).remove)
        yield
