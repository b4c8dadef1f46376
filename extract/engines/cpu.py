"""The cpu engine: one compiled pass per (sequence, head) that computes the output and the row quantities.

It replaces the attention call, or reads the scores that a model has computed. A few query rows at a time are multiplied
with packed keys, become a pattern, are added up by key and by distance, and are multiplied with packed values. Nothing
larger than these rows is stored, and keys that none of them sees are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attlas.extract.engines import buffers, cpu_kernel
from attlas.extract.engines.cpu_kernel import QUANTITIES
from attlas.extract.engines.profiles import LARGEST_DOUBLING_BIN, OFFSET_BINS, doubling_bins
from attlas.extract.engines.quantities import TOKEN_CLASSES, known_quantities
from attlas.extract.engines.rows import AttentionCall, Rows, ScoredCall

# maximum number of pieces of a sequence, and their minimum number of rows; they depend on the shape alone, so that sums
# do not depend on the number of threads
_PIECES, _PIECE_ROWS = 8, 1024


MAKES = frozenset(
    {*QUANTITIES, "received", "value_norm", "offset_bins", "same_token", "induction", "class_flow", "class_rows"}
)


def takes(call: AttentionCall | ScoredCall) -> bool:
    """Whether the engine supports a call: self-attention in float32 or less; scored calls without a sink and with values."""
    if call.visibility.is_cross_attention:
        return False
    if isinstance(call, AttentionCall):
        return call.query.dtype != torch.float64
    without_sink = call.sinks is None and call.value is not None
    return without_sink and call.scores.dtype != torch.float64 and not call.weights_only


def attend(call: AttentionCall, call_original: Callable[[], Tensor]) -> tuple[Tensor, Rows]:
    """Output and row quantities of one attention call; if a row is not measured, the output is the model's own."""
    arguments = (call.query, call.key, call.value)
    output, rows = _run_kernel(call, *map(_narrow, arguments), scores=_NO_BIAS, contexts=_NO_BIAS)
    all_measured = int(rows.measured.sum()) == call.query.shape[1] * int(call.visibility.keys.length.sum())
    return (output.to(call.query.dtype) if all_measured else call_original()), rows


def rows_of_scores(call: ScoredCall, output: Tensor) -> Rows:
    """The row quantities of a call that the model computed, with this output."""
    assert call.value is not None, "`takes` requires values"
    batch, heads, tokens, _ = call.scores.shape
    query, key = (np.zeros((batch, n, tokens, 0), np.float32) for n in (heads, call.value.shape[1]))
    scores, contexts = _narrow(call.scores), _narrow(output)
    return _run_kernel(call, query, key, _narrow(call.value), scores=scores, contexts=contexts)[1]


