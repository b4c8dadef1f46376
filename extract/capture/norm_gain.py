"""The gain γ and the bias β of a norm, found from its outputs: some modules store γ, others γ − 1."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.compiled import compilation_disabled
from attlas.extract.capture.layout import Norm
from attlas.extract.capture.linear_map import is_near, output_of
from attlas.extract.capture.precision import cast_weights


class NormGain(NamedTuple):
    """What a norm multiplies normalised states by, and what it adds; no bias where it has none."""

    gain: Float[Tensor, " stream"]
    bias: Float[Tensor, " stream"] | None


def norm_gain(model: nn.Module, norm: Norm) -> NormGain | None:
    """Return γ and β with which a norm's output is γ · normalised input + β; None if its output is something else.

    The norm is called by itself on a vector and its opposite: half the difference of its outputs is γ times the normalised
    vector, half the sum is β. Another vector must confirm them.
    """
    module = model.get_submodule(norm.module)
    like = next((t for t in (*module.parameters(), *model.parameters()) if t.is_floating_point()), torch.zeros(()))
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(norm.width, generator=generator, dtype=torch.float64)
    alternating = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(norm.width // 2 + 1)[: norm.width]
    inputs = torch.stack((alternating, -alternating, test))
    try:
        with compilation_disabled(), cast_weights(module, torch.float32):
            outputs = output_of(module, inputs.to(like.device, dtype)[None]).double().cpu()
    except Exception:  # the model's own code, called by itself
        return None
    if outputs.shape != inputs.shape:
        return None
    gain = (outputs[0] - outputs[1]) / 2 / _normalised(alternating, norm)
    bias = (outputs[0] + outputs[1]) / 2
    if not is_near(gain * _normalised(test, norm) + bias, outputs[2], dtype):
        return None
    return NormGain(gain, bias if bool(bias.any()) or _has_bias(module, norm.width) else None)


def _normalised(x: Float[Tensor, " stream"], norm: Norm) -> Float[Tensor, " stream"]:
    centred = x - x.mean() if norm.kind == "layer" else x
    return centred / (centred.square().mean() + norm.epsilon).sqrt()


def _has_bias(module: nn.Module, width: int) -> bool:
    """Whether a norm has two vectors of the stream's width: the other one is its gain."""
    vectors = [t for t in (*module.parameters(), *module.buffers()) if t.shape == (width,)]
    return len(vectors) > 1
