"""The Triton engine: fused kernels that compute the output and the row quantities on a GPU.

Two passes over the tiles of a pattern, each with its own products of queries and keys, so that nothing of a pattern's size
is stored. The first goes along rows, as flash attention does: an online softmax, with every row quantity beside it
(`rows`). Sums over rows need each row's final maximum and normaliser, so the second goes down columns of tiles
(`columns`).

Most tiles are whole: every row sees every key, and all keys are on one side of the rows. They are computed without masks.
Tiles in which no row sees anything are skipped. Scores are products in the model's own type, summed in float32. The
reference engine does what this one does not support (float64, heads wider than 256, cross-attention).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.extract.engines import sums
from attlas.extract.engines.observations import HeadObservation
from attlas.extract.engines.profiles import OFFSET_BINS, PROFILE_COLUMNS
from attlas.extract.engines.quantities import TOKEN_CLASSES, known_quantities
from attlas.extract.engines.rows import AttentionCall, Rows, ScoredCall
from attlas.extract.engines.sums import HeadSums, head_quantity
from attlas.extract.engines.triton import heads as of_heads
from attlas.extract.engines.triton import rows as of_rows
from attlas.extract.engines.triton.columns import BINS, along_columns
from attlas.extract.engines.triton.rows import along_rows
from attlas.extract.engines.visibility import Visibility

_KEY_QUANTITIES = ("received", "value_norm")
MAKES = frozenset({*of_rows.QUANTITIES, *_KEY_QUANTITIES, "offset_bins", "same_token", "induction"} - {"top", "part"})
_OF_WRITES = frozenset({"output_norm", "value_norm"})
_MIN_COLUMNS = 16  # of a product of tiles
_MAX_WIDTH = 256  # of heads that the blocks below support
_MAX_WRITE_WIDTH = 64  # in float32; of wider ones norms of writes are left to the reference engine
_ROWS_OF_SUMS = 128  # rows that head sums take together
_LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    """Sizes: rows and keys of a tile, widths of scores and of contexts in one product, warps and stages.

    `tile`: rows and keys of a tile in the pass along columns, with its own warps and stages; rows are a multiple of it.
    """

    rows: int
    keys: int
    chunk: int
    part: int
    warps: int
    stages: int
    tile: int
    tile_warps: int
    tile_stages: int
    registers: int | None = None
    tile_registers: int | None = None


# by bytes per number and padded width, for the registers (255 per thread) and shared memory (227 KiB) of an H100 or
# H200. Products of 16-bit tiles have one shape, as wide as the keys, so that the compiler keeps rows in one layout;
# float32 has no tensor cores, and its products keep a chunk of both tiles in registers.
_BLOCKS = {
    (2, 32): Blocks(128, 64, 32, 32, 8, 3, 64, 4, 3),
    (2, 64): Blocks(128, 64, 64, 64, 8, 3, 64, 4, 3),
    (2, 128): Blocks(128, 64, 128, 128, 8, 2, 64, 4, 2),
    (2, 256): Blocks(64, 32, 256, 32, 8, 2, 64, 8, 2),
    (4, 32): Blocks(64, 32, 16, 32, 8, 2, 64, 8, 2),
    (4, 64): Blocks(64, 32, 16, 64, 8, 2, 64, 8, 2),
    (4, 128): Blocks(64, 16, 16, 64, 8, 2, 64, 8, 2),
    (4, 256): Blocks(32, 32, 16, 64, 8, 2, 32, 8, 2),
}


def takes(call: AttentionCall | ScoredCall) -> bool:
    """Whether the engine supports a call: self-attention that the model has not computed, in float32 or less, and not too wide."""
    if isinstance(call, ScoredCall) or call.visibility.is_cross_attention:
        return False
    widest, size = max(call.query.shape[-1], call.value.shape[-1]), call.query.element_size()
    return size <= 4 and widest <= _MAX_WIDTH and call.scale > 0


def attend(call: AttentionCall, call_original: Callable[[], Tensor]) -> tuple[Tensor, Rows]:
    """Output and row quantities of one attention call; if a row is not measured, the output is the model's own."""
    widest, size = max(call.query.shape[-1], call.value.shape[-1]), call.query.element_size()
    return attend_in_blocks(call, call_original, _BLOCKS[size, max(32, triton.next_power_of_2(widest))])


