"""Split rows in which several texts are packed to save padding, as trainers do.

Position ids that start again, or blocks of a 4-d mask, mark the end of a text. Whether the model separates the texts is
tested: attention in two adjacent texts must be the same as in each alone. Otherwise the model treats the row as one sequence,
and so does attlas.
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

from attlas.extract.capture.discovery.trace import Call, trace_of
from attlas.extract.engines.visibility import allows

# tokens of each of the two neighbours in the test
_TESTED_TOKENS = 8
# inputs that tell attention kernels where packed texts start, and mean nothing for a single text
_KERNEL_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_NOT_SEPARATED = (
    "the inputs pack several sequences into a row, but {} does not keep them apart, so each row is measured as one sequence; "
    "use a 4-d attention_mask in blocks, or use_cache=False, since with a cache transformers does not detect packed rows"
)


class BatchPart(NamedTuple):
    """Inputs that a model is given at once, and the indices of their sequences in the whole batch."""

    places: list[int]
    inputs: dict[str, Any]


class _Sequence(NamedTuple):
    row: int
    start: int
    stop: int


def split_packed_texts(model: nn.Module, inputs: Mapping[str, Any]) -> list[BatchPart] | None:
    """Split a packed batch into its texts, grouped by length; None if it is not packed.

    Texts are counted row by row. Warns if the model does not separate them.
    """
    sequences = _packed_sequences(inputs)
    if sequences is None:
        return None
    if not _keeps_apart(model, inputs, sequences):
        warnings.warn(_NOT_SEPARATED.format(type(model).__name__), stacklevel=4)
        return None
    by_length: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        by_length.setdefault(sequence.stop - sequence.start, []).append(number)
    return [BatchPart(places, _cut(inputs, [sequences[n] for n in places])) for places in by_length.values()]


def _packed_sequences(inputs: Mapping[str, Any]) -> list[_Sequence] | None:
    """The sequences in all rows; None if no row holds more than one."""
    ids, positions, mask = (inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or "decoder_input_ids" in inputs:
        return None
    starts, real = torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    starts[:, 0] = True
    if mask is None and isinstance(positions, torch.Tensor) and positions.dim() == 2:
        starts[:, 1:] |= positions.diff(dim=1) != 1
    elif _is_pair_mask(mask, ids.shape[1]):
        pairs = allows(mask).any(1)
        starts, real = starts | _block_starts(pairs), real & pairs.any(1)
    else:
        return None
    bounds = enumerate([*row.nonzero().flatten().tolist(), ids.shape[1]] for row in starts)
    is_real = real.tolist()  # False for padding, which no query attends to
    sequences = [_Sequence(row, *ends) for row, places in bounds for ends in pairwise(places) if is_real[row][ends[0]]]
    return sequences if len(sequences) > len(ids) else None


def _is_pair_mask(mask: Any, tokens: int) -> TypeIs[Tensor]:
    """Whether this is a 4-d mask, boolean or additive, of queries and keys."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[-2:] != (tokens, tokens):
        return False
    return mask.dtype == torch.bool or mask.is_floating_point()


def _block_starts(pairs: Bool[Tensor, "batch query key"]) -> Bool[Tensor, "batch token"]:
    """Tokens at which a block starts: no pair of a token before and one from there on is visible, in either direction."""
    pairs = pairs | pairs.transpose(1, 2)
    place = torch.arange(pairs.shape[-1], device=pairs.device)
    # the last token visible from this one or any before it
    reach = torch.where(pairs, place, -1).amax(-1).maximum(place).cummax(-1).values
    starts = torch.ones_like(reach, dtype=torch.bool)
    starts[:, 1:] = reach[:, :-1] < place[1:]
    return starts


def _keeps_apart(model: nn.Module, inputs: Mapping[str, Any], sequences: Sequence[_Sequence]) -> bool:
    """Whether the model attends in two neighbours as in each alone, tested on the tokens around their boundary."""
    one, other = next((a, b) for a, b in pairwise(sequences) if a.row == b.row)
    one = one._replace(start=max(one.start, one.stop - _TESTED_TOKENS))
    other = other._replace(stop=min(other.stop, other.start + _TESTED_TOKENS))
    both = _attention_calls(model, inputs, _Sequence(one.row, one.start, other.stop))
    size = one.stop - one.start
    halves = (slice(None, size), slice(size, None))
    for half, sequence in zip(halves, (one, other), strict=True):
        alone = _attention_calls(model, inputs, sequence)
        if len(alone) != len(both) or not all(_same_pattern(a, b, half) for a, b in zip(both, alone, strict=True)):
            return False
    return True


def _attention_calls(model: nn.Module, inputs: Mapping[str, Any], sequence: _Sequence) -> list[Call]:
    return trace_of(model, _cut(inputs, [sequence]), batch=1, events=False).calls


def _same_pattern(both: Call, alone: Call, half: slice) -> bool:
    if both.pattern is None or alone.pattern is None or both.is_cross_attention:
        return False
    block = both.pattern[..., half, half]
    return block.shape == alone.pattern.shape and torch.allclose(block, alone.pattern, rtol=1e-3, atol=1e-3)


def _cut(inputs: Mapping[str, Any], sequences: Sequence[_Sequence]) -> dict[str, Any]:
    """The inputs of these sequences, which must have the same length."""
    return {name: _cut_value(value, inputs, sequences) for name, value in inputs.items() if name not in _KERNEL_INPUTS}


def _cut_value(value: Any, inputs: Mapping[str, Any], sequences: Sequence[_Sequence]) -> Any:
    rows, tokens = inputs["input_ids"].shape
    if not isinstance(value, torch.Tensor) or not value.dim() or len(value) not in (1, rows):
        return value
    pieces = []
    for row, start, stop in sequences:
        piece = value[row % len(value)][None]
        if value.dim() == 4 and value.shape[-2:] == (tokens, tokens):
            piece = piece[..., start:stop, start:stop]
        elif value.dim() > 1 and value.shape[1] == tokens:
            piece = piece[:, start:stop]
        pieces.append(piece)
    return torch.cat(pieces)
