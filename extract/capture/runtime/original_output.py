"""The output that the model itself computes for an attention call."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attlas.extract.capture.intercept.request import Request
from attlas.extract.engines.visibility import Axis


class OriginalOutput:
    """Computes the model's own output of a call, whole or at padding.

    An engine computes the output at real tokens. But the model's values at padding may still be read by something that looks
    at the whole tensor: a quantiser that takes the largest entry, cross-attention without a mask, a user's hook.
    """

    def __init__(self, request: Request, query: Float[Tensor, "batch head query width"]) -> None:
        self.is_computed = False
        self._request = request
        self._query = query

    def whole(self) -> Float[Tensor, "batch head query value_width"]:
        self.is_computed = True
        return self._request.call_original().reshape(*self._query.shape[:-1], -1)

    def fill_padding(
        self, output: Float[Tensor, "batch head query value_width"], queries: Axis
    ) -> Float[Tensor, "batch head query value_width"]:
        """Write the model's own values into an output, in place, where queries are padding."""
        rows = queries.padding
        if rows is None:
            return output
        request = self._request
        if request.call_rows is None or request.query.shape != self._query.shape:
            original = self.whole()[:, :, rows]
        else:
            mask = request.mask
            mask = mask if mask is None or mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
            original = request.call_rows(request.query[:, :, rows], mask)
        real = queries.real[:, None, rows, None]
        output[:, :, rows] = output[:, :, rows].where(real, original.to(output.dtype))
        return output
