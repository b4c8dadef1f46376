"""Where the tokens of a watched stream are real."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from attlas.extract.capture.layout import Layout
from attlas.extract.capture.runtime.batch import Batch
from attlas.extract.engines.visibility import Axis, whole_axis
from attlas.extract.errors import CaptureError


class Rows:
    """The tokens of a stack's stream: where a sequence's real ones stand in its row of the batch."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.shape = (len(axis.start), axis.tokens)

    @cached_property
    def real(self) -> Bool[Tensor, "batch token"]:
        return self.axis.real


class Axes:
    """Where the tokens of each stack's stream are real: as its input says, or as its attention calls show.

    A stack may have streams of several numbers of tokens, each with an axis of its own.
    """

    def __init__(self, layout: Layout, batch: Batch) -> None:
        self.sequences = batch.sequences
        self._rows: dict[tuple[str, int], Rows] = {}
        self._windows: dict[str, Axis] = {}  # of stacks whose attention sees windows of sequences, or frames
        for attention in layout.attentions:
            tokens = None if attention.is_cross_attention else batch.texts.get(attention.queries or "")
            if tokens is not None and tokens.axis is not None:
                self.learn(attention.stack, tokens.axis)

    def knows(self, stack: str, states: int) -> bool:
        """Whether a stream of so many states is known, or can be."""
        return (stack, states) in self._rows or stack in self._windows

    def learn(self, stack: str, axis: Axis) -> None:
        """What an attention call over a stack's tokens shows."""
        if len(axis.start) == self.sequences:
            self._rows.setdefault((stack, self.sequences * axis.tokens), Rows(axis))
        else:
            self._windows.setdefault(stack, axis)

    def rows(self, stack: str, states: int, device: torch.device) -> Rows:
        """Of a stream of so many states."""
        known = self._rows.get((stack, states))
        if known is None:
            known = self._rows[stack, states] = Rows(self._whole(stack, states, device))
        return known

    def _whole(self, stack: str, states: int, device: torch.device) -> Axis:
        """Nothing tells padding in windows, so there must be none."""
        windows = self._windows.get(stack)
        if windows is None or states % self.sequences or not bool((windows.length == windows.tokens).all()):
            raise CaptureError(
                f"padding must be told apart in every state of the stream; the {stack} has {states} states for "
                f"{self.sequences} sequences, and no attention call over as many tokens; measure one sequence at a time"
            )
        return whole_axis(self.sequences, states // self.sequences, device)
