"""Which outputs of a module are the queries, keys or values of each head.

Both are known on the tokens of a pass, so outputs are compared as columns over tokens. Values are outputs as they are.
Queries and keys may be rotated by an angle that depends on the token's position, within each head. A rotation keeps the norm
of a head's vector, so a head's block of outputs is then found by its norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Columns = tuple[range | tuple[int, ...], ...]

# relative to the part of a column that varies between tokens; another column is off by its whole size
_TOLERANCE = 1e-3
# masks are larger than any score: this many times the products of queries and keys
_LARGEST_SCALE = 32
# fewer tokens than this can't tell columns apart
_FEWEST_ROWS = 4
# tokens that candidates are chosen by; they are then compared on all
_MOST_ROWS = 64


class Match(NamedTuple):
    """The outputs of each head, in order, and the constant by which they were multiplied."""

    columns: Columns
    factor: float


def match_columns(target: Float[Tensor, "row head width"], output: Float[Tensor, "row output"]) -> Match | None:
    """Find the outputs that a target is made of, times one factor, plus a constant for each column; None if it is not."""
    heads, width = target.shape[1:]
    if len(target) < _FEWEST_ROWS:
        return None
    flat = target.flatten(1)
    varying, of_output = _centred(flat), _centred(output)
    places, likeness = _most_alike(varying, of_output)
    if bool(((likeness < 1 - _TOLERANCE) & (varying.norm(dim=0) > _rounding(flat, flat))).any()):
        return None
    chosen = places.unflatten(0, (heads, width))
    columns = tuple(_as_run(of_head, target[:, head], output) for head, of_head in enumerate(chosen))
    index = torch.tensor([place for of_head in columns for place in of_head], device=output.device)
    factor = _factor(varying, of_output[:, index])
    size = torch.maximum(varying.norm(dim=0), _rounding(flat, output[:, index]))
    is_near = (varying - factor * of_output[:, index]).norm(dim=0) <= _TOLERANCE * size
    # a column that does not vary could be any other that does not
    is_known = (varying.norm(dim=0) > _rounding(flat, output[:, index])) | _is_run(columns, output.device)
    return Match(columns, factor) if factor and bool((is_near & is_known).all()) else None


def match_in_order(target: Float[Tensor, "row head width"], output: Float[Tensor, "row output"]) -> Match | None:
    """Whether a target is all outputs of a module, in their order."""
    heads, width = target.shape[1:]
    if len(target) < _FEWEST_ROWS or target.shape[1:].numel() != output.shape[1]:
        return None
    return Match(in_order(heads, width), 1.0) if torch.equal(target.flatten(1), output) else None


def match_rotated(target: Float[Tensor, "row head width"], output: Float[Tensor, "row output"]) -> Match | None:
    """Find the block of outputs that has the norms of each head on all tokens, times one factor; None if there is none.

    This says nothing about the order of outputs within a head: see `is_same_product`.
    """
    width = target.shape[2]
    if len(target) < _FEWEST_ROWS or output.shape[1] % width:
        return None
    norms, of_blocks = target.norm(dim=-1), output.unflatten(1, (-1, width)).norm(dim=-1)
    blocks, _ = _most_alike(norms, of_blocks)
    factor = _factor(norms, of_blocks[:, blocks])
    # norms that do not vary are those of normalised vectors, and say nothing of where they come from
    varies = _centred(norms).norm(dim=0) > _TOLERANCE * norms.norm(dim=0)
    is_near = (norms - factor * of_blocks[:, blocks]).norm(dim=0) <= _TOLERANCE * _centred(norms).norm(dim=0)
    if not factor or not bool((varies & is_near).all()):
        return None
    return Match(tuple(range(b * width, (b + 1) * width) for b in blocks.tolist()), factor)


def block_layouts(outputs: int, heads: int) -> Iterator[Match]:
    """Which outputs the heads of queries, keys or values may have: all in order, or a third of them, together or by head."""
    if outputs % heads == 0:
        yield Match(in_order(heads, outputs // heads), 1.0)
    if outputs % (3 * heads) == 0:
        width = outputs // (3 * heads)
        for third in range(3):
            for starts in (
                [(third * heads + h) * width for h in range(heads)],
                [(3 * h + third) * width for h in range(heads)],
            ):
                yield Match(tuple(range(start, start + width) for start in starts), 1.0)


def product_scale(
    scores: Float[Tensor, "batch head query key"],
    queries: Float[Tensor, "batch head query width"],
    keys: Float[Tensor, "batch head key width"],
) -> float | None:
    """The constant c with which scores are c · q·k and what is the same in all sequences, such as masks and biases of positions.

    None if there is none, or if there is one sequence only. What sequences have in common is removed by differences.
    """
    if len(scores) < 2:
        return None
    products = queries @ keys.mT
    differences, of_products = scores - scores.roll(1, 0), products - products.roll(1, 0)
    largest = products.abs().amax() * _LARGEST_SCALE
    is_visible = (scores.abs() < largest) & (scores.roll(1, 0).abs() < largest)
    differences, of_products = differences[is_visible], of_products[is_visible]
    if differences.numel() < _FEWEST_ROWS:
        return None
    scale = _factor(differences, of_products)
    is_near = (differences - scale * of_products).norm() <= _TOLERANCE * differences.norm()
    return scale if scale and bool(is_near) else None


def take(output: Float[Tensor, "row output"], match: Match) -> Float[Tensor, "row head width"]:
    """The outputs of each head, times the factor."""
    index = torch.tensor([list(of_head) for of_head in match.columns], device=output.device)
    return match.factor * output[:, index]


def is_same_product(
    queries: tuple[Float[Tensor, "row head width"], Float[Tensor, "row head width"]],
    keys: tuple[Float[Tensor, "row head width"], Float[Tensor, "row head width"]],
) -> bool:
    """Whether queries and keys of the same tokens have the same products before and after what a model does to them.

    Rotations by the same angle keep products, so this is true of rotary positions, whatever their angles, and of no other
    order of the outputs within a head.
    """
    before, after = ((q * k).sum(-1) for q, k in zip(queries, keys, strict=True))
    size = queries[1].norm(dim=-1) * keys[1].norm(dim=-1)
    return bool(((before - after).norm(dim=0) <= _TOLERANCE * size.norm(dim=0)).all())


def in_order(heads: int, width: int) -> Columns:
    return tuple(range(head * width, (head + 1) * width) for head in range(heads))


def _centred(x: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    return x - x.mean(0)


def _most_alike(x: Float[Tensor, "row column"], other: Float[Tensor, "row other"]) -> tuple[Tensor, Tensor]:
    """For each column the number of the other column with the most similar direction over rows, and |cos| of the two."""
    units, of_other = (torch.nn.functional.normalize(t[:_MOST_ROWS], dim=0) for t in (x, other))
    nearest = [(part.T @ of_other).abs().max(1) for part in units.split(1024, dim=1)]
    return torch.cat([found.indices for found in nearest]), torch.cat([found.values for found in nearest])


def _as_run(columns: Tensor, target: Float[Tensor, "row width"], output: Tensor) -> range | tuple[int, ...]:
    """Columns that follow each other, if these equal the target too, as where some columns are equal or zero."""
    width, varying = len(columns), _centred(target)
    surest = int(varying.norm(dim=0).argmax())
    first = int(columns[surest]) - surest
    run = range(first, first + width)
    if run.start < 0 or run.stop > output.shape[1]:
        return tuple(columns.tolist())
    of_run = _centred(output[:, run.start : run.stop])
    size = torch.maximum(varying.norm(dim=0), _rounding(target, output[:, run.start : run.stop]))
    factor = _factor(varying, of_run)
    is_near = bool(((varying - factor * of_run).norm(dim=0) <= _TOLERANCE * size).all())
    return run if is_near else tuple(columns.tolist())


def _is_run(columns: Columns, device: torch.device) -> Tensor:
    """Of each column, whether its head has columns that follow each other."""
    return torch.tensor([isinstance(of_head, range) for of_head in columns for _ in of_head], device=device)


def _factor(x: Tensor, other: Tensor) -> float:
    """The constant by which the other tensor is nearest to x; exactly 1 if it is that to rounding."""
    square = float(other.square().sum())
    factor = float((x * other).sum()) / square if square else 0.0
    return 1.0 if abs(factor - 1) < 1e-5 else factor


def _rounding(a: Tensor, b: Tensor) -> Float[Tensor, " column"]:
    """What rounding may leave of columns that do not vary, in the unit of the tolerance."""
    return 16 * torch.finfo(a.dtype).eps * torch.maximum(a.norm(dim=0), b.norm(dim=0)) / _TOLERANCE