def attend_in_blocks(call: AttentionCall, call_original: Callable[[], Tensor], blocks: Blocks) -> tuple[Tensor, Rows]:
    """`attend` with tiles of these sizes."""
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (call.query, call.key, call.value))
    seen = call.visibility
    batch, heads, tokens, width = query.shape
    value_width = value.shape[-1]
    tiles = triton.cdiv(tokens, blocks.tile)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    output = empty(batch, tokens, heads, value_width, dtype=query.dtype)
    spans = empty(batch, heads, tiles, of_rows.SPAN.value, dtype=torch.int32)
    unmeasured = torch.zeros(1, dtype=torch.int32, device=query.device) if call.unmeasured is None else call.unmeasured
    write, write_rest = _write_factors(call)
    buffers = Buffers(
        quantities=empty(len(of_rows.QUANTITIES), batch, heads, tokens),
        measured=empty(batch, heads, tokens, dtype=torch.bool),
        of_keys=empty(len(_KEY_QUANTITIES), batch, heads, tokens),
        bins=empty(batch, heads, tiles + 3, BINS.value),
        looked_up=empty(batch, heads, tiles, 2),
        has_sink=call.sinks is not None,
        has_write=write is not None,
        has_ids=call.token_ids is not None,
    )
    natural = call.softcap is not None or seen.bias is not None
    allowed = None if seen.allowed is None else seen.allowed.view(torch.int8)
    common = {
        "query_batch": query.stride(0), "query_head": query.stride(1), "query_row": query.stride(2),
        "key_batch": key.stride(0), "key_head": key.stride(1), "key_row": key.stride(2),
        "value_batch": value.stride(0), "value_head": value.stride(1), "value_row": value.stride(2),
        **_bounds(seen),
        "batch": batch, "heads": heads, "tokens": tokens,
        "unit": _LOG2_E if natural else call.scale * _LOG2_E, "scale": call.scale, "softcap": call.softcap,
        "write": write, "write_rest": write_rest,
        "start": seen.keys.start, "length": seen.keys.length,
        **_of_pairs("allowed", allowed), **_of_pairs("bias", seen.bias),
        "PER_KEY_HEAD": heads // key.shape[1], "WIDTH": width,
        "CHUNK": min(blocks.chunk, max(_MIN_COLUMNS, triton.next_power_of_2(width))),
        "VALUE_WIDTH": value_width, "PART_WIDTH": blocks.part, "PARTS": triton.cdiv(value_width, blocks.part),
        "TILE": blocks.tile,
    }  # fmt: skip
    with torch.cuda.device_of(query):
        along_rows[(batch * heads * triton.cdiv(tokens, blocks.rows),)](
            query=query,
            key=key,
            value=value,
            output=output,
            quantities=buffers.quantities,
            measured=buffers.measured,
            spans=spans,
            unmeasured=unmeasured,
            sinks=call.sinks,
            ROWS=blocks.rows,
            KEYS=blocks.keys,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            maxnreg=blocks.registers,
            **common,
        )
        along_columns[(batch * heads * (tiles + 3),)](
            query=query,
            key=key,
            value=value,
            quantities=buffers.quantities,
            spans=spans,
            of_keys=buffers.of_keys,
            bins=buffers.bins,
            looked_up=buffers.looked_up,
            ids=call.token_ids,
            num_warps=blocks.tile_warps,
            num_stages=blocks.tile_stages,
            maxnreg=blocks.tile_registers,
            **common,
        )
    output = output.transpose(1, 2)
    # last, because it waits for the device
    if call.unmeasured is None and bool(unmeasured):
        output = call_original()
    made = known_quantities(MAKES, call.facts) - (frozenset() if buffers.has_write else _OF_WRITES)
    return output, KernelRows(buffers.measured, buffers.named(made), buffers)


@dataclass(frozen=True)
class Buffers:
    """What the kernels write of one call, for head sums to read as it is."""

    quantities: Float[Tensor, "quantity batch head query"]
    measured: Bool[Tensor, "batch head query"]
    of_keys: Float[Tensor, "2 batch head key"]
    bins: Float[Tensor, "batch head line bin"]
    looked_up: Float[Tensor, "batch head tile 2"]
    has_sink: bool
    has_write: bool
    has_ids: bool

    def named(self, names: Collection[str]) -> Mapping[str, Tensor]:
        """The row quantities of these names, each made when it is read."""
        of_row, of_key = of_rows.QUANTITIES, _KEY_QUANTITIES
        made: dict[str, Callable[[], Tensor]] = {}
        for name in names:
            if name in of_row:
                made[name] = partial(self.quantities.__getitem__, of_row.index(name))
            elif name in of_key:
                made[name] = partial(self.of_keys.__getitem__, of_key.index(name))
            elif name == "offset_bins":
                made[name] = lambda: self.bins.sum(2)[..., :OFFSET_BINS]
            else:
                made[name] = partial(self._looked_up, ("same_token", "induction").index(name))
        return _Lazy(made)

    def _looked_up(self, which: int) -> Tensor:
        return self.looked_up[..., which].sum(-1)


