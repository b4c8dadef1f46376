"""Texts packed side by side in a row, as trainers do to save padding, taken apart into the sequences that they are.

Position ids that begin again say where a sequence ends, or a 4-d mask in blocks. Whether the model keeps them apart is
asked of the model: it must attend to two of them side by side as it does to each alone. Otherwise the row is one sequence
to it, and is measured as that.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from typing_extensions import TypeIs

from extract.capture.probe import Call, trace_of
from extract.engines.visibility import allows

# tokens of either sequence that the model is asked about
_ASKED = 8
# what tells a kernel where the sequences are that begin in a row; nothing to one that is by itself
_OF_KERNELS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_ONE_ROW = (
    "the inputs hold several sequences in a row, but {} does not keep them apart, so each row is measured as one sequence; "
    "use a 4-d attention_mask in blocks, or use_cache=False, since with a cache transformers does not see that rows are packed"
)


class Part(NamedTuple):
    """Inputs that are given to a model at once, and the places of their sequences among all of the batch."""

    places: list[int]
    inputs: dict[str, Any]


class _Sequence(NamedTuple):
    row: int
    first: int
    last: int  # past its last token


def unpacked(model: nn.Module, inputs: Mapping[str, Any]) -> list[Part] | None:
    """The sequences of a packed batch, those of one length together; None where it is not packed.

    They are counted row by row, as they stand. Warns where a model does not keep them apart.
    """
    sequences = _sequences(inputs)
    if sequences is None:
        return None
    if not _keeps_apart(model, inputs, sequences):
        warnings.warn(_ONE_ROW.format(type(model).__name__), stacklevel=4)
        return None
    by_length: dict[int, list[int]] = {}
    for number, (_, first, last) in enumerate(sequences):
        by_length.setdefault(last - first, []).append(number)
    return [Part(places, _cut(inputs, [sequences[n] for n in places])) for places in by_length.values()]


def _sequences(inputs: Mapping[str, Any]) -> list[_Sequence] | None:
    """Where they stand; None where every row holds one."""
    ids, positions, mask = (inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or "decoder_input_ids" in inputs:
        return None
    begins, real = torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    begins[:, 0] = True
    if mask is None and isinstance(positions, torch.Tensor) and positions.dim() == 2:
        begins[:, 1:] |= positions.diff(dim=1) != 1
    elif _is_of_pairs(mask, ids.shape[1]):
        pairs = allows(mask).any(1)
        begins, real = begins | _blocks(pairs), real & pairs.any(1)
    else:
        return None
    rows = enumerate([*row.nonzero().flatten().tolist(), ids.shape[1]] for row in begins)
    is_real = real.tolist()  # else it is padding, which none sees
    found = [_Sequence(row, *ends) for row, places in rows for ends in pairwise(places) if is_real[row][ends[0]]]
    return found if len(found) > len(ids) else None


def _is_of_pairs(mask: Any, tokens: int) -> TypeIs[Tensor]:
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[-2:] != (tokens, tokens):
        return False
    return mask.dtype == torch.bool or mask.is_floating_point()


def _blocks(pairs: Bool[Tensor, "batch query key"]) -> Bool[Tensor, "batch token"]:
    """Tokens where a block of a mask begins: nothing before sees them or what follows, nor is it seen from there."""
    pairs = pairs | pairs.transpose(1, 2)
    place = torch.arange(pairs.shape[-1], device=pairs.device)
    reach = torch.where(pairs, place, -1).amax(-1).maximum(place).cummax(-1).values  # of a token and all before it
    begins = torch.ones_like(reach, dtype=torch.bool)
    begins[:, 1:] = reach[:, :-1] < place[1:]
    return begins


def _keeps_apart(model: nn.Module, inputs: Mapping[str, Any], sequences: Sequence[_Sequence]) -> bool:
    """Whether the model attends in two neighbours as it does in each: asked on the tokens about where one ends."""
    one, other = next((a, b) for a, b in pairwise(sequences) if a.row == b.row)
    one = one._replace(first=max(one.first, one.last - _ASKED))
    other = other._replace(last=min(other.last, other.first + _ASKED))
    both = _calls(model, inputs, _Sequence(one.row, one.first, other.last))
    size = one.last - one.first
    halves = (slice(None, size), slice(size, None))
    for half, sequence in zip(halves, (one, other), strict=True):
        alone = _calls(model, inputs, sequence)
        if len(alone) != len(both) or not all(_agrees(a, b, half) for a, b in zip(both, alone, strict=True)):
            return False
    return True


def _calls(model: nn.Module, inputs: Mapping[str, Any], sequence: _Sequence) -> list[Call]:
    return trace_of(model, _cut(inputs, [sequence]), batch=1, events=False).calls


def _agrees(both: Call, alone: Call, half: slice) -> bool:
    if both.pattern is None or alone.pattern is None or both.crosses:
        return False
    seen = both.pattern[..., half, half]
    return seen.shape == alone.pattern.shape and torch.allclose(seen, alone.pattern, rtol=1e-3, atol=1e-3)


def _cut(inputs: Mapping[str, Any], sequences: Sequence[_Sequence]) -> dict[str, Any]:
    """What the inputs say of these sequences, which are of one length."""
    rows, tokens = inputs["input_ids"].shape

    def of(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim() or len(value) not in (1, rows):
            return value
        of_each = []
        for row, first, last in sequences:
            of_row = value[row % len(value)][None]
            if value.dim() == 4 and value.shape[-2:] == (tokens, tokens):
                of_row = of_row[..., first:last, first:last]
            elif value.dim() > 1 and value.shape[1] == tokens:
                of_row = of_row[:, first:last]
            of_each.append(of_row)
        return torch.cat(of_each)

    return {name: of(value) for name, value in inputs.items() if name not in _OF_KERNELS}
