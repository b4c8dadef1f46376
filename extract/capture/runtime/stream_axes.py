"""Which tokens of each stack's residual stream are real and which are padding."""

from __future__ import annotations

import torch

from attlas.extract.capture.layout import Layout
from attlas.extract.capture.runtime.batch import Batch
from attlas.extract.engines.visibility import Axis, whole_axis
from attlas.extract.errors import CaptureError


class StreamAxes:
    """The token axis of each stack's stream, from the model's inputs or from the stack's attention calls.

    A stack may have streams with several numbers of tokens, each with an axis of its own. They are told apart by their
    number of states: sequences × tokens.
    """

    def __init__(self, layout: Layout, batch: Batch) -> None:
        self.sequences = batch.sequences
        self._axes: dict[tuple[str, int], Axis] = {}
        self._windows: dict[str, Axis] = {}  # of stacks that attend over windows of sequences, or frames
        for attention in layout.attentions:
            tokens = None if attention.is_cross_attention else batch.texts.get(attention.queries or "")
            if tokens is not None and tokens.axis is not None:
                self.add(attention.stack, tokens.axis)

    def is_known(self, stack: str, states: int) -> bool:
        """Whether there is an axis for a stream of so many states, or one can be derived."""
        return (stack, states) in self._axes or stack in self._windows

    def add(self, stack: str, axis: Axis) -> None:
        """Add the axis of an attention call over a stack's tokens, unless the stack has one of that size."""
        if len(axis.start) == self.sequences:
            self._axes.setdefault((stack, self.sequences * axis.tokens), axis)
        else:
            self._windows.setdefault(stack, axis)

    def axis(self, stack: str, states: int, device: torch.device) -> Axis:
        """Return the axis of a stream of so many states."""
        axis = self._axes.get((stack, states))
        if axis is None:
            axis = self._axes[stack, states] = self._whole(stack, states, device)
        return axis

    def _whole(self, stack: str, states: int, device: torch.device) -> Axis:
        """An axis without padding: windows do not tell where padding is, so there must be none."""
        windows = self._windows.get(stack)
        if windows is None or states % self.sequences or not bool((windows.length == windows.tokens).all()):
            raise CaptureError(
                f"padding must be told apart in every state of the stream; the {stack} has {states} states for "
                f"{self.sequences} sequences, and no attention call over as many tokens; measure one sequence at a time"
            )
        return whole_axis(self.sequences, states // self.sequences, device)
