"""What is measured against what the model itself gives: every pattern, in every column that follows from it.

Knows nothing of how attention is found. Of the layout it reads what is claimed of each layer, to be held to the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import oracles
from tests.census.own import Own

ABSOLUTE, RELATIVE = 1e-5, 1e-4


@dataclass(frozen=True)
class Verdict:
    """How one reading of a batch compares with the measured rows."""

    missed: tuple[str, ...]  # patterns of the model's own that were not measured
    compared: int  # layers that equal one of them, in every part of the inputs

    @property
    def rank(self) -> tuple[bool, int]:
        return not self.missed, self.compared


def verdict_on(own: Sequence[Own], attentions: Sequence[Any], rows: Sequence[dict[str, Any]]) -> Verdict:
    """Hold measured rows to a model's own patterns: for a batch as a whole, or for each of its sequences alone."""
    if len(own) > 1 and {r["sequence_id"] for r in rows} != {*range(len(own))}:
        return Verdict((f"the rows are not of {len(own)} sequences",), 0)
    missed, compared = [], []
    for number, part in enumerate(own):
        of_part = [{**r, "sequence_id": 0} for r in rows if r["sequence_id"] == number] if len(own) > 1 else list(rows)
        not_measured, left = unmatched(part.returned, attentions, of_part, part.inputs)
        # what the model computed by softmax and did not return answers for the rest
        _, left = unmatched(part.softmaxes, left, of_part, part.inputs)
        left = [a for a in left if not (a.in_pieces and is_in_pieces(part.softmaxes, a, of_part))]
        missed += not_measured
        compared.append(len(attentions) - len(left))
    return Verdict(tuple(missed), min(compared, default=0))


def unmatched(
    own: list[Tensor], attentions: Sequence[Any], rows: list[dict[str, Any]], inputs: Mapping[str, Tensor]
) -> tuple[list[str], list[Any]]:
    """Own patterns that no measured layer equals in every column, and layers that no own pattern equals."""
    of_layers: dict[tuple[str, int], dict[tuple[int, int], dict[str, Any]]] = {}
    for row in rows:
        of_layers.setdefault((row["stack"], row["layer"]), {})[row["sequence_id"], row["head"]] = row
    left, missed = list(attentions), []
    for number, pattern in enumerate(own):
        failures = []
        for attention in left:
            failure = difference(pattern, attention, of_layers[attention.stack, attention.layer], inputs)
            if failure is None:
                left.remove(attention)
                break
            failures.append(f"{attention.stack} {attention.layer}: {failure}")
        else:
            nearest = next((f for f in failures if "heads" not in f), failures[0] if failures else "no layer is left")
            missed.append(f"own pattern {number} of shape {tuple(pattern.shape)} was not measured ({nearest})")
    return missed, left


def difference(
    pattern: Tensor, attention: Any, rows: Mapping[tuple[int, int], Mapping[str, Any]], inputs: Mapping[str, Tensor]
) -> str | None:
    """Where a layer's rows are not those of the pattern; None if they are."""
    sequences = 1 + max(sequence for sequence, _ in rows)
    pattern = heads_second(pattern, attention.heads, sequences)
    if pattern.dim() != 4 or pattern.shape[1] != attention.heads or pattern.shape[0] % sequences:
        return f"has {attention.heads} heads"
    for name, side in ((attention.queries, 2), (attention.keys, 3)):
        if name is not None and inputs[name].shape[1] != pattern.shape[side]:
            return "heads are of other tokens"
    if not attention.is_cross_attention and pattern.shape[2] != pattern.shape[3]:
        return "heads look at something else"
    windows = len(pattern) // sequences
    # of each sequence in turn, or the first of each first: as discovery found it by changing the order of sequences
    of_sequences = pattern.unflatten(0, (windows, sequences)).transpose(0, 1) if attention.batch_last else None
    pieces = pattern.unflatten(0, (sequences, windows)) if of_sequences is None else of_sequences
    for (sequence, head), row in rows.items():
        queries, keys = (
            real_of(pieces[sequence], sequence, name, side, inputs)
            for name, side in ((attention.queries, -2), (attention.keys, -1))
        )
        parts = [p[queries][:, keys].numpy() for p in pieces[sequence, :, head]]
        # heads share a mask, and a weight that underflows in one need not in another
        if any(0 in part.shape for part in parts):
            return "has no real tokens there"
        visible = [(p.amax(0) > 0)[queries][:, keys].numpy() for p in pieces[sequence]]
        for name, value in expected_columns(parts, visible, is_cross_attention=attention.is_cross_attention).items():
            if not agree(row[name], value):
                return f"{name} of head {head} in sequence {sequence} is {row[name]}, not {value}"
    return None