@dataclass(frozen=True)
class KernelRows(Rows):
    """Row quantities with the buffers that they are views of."""

    buffers: Buffers

    def __post_init__(self) -> None:
        """Nothing to check: the shapes are those of the buffers."""


class _Lazy(Mapping[str, "Tensor"]):
    """A mapping to the results of functions."""

    def __init__(self, made: Mapping[str, Callable[[], Tensor]]) -> None:
        self._made = made

    def __getitem__(self, name: str) -> Tensor:
        return self._made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def head_sums(o: HeadObservation, names: Sequence[str], *, profiles: bool) -> HeadSums:
    """The named head quantities and the profiles of an observation; of a mask with holes, they are computed in torch."""
    rows, seen = o.rows, o.visibility
    if not isinstance(rows, KernelRows) or seen.allowed is not None:
        return sums.head_sums(o, names, profiles=profiles)
    made = rows.buffers
    batch, heads, tokens = made.measured.shape
    values = torch.empty((batch, heads, of_heads.VALUES), dtype=torch.float64, device=made.measured.device)
    bins = None
    if profiles:
        bins = torch.zeros((batch, heads, 2, len(PROFILE_COLUMNS)), dtype=torch.float32, device=values.device)
    with torch.cuda.device_of(values):
        of_heads.head_sums[(batch * heads,)](
            quantities=made.quantities,
            measured=made.measured,
            of_keys=made.of_keys,
            bins=made.bins,
            looked_up=made.looked_up,
            classes=o.classes,
            start=seen.keys.start,
            length=seen.keys.length,
            values=values,
            profiles=bins,
            **_bounds(seen),
            batch=batch,
            heads=heads,
            tokens=tokens,
            lines=made.bins.shape[2],
            HAS_SINK=made.has_sink,
            HAS_WRITE=made.has_write,
            ROWS=min(_ROWS_OF_SUMS, max(16, triton.next_power_of_2(tokens))),
            num_warps=4,
        )
    absent = () if made.has_sink else ("sink",)
    absent += () if made.has_write else ("output_norm", "written", "written_first")
    absent += () if made.has_ids else ("same_token", "induction")
    absent += () if o.classes is not None else TOKEN_CLASSES
    chosen = values.permute(2, 0, 1).index_select(0, _places(tuple(names), absent, values.device))
    for place, name in enumerate(names):
        is_made = name in of_heads.MADE and name not in absent
        if not is_made and head_quantity(name).is_known(o):
            chosen[place] = head_quantity(name).compute(o)
    of_profiles = None if bins is None else bins.sum(0, dtype=torch.float64).transpose(0, 1)
    return HeadSums(chosen, of_profiles)


@cache
def _places(names: tuple[str, ...], absent: tuple[str, ...], device: torch.device) -> Tensor:
    """Where the kernel writes these head quantities; 0, where it writes NaN, for those that it does not make."""
    known = {name: place + 1 for place, name in enumerate(of_heads.MADE) if name not in absent}
    return torch.tensor([known.get(name, 0) for name in names], device=device)


def _bounds(seen: Visibility) -> dict[str, Any]:
    """First visible key of each query and the end of its keys, over as many sequences and heads as differ."""
    ends = seen.ends
    return {
        "bounds": ends,
        "bounds_batch": 0 if ends.shape[1] == 1 else ends.stride(1),
        "bounds_head": 0 if ends.shape[2] == 1 else ends.stride(2),
        "bounds_plane": ends.stride(0),
    }


def _of_pairs(name: str, pairs: Tensor | None) -> dict[str, Any]:
    """A tensor over pairs and its strides; a stride is 0 for a dimension that is broadcast."""
    strides = [0] * 4
    if pairs is not None:
        strides = [0 if n == 1 else s for n, s in zip(pairs.shape, pairs.stride(), strict=True)]
    names = (name, *(f"{name}_{dim}" for dim in ("batch", "head", "row", "key")))
    return dict(zip(names, (pairs, *strides), strict=True))


def _write_factors(call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    """R in the type of the call, and what that type leaves of it."""
    if call.write is None or (call.query.dtype == torch.float32 and call.write.shape[-1] > _MAX_WRITE_WIDTH):
        return None, None
    if call.query.dtype == torch.float32:
        return call.write, None
    write = call.write.to(call.query.dtype)
    return write, (call.write - write.float()).to(call.query.dtype)
