"""The means of the contexts of heads and of the updates of sublayers over the tokens of sequences."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.extract.capture.compiled import compilation_disabled
from attlas.extract.capture.layout import Layout
from attlas.extract.capture.rng import fixed_rng
from attlas.extract.capture.runtime.part_edits import edit_parts
from attlas.extract.capture.runtime.parts import ModelPart, Part, PartKey, parts_of
from attlas.extract.errors import CaptureError

PartMeans = Mapping[PartKey, np.ndarray]  # float32 [width]


class _Shown(NamedTuple):
    """What a pass shows of a part: the sum of its vectors, over so many positions in so many windows."""

    sum: Float[Tensor, " width"]
    positions: int
    windows: int = 1


def means_over(
    model: nn.Module, layout: Layout, sequences: Iterable[Mapping[str, Any]], kinds: Collection[Part]
) -> PartMeans:
    """The means of a model's parts over the tokens of sequences, each given as the inputs of a pass, without padding."""
    sums = PartSums(model, layout, kinds)
    for inputs in sequences:
        sums.add(inputs)
    return sums.means()


class PartSums:
    """Sums of the vectors of parts over the tokens of sequences, in float64.

    A part has no mean if it shows other positions than the tokens of a sequence: where a model pads its windows, or texts to a
    multiple of a block, the padding would count.
    """

    def __init__(self, model: nn.Module, layout: Layout, kinds: Collection[Part]) -> None:
        self._model, self._layout = model, layout
        self._parts = parts_of(layout, kinds)
        # where the positions of a layer are counted, if its heads attend over windows
        self._sublayers = {(p.site.stack, p.site.layer): p for p in parts_of(layout, ("attention",)) if p.site}
        self._sums: dict[PartKey, Tensor] = {}
        self._tokens: dict[PartKey, int] = {}
        self._padded: set[PartKey] = set()

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Make a pass over one sequence, without padding, and add what its parts show."""
        shown = self._pass(inputs)
        for part in self._parts:
            if not self._is_of_tokens(part, inputs, shown):
                self._padded.add(part.key)
                continue
            total = self._sums.get(part.key)
            self._sums[part.key] = shown[part.key].sum if total is None else total + shown[part.key].sum
            self._tokens[part.key] = self._tokens.get(part.key, 0) + shown[part.key].positions

    def means(self) -> PartMeans:
        """The mean of each part that has one."""
        return {
            key: (total / self._tokens[key]).float().cpu().numpy()
            for key, total in self._sums.items()
            if key not in self._padded
        }

    def _pass(self, inputs: Mapping[str, Any]) -> dict[PartKey, _Shown]:
        shown: dict[PartKey, _Shown] = {}
        layers = dict.fromkeys(part.attention for part in self._parts if part.site is None)
        contexts = {number: partial(_show_contexts, shown, number) for number in layers}
        sublayers = dict.fromkeys([*(p for p in self._parts if p.site), *self._sublayers.values()])
        updates = [(p.site, partial(_show_update, shown, p)) for p in sublayers if p.site]
        with ExitStack() as stack, torch.inference_mode(), compilation_disabled(), fixed_rng():
            edit_parts(stack, self._model, self._layout, contexts=contexts, updates=updates)
            self._model(**inputs)
        missing = [part.key for part in self._parts if part.key not in shown]
        if missing:
            raise CaptureError(
                f"every forward pass must show each head and sublayer once; {len(missing)} of {len(self._parts)} are missing"
            )
        return shown

    def _is_of_tokens(self, part: ModelPart, inputs: Mapping[str, Any], shown: Mapping[PartKey, _Shown]) -> bool:
        """Whether a part shows the tokens of the sequence, each once, and nothing else."""
        attention = self._layout.attentions[part.attention]
        ids = inputs.get(attention.queries or "")
        if isinstance(ids, torch.Tensor):
            return shown[part.key].positions == ids.shape[1]
        if shown[part.key].windows == 1:
            return True
        sublayer = self._sublayers.get((attention.stack, attention.layer))
        return sublayer is not None and shown[part.key].positions == shown[sublayer.key].positions


def _show_contexts(shown: dict[PartKey, _Shown], number: int, contexts: Tensor) -> None:
    of_heads = contexts[0].flatten(1, -2)
    windows = contexts.shape[2]
    for head, total in enumerate(of_heads.sum(1, dtype=torch.float64)):
        shown[number, "head", head] = _Shown(total, of_heads.shape[1], windows)


def _show_update(shown: dict[PartKey, _Shown], part: ModelPart, update: Tensor) -> None:
    of_positions = update[0].flatten(0, -2)
    shown[part.key] = _Shown(of_positions.sum(0, dtype=torch.float64), len(of_positions))