def is_in_pieces(softmaxes: list[Tensor], attention: Any, rows: list[dict[str, Any]]) -> bool:
    """Whether a layer is what some softmaxes in a row, each of a window or an image of the sequence, come to together."""
    of_heads = {r["head"]: r for r in rows if (r["stack"], r["layer"]) == (attention.stack, attention.layer)}
    tokens = of_heads[0]["query_rows"]
    for first in range(len(softmaxes)):
        pieces: list[Tensor] = []
        for softmax in softmaxes[first:]:
            one = heads_second(softmax, attention.heads, 1)
            if one.dim() != 4 or one.shape[:2] != (1, attention.heads) or one.shape[2] != one.shape[3]:
                break
            pieces.append(one[0])
            if sum(piece.shape[-1] for piece in pieces) >= tokens:
                break
        if len(pieces) < 2 or sum(piece.shape[-1] for piece in pieces) != tokens:
            continue
        visible = [(piece.amax(0) > 0).numpy() for piece in pieces]
        expected = [
            expected_columns([piece[head].numpy() for piece in pieces], visible, is_cross_attention=False)
            for head in of_heads
        ]
        if all(
            agree(row[name], value)
            for row, columns in zip(of_heads.values(), expected, strict=True)
            for name, value in columns.items()
        ):
            return True
    return False


def heads_second(pattern: Tensor, heads: int, sequences: int) -> Tensor:
    """A pattern as [batch and windows, head, query, key], from the several ways in which models give theirs."""
    if pattern.dim() == 3 and len(pattern) % (sequences * heads) == 0:
        return pattern.unflatten(0, (-1, heads))
    if pattern.dim() > 4 and heads in pattern.shape[1:-2]:
        return pattern.movedim(1 + pattern.shape[1:-2].index(heads), -3).flatten(0, -4)
    return pattern


def real_of(pieces: Tensor, sequence: int, name: str | None, side: int, inputs: Mapping[str, Tensor]) -> Tensor:
    """Which queries (side −2) or keys (−1) are real: as the inputs' mask says; elsewhere, the keys that anyone sees."""
    count = pieces.shape[side]
    mask = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}.get(name or "")
    given = inputs.get(mask) if mask else None
    if name is not None:
        return torch.ones(count, dtype=torch.bool) if given is None else given[sequence].bool()
    seen = (pieces > 0).flatten(0, -3).any(0).any(-2)
    return seen if side == -1 or len(seen) == count else torch.ones(count, dtype=torch.bool)


def expected_columns(
    parts: list[np.ndarray], visibles: list[np.ndarray], *, is_cross_attention: bool
) -> dict[str, float | None]:
    """What follows from a head's pattern in a sequence, or from its patterns in the windows of one."""
    of_parts = []
    for part, visible in zip(parts, visibles, strict=True):
        p = _normalized(part)
        rows = [i for i in range(len(p)) if (p[i] > 0).any()]
        sink = _sink(p)
        columns = oracles.entropy_columns(p, visible, rows, sink) | oracles.concentration_columns(p, rows)
        if sink is not None:  # one more outcome
            shares = [
                oracles.entropy([*p[i], sink[i]]) / np.log(visible[i].sum() + 1) for i in rows if visible[i].sum() > 1
            ]
            columns["entropy_normalized"] = float(np.mean(shares)) if shares else None
        if not is_cross_attention:
            columns |= oracles.distance_columns(p, visible, rows) | oracles.mass_columns(p, rows, None)
        if len(parts) == 1:
            columns |= oracles.received_columns(p, rows, _sink(p))
            of_parts.append({n: v for n, v in columns.items() if n not in ("mass_sink", "received_max_key")})
        else:
            apart = ("entropy_std_nats", "entropy_normalized", "distance_vs_uniform", "mass_sink", "mass_first")
            of_parts.append({n: v for n, v in columns.items() if n not in apart})
    if len(of_parts) == 1:
        return of_parts[0]
    sizes = [len(part) for part in parts]
    return {name: float(np.average([of[name] for of in of_parts], weights=sizes)) for name in of_parts[0]}


def _normalized(p: np.ndarray) -> np.ndarray:
    """Rows that a float32 softmax has rounded sum to one again; those of a learned sink are left as they are."""
    total = p.sum(-1, keepdims=True)
    return np.where(np.abs(total - 1) < 1e-5, p / np.maximum(total, 1e-30), p)


def _sink(p: np.ndarray) -> np.ndarray | None:
    """What is missing of a row: the mass of a learned sink."""
    missing = 1 - p.sum(-1)
    return missing if missing.max() > 1e-5 else None


def agree(got: Any, expected: float | None) -> bool:
    if got is None or expected is None:
        return got is None and expected is None
    return abs(got - expected) <= max(ABSOLUTE, RELATIVE * abs(expected))
