"""An attention call on its way from the model to the receiver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attlas.extract.capture.layout import CaptureMethod
from attlas.extract.errors import CaptureError

# For code of this package that calls the model's functions, or tensor operations that are not the model's.
interception_disabled = torch._C.DisableTorchFunction


@dataclass(frozen=True)
class Request:
    """An attention call that is about to be made. The receiver returns its output, [batch, head, query, width].

    `mask` is as for scaled_dot_product_attention. `call_original` makes the call as the model would. `call_rows` makes it for
    some of the queries, given these and their rows of the mask; it is None if visibility depends on a query's position.
    `projection` is the weight that reads the contexts. Like `is_cross_attention`, it is None if the call does not tell.
    `is_imported`: the caller had imported torch's function under a name of its own. `in_projections` are what torch's
    multi-head attention makes queries, keys and values of, and the weights [out, in] that it multiplies them by.
    """

    method: CaptureMethod
    query: Float[Tensor, "batch head query width"]
    key: Float[Tensor, "batch key_head key width"]
    value: Float[Tensor, "batch key_head key value_width"]
    mask: Tensor | None
    causal: bool
    scale: float
    call_original: Callable[[], Tensor]
    call_rows: Callable[[Tensor, Tensor | None], Tensor] | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    projection: Tensor | None = None
    is_cross_attention: bool | None = None
    is_imported: bool = False
    in_projections: tuple[tuple[Tensor, Tensor], ...] = ()


Attend = Callable[[Request], "Tensor"]


def refuse_dropout(probability: float) -> None:
    """Raise CaptureError if an attention call drops weights."""
    if probability:
        raise CaptureError("a pattern is measured without dropout; the model is in training mode; call model.eval()")
