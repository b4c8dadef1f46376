"""The columns of `layers` on a GPU: the stream before and after a whole layer, one launch for each, reduced at the end of a pass."""

# kernels are Triton's language, which only looks like Python to a type checker
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from attlas.extract.engines.triton.launch import launch, power_of_2_from
from attlas.extract.engines.triton.states import ELEMENTS, TYPES, grouped, tile

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from attlas.extract.engines.visibility import Axis

COLUMNS = ("block_influence", "block_angle", "block_gain")
_VALUES = tl.constexpr(4)  # of a token: ‖x‖, ‖x'‖, and ‖u − v‖, ‖u + v‖ of their directions
# of a program: tokens, dimensions read at a time, warps; as many numbers as its threads read
_TOKENS, _CHUNK, _WARPS = 32, 64, 8


class LayerResults:
    """Results of the layers of one pass whose states have the same axis and width, by the order in which they were measured."""

    def __init__(self, axis: Axis, width: int, device: torch.device, *, layers: int) -> None:
        self.axis = axis
        self.measured = 0
        self._shape = torch.Size((len(axis.start), axis.tokens, width))
        self._values = torch.empty(layers, _VALUES.value, *self._shape[:2], dtype=torch.float32, device=device)

    def measure(self, before: Tensor, after: Tensor) -> bool:
        """Measure a layer, of x and x' [batch, token, width] in the model's own type. False if the kernel does not support them."""
        if any(
            x.shape != self._shape or x.dtype not in TYPES or x.device != self._values.device for x in (before, after)
        ):
            return False
        before, after = (x if x.stride(-1) == 1 else x.contiguous() for x in (before, after))
        batch, tokens, width = self._shape
        launch(
            compare_states,
            (-(-batch * tokens // _TOKENS), 1, 1),
            (before, after, self._values[self.measured]),
            (*before.stride()[:2], *after.stride()[:2], batch * tokens, tokens),
            (width, _TOKENS, min(_CHUNK, max(ELEMENTS.value, power_of_2_from(width)))),
            num_warps=_WARPS,
        )
        self.measured += 1
        return True

    def columns(self) -> dict[str, Float[Tensor, "layer batch"]]:
        """The columns of all layers so far, in the order in which they were measured, in float64."""
        before, after, apart, together = self._values[: self.measured].unbind(1)
        of_tokens = torch.stack((apart.square() / 2, 2 / math.pi * apart.atan2(together), after / before)).double()
        defined = self.axis.real.to(of_tokens.device) & of_tokens.isfinite()
        means = of_tokens.where(defined, 0).sum(-1) / defined.sum(-1)
        return dict(zip(COLUMNS, means.unbind(), strict=True))


@triton.jit(do_not_specialize=["states", "tokens"])
def compare_states(
    before, after, values, before_batch, before_token, after_batch, after_token, states, tokens,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The values of a block of tokens, also of padding. Both states are read twice: directions need the norms first."""
    state = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    held = tl.minimum(state, states - 1)
    b, t = (held // tokens).to(tl.int64), (held % tokens).to(tl.int64)
    of_before, of_after = b * before_batch + t * before_token, b * after_batch + t * after_token
    xx = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    yy = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    for at in range(0, WIDTH, CHUNK):
        columns = at + tl.arange(0, CHUNK)
        x, y = tile(before, of_before, columns, WIDTH), tile(after, of_after, columns, WIDTH)
        xx += grouped(x * x)
        yy += grouped(y * y)
    length, other_length = tl.sqrt(tl.sum(xx, 1)), tl.sqrt(tl.sum(yy, 1))
    apart = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    together = tl.zeros([TOKENS, CHUNK // ELEMENTS], tl.float32)
    for at in range(0, WIDTH, CHUNK):
        columns = at + tl.arange(0, CHUNK)
        u = tile(before, of_before, columns, WIDTH) / length[:, None]
        v = tile(after, of_after, columns, WIDTH) / other_length[:, None]
        apart += grouped((u - v) * (u - v))
        together += grouped((u + v) * (u + v))
    of_token = (length, other_length, tl.sqrt(tl.sum(apart, 1)), tl.sqrt(tl.sum(together, 1)))
    for n in tl.static_range(len(of_token)):
        tl.store(values + n * states.to(tl.int64) + state, of_token[n], mask=state < states)
