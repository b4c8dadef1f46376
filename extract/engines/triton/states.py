"""Parts that the kernels of the residual stream share: tiles of states, and sums along the width."""

# kernels are Triton's language, which only looks like Python to a type checker
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

TYPES = (torch.float32, torch.bfloat16, torch.float16)  # of states
ELEMENTS = tl.constexpr(8)  # of a tensor that a thread reads at a time: 16 bytes in half precision


@triton.jit
def tile(tensor, rows, columns, WIDTH: tl.constexpr):
    """Load rows of a state in float32; 0 beyond the width, which no tile reaches that divides it."""
    places = tensor + rows[:, None] + columns[None, :]
    if ((columns.shape[0] - 1) & WIDTH) == 0:
        return tl.load(places).to(tl.float32)
    return tl.load(places, mask=(columns < WIDTH)[None, :], other=0).to(tl.float32)


@triton.jit
def grouped(values):
    """Sums of neighbouring elements, which one thread holds."""
    return tl.sum(tl.reshape(values, [values.shape[0], values.shape[1] // ELEMENTS, ELEMENTS]), 2)