def _run_kernel(
    call: AttentionCall | ScoredCall,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    scores: np.ndarray,
    contexts: np.ndarray,
) -> tuple[Tensor, Rows]:
    """Run the kernel over all rows; returns contexts and row quantities."""
    seen = call.visibility
    batch, heads, tokens, _ = query.shape
    width = value.shape[-1]
    pieces = min(_PIECES, max(1, tokens // _PIECE_ROWS))
    output = torch.from_numpy(buffers.empty((batch, tokens, heads, width), np.float32)).transpose(1, 2)
    quantities = buffers.empty((len(QUANTITIES), batch, heads, tokens), np.float32)
    measured = np.empty((batch, heads, tokens), np.bool_)
    received = buffers.empty((pieces, batch, heads, tokens), np.float32)
    offsets = buffers.empty((pieces, batch, heads, 2 * tokens - 1), np.float32)
    value_norms = np.empty((batch, heads, tokens), np.float32)
    looked_up = np.empty((pieces, 2, batch, heads), np.float64)
    bins = 0 if call.classes is None else len(TOKEN_CLASSES) ** 2
    flow = np.zeros((pieces, batch, heads, bins), np.float64)
    start, length = seen.keys.start.numpy(), seen.keys.length.numpy()
    scale, softcap = (call.scale, call.softcap or 0) if isinstance(call, AttentionCall) else (1, 0)
    cpu_kernel.attend(
        query,
        key,
        value,
        scores,
        contexts,
        np.float32(scale),
        np.float32(softcap),
        start,
        length,
        _per_head(seen.first, batch, heads),
        _per_head(seen.last, batch, heads),
        _NO_PAIRS if seen.allowed is None else _per_head(seen.allowed, batch, heads),
        _NO_BIAS if seen.bias is None else _per_head(seen.bias, batch, heads),
        _NO_HEADS if call.sinks is None else call.sinks.float().numpy(),
        _NO_WRITE if call.write is None else call.write.numpy(),
        _NO_GROUPS if call.token_ids is None else _groups(call.token_ids.numpy(), start, length),
        call.token_ids is not None,
        _NO_CLASSES if call.classes is None else call.classes.keys.numpy(),
        output.numpy(),
        quantities,
        measured,
        received,
        offsets,
        value_norms,
        looked_up,
        flow,
    )
    return output, _rows(call, quantities, measured, received, offsets, value_norms, looked_up, flow)


def _rows(
    call: AttentionCall | ScoredCall,
    quantities: np.ndarray,
    measured: np.ndarray,
    received: np.ndarray,
    offsets: np.ndarray,
    value_norms: np.ndarray,
    looked_up: np.ndarray,
    flow: np.ndarray,
) -> Rows:
    """The kernel's results with the pieces of a head added up, without quantities that are unknown for the call."""
    made = dict(zip(QUANTITIES, torch.from_numpy(quantities).unbind(), strict=True))
    made |= {"received": torch.from_numpy(_sum_pieces(received)), "offset_bins": torch.from_numpy(_in_bins(offsets))}
    made["value_norm"] = torch.from_numpy(value_norms)
    made |= zip(("same_token", "induction"), torch.from_numpy(looked_up.sum(0)).unbind(), strict=True)
    if call.classes is not None:
        made["class_flow"] = torch.from_numpy(flow.sum(0))
        made["class_rows"] = call.classes.rows(torch.from_numpy(measured))
    return Rows(torch.from_numpy(measured), {name: made[name] for name in known_quantities(made, call.facts)})


_NO_PAIRS = np.zeros((0, 0, 0, 0), np.bool_)
_NO_BIAS = np.zeros((0, 0, 0, 0), np.float32)
_NO_HEADS = np.zeros(0, np.float32)
_NO_CLASSES = np.zeros((0, 0), np.int64)
_NO_WRITE = np.zeros((0, 0, 0), np.float32)


_NO_GROUPS = np.zeros((3, 0, 0), np.int32)
_LAST_GROUPS: dict[str, Any] = {}  # of the current batch; all layers use the same


def _groups(*tokens: np.ndarray) -> np.ndarray:
    """Positions grouped by token, from ids, starts and lengths."""
    cached = _LAST_GROUPS.get("tokens", ())
    if not all(map(np.array_equal, tokens, cached)) or not cached:
        groups = np.zeros((3, *tokens[0].shape), np.int32)
        cpu_kernel.group_by_token(*tokens, groups)
        _LAST_GROUPS.update(tokens=tuple(t.copy() for t in tokens), groups=groups)
    return _LAST_GROUPS["groups"]


def _narrow(x: Tensor) -> np.ndarray:
    """The tensor as float32 with contiguous last dimension."""
    x = x.float()
    return (x if x.stride(-1) == 1 else x.contiguous()).numpy()


def _per_head(x: Tensor, batch: int, heads: int) -> np.ndarray:
    """Expand over batch and heads without a copy; a bias as float32."""
    x = x.float() if x.is_floating_point() else x
    return x.expand(batch, heads, *x.shape[2:]).numpy()


def _in_bins(offsets: np.ndarray) -> np.ndarray:
    """Sums by distance [piece, batch, head, distance] as sums by doubling bin."""
    reach = offsets.shape[-1] // 2
    distances = torch.arange(-reach, reach + 1)
    bins, first = np.unique(doubling_bins(distances).numpy(), return_index=True)
    sums = np.zeros((*offsets.shape[1:3], OFFSET_BINS))
    sums[..., bins + LARGEST_DOUBLING_BIN] = np.add.reduceat(offsets, first, axis=-1, dtype=np.float64).sum(0)
    return sums.astype(np.float32)


def _sum_pieces(pieces: np.ndarray) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else pieces.sum(0, dtype=np.float64).astype(np.float32)
