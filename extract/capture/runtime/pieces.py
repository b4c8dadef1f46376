"""Put together what belongs to one sequence: a module's calls for its windows or images, or the rows of one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.layout import Attention
from attlas.extract.capture.tensors import input_tensor
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.sums import HeadSums, head_quantity
from attlas.extract.engines.visibility import Axis, whole_axis
from attlas.extract.errors import CaptureError


@dataclass(frozen=True)
class MeasuredCall:
    """The result of an attention call, or of several joined."""

    attention: Attention
    sums: HeadSums
    observations: Sequence[HeadObservation]
    axis: Axis  # of the queries
    contexts: Float[Tensor, "batch head token head_width"]


class PieceJoiner:
    """Joins the calls of modules that make one for every window or image of a sequence, when the module returns."""

    def __init__(self) -> None:
        self._pieces: list[MeasuredCall] | None = None

    @property
    def is_open(self) -> bool:
        """Whether such a module is running."""
        return self._pieces is not None

    @property
    def attention(self) -> Attention | None:
        """The layer of the calls so far, None before the first."""
        return self._pieces[0].attention if self._pieces else None

    def add(self, piece: MeasuredCall) -> None:
        assert self._pieces is not None, "a module is running"
        self._pieces.append(piece)

    @contextmanager
    def hooks(self, model: nn.Module, names: Iterable[str], deliver: Callable[[MeasuredCall], None]) -> Iterator[None]:
        """Deliver the joined call of each of these modules when it returns."""
        end_hook = self._end_hook(deliver)
        with ExitStack() as stack:
            for name in names:
                module = model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._begin).remove)
                stack.callback(module.register_forward_hook(end_hook, with_kwargs=True).remove)
            yield

    def _begin(self, _module: nn.Module, _args: Any) -> None:
        self._pieces = []

    def _end_hook(self, deliver: Callable[[MeasuredCall], None]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
            pieces, self._pieces = self._pieces or [], None
            if pieces:
                deliver(_join(pieces, input_tensor(args, kwargs)))

        return hook


def _join(pieces: Sequence[MeasuredCall], module_input: Tensor | None) -> MeasuredCall:
    """One call over the whole input of the module. Raises CaptureError if the pieces do not cover it."""
    attention = pieces[0].attention
    contexts = torch.cat([piece.contexts for piece in pieces], 2)
    if module_input is None or contexts.shape[-2] * len(contexts) != module_input.numel() // module_input.shape[-1]:
        raise CaptureError(
            f"the calls of a module are over all that it reads; those of {attention.module} are over "
            f"{contexts.shape[-2]} tokens; the model changed its way since it was examined"
        )
    profiles = [piece.sums.profiles for piece in pieces if piece.sums.profiles is not None]
    sums = HeadSums(torch.cat([piece.sums.values for piece in pieces], 1), torch.cat(profiles) if profiles else None)
    axis = pieces[0].axis
    if len(pieces) > 1:
        axis = whole_axis(len(contexts), contexts.shape[-2], contexts.device)
    observations = [observation for piece in pieces for observation in piece.observations]
    return MeasuredCall(attention, sums, observations, axis, contexts)


def merge_windows(sums: HeadSums, names: Sequence[str], sequences: int, attention: Attention) -> HeadSums:
    """Merge the sums of windows into sums of sequences. Quantities that do not merge become NaN."""
    windows, rest = divmod(sums.values.shape[1], sequences)
    if rest:
        raise CaptureError(
            f"a stack attends over as many rows as the batch has sequences, or over windows of them; layer "
            f"{attention.layer} of the {attention.stack} has {sums.values.shape[1]} rows for {sequences} sequences; give "
            "the inputs of one sequence at a time"
        )
    if windows == 1:
        return sums
    values = sums.values.unflatten(1, (windows, sequences) if attention.batch_last else (sequences, windows))
    if attention.batch_last:
        values = values.transpose(1, 2)
    merged = values.sum(2)
    for row, name in enumerate(names):
        merge = head_quantity(name).merge
        if merge != "sum":
            merged[row] = values[row].amax(1) if merge == "max" else torch.nan
    return HeadSums(merged, sums.profiles)
